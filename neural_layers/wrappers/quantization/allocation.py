"""The rung of each layer for which the divergences sum to the least, at a given size."""

from collections.abc import Mapping

import numpy as np

from neural_layers.wrappers.quantization.ladder import State

UNITS = 20_000


def allocate(saved: Mapping[str, Mapping[str, int]], divergence: Mapping[str, Mapping[str, float]], need: int) -> State:
    """The state that saves at least `need` bytes with the least sum of divergences: a knapsack, by dynamic programming.

    saved: {layer: {rung: bytes}}, of which each layer takes one rung or none; divergence the same way. Savings are
    rounded down to a 20,000th of `need`, so that the sum may be a little above the least. Raises ValueError where all
    of them do not suffice.
    """
    unit = max(1, need // UNITS)
    wanted = -(-need // unit)
    # cost[j]: the least sum with which the layers so far save j units; chosen[i][j]: the option of layer i in it.
    cost, chosen = np.full(wanted + 1, np.inf), []
    cost[0] = 0.0
    units = np.arange(wanted + 1)
    for layer, rungs in saved.items():
        options = [(0, 0.0), *((bytes // unit, divergence[layer][rung]) for rung, bytes in rungs.items())]
        sums = np.stack([cost[np.maximum(units - saving, 0)] + price for saving, price in options])
        # Saving more than j units serves for j, too.
        best = sums.argmin(axis=0)
        cost = sums[best, units]
        chosen.append(best)
    if not np.isfinite(cost[wanted]):
        raise ValueError(f"{need:,} bytes cannot be saved: all layers together save fewer")
    state, left = State(), wanted
    for (layer, rungs), best in reversed(list(zip(saved.items(), chosen, strict=True))):
        option = int(best[left])
        if option:
            rung = list(rungs)[option - 1]
            state[layer] = rung
            left = max(left - rungs[rung] // unit, 0)
    return state
