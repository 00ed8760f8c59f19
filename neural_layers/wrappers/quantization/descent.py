"""The way down the ladder: which layer next, how far at once, and what is taken back."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from neural_layers.wrappers.quantization.allocation import allocate
from neural_layers.wrappers.quantization.ladder import Ladder, State
from neural_layers.wrappers.quantization.sensitivity import Sensitivity

AS_IT_IS = "as it is"
PATIENCE = 3


@dataclass(frozen=True)
class Move:
    """A layer from one rung to another."""

    layer: str
    before: str
    after: str


@dataclass(frozen=True)
class Step:
    """Moves that were tried together: what the model would weigh, its score, and whether they were kept."""

    moves: tuple[Move, ...]
    bytes: int
    score: float
    kept: bool

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


class Descent:
    """Lowers layers in the order of divergence per byte saved.

    score:  gives a model's score, or raises. least: the score to keep, target: the bytes to come to, or None.
    chunks: after every such share of all moves the model is scored.
    """

    def __init__(
        self,
        ladder: Ladder,
        sensitivity: Sensitivity,
        score: Callable[[nn.Module, str], float],
        *,
        least: float | None,
        target: int | None,
        chunks: int,
        tell: Callable[[str], None],
    ) -> None:
        self.ladder, self.sensitivity, self.score, self.tell = ladder, sensitivity, score, tell
        self.least, self.target = least, target
        self.steps: list[Step] = []
        self.refused: set[tuple[str, str]] = set()
        self.size = max(1, math.ceil(len(self._ahead({}, None)) / chunks))

    def run(self, own_score: float) -> tuple[State, float, str]:
        """The state it ends in, its score, and why it ends there. `own_score`: of the model as it is."""
        state, score, row = State(), own_score, 0
        while not self._arrived(state):
            moves = self._ahead(state, self.size)
            if not moves:
                return state, score, "no layer is left to lower"
            tried = _after(state, moves)
            found = self._try(tried, moves)
            if self.least is None or found >= self.least:
                state, score, row = tried, found, 0
            elif len(moves) > 1:
                self.size = math.ceil(len(moves) / 2)
            else:
                self.refused.add((moves[0].layer, moves[0].after))
                row += 1
                if row == PATIENCE:
                    return state, score, f"{PATIENCE} moves in a row broke the floor"
        state, score = self._settle(state, score)
        return state, score, "the target is reached"

    def _arrived(self, state: State) -> bool:
        return self.target is not None and self.ladder.bytes_of(state) <= self.target

    def _try(self, state: State, moves: list[Move]) -> float:
        weight = self.ladder.bytes_of(state)
        found = self.score(self.ladder.build(state), f"{weight:,} bytes")
        kept = self.least is None or found >= self.least
        self.steps.append(Step(tuple(moves), weight, found, kept))
        self.tell(f"{weight:,} bytes, score {found:.5g}" + ("" if kept else ": below the floor, taken back"))
        return found

    def _ahead(self, state: State, count: int | None) -> list[Move]:
        """The next moves from `state`, at most `count`, up to the target."""
        state, moves = dict(state), list[Move]()
        while len(moves) != count and not self._arrived(state):
            move = self._next(state)
            if move is None:
                break
            moves.append(move)
            state[move.layer] = move.after
        return moves

    def _next(self, state: State) -> Move | None:
        """The move of least divergence per byte saved; of equals the one of the first layer."""
        best, move = math.inf, None
        for layer, saved in self.ladder.saved.items():
            at = state.get(layer)
            for rung, bytes in saved.items():
                gain = bytes - (saved[at] if at else 0)
                if gain > 0 and (layer, rung) not in self.refused:
                    price = (self.sensitivity[layer][rung] - self._divergence(layer, at)) / gain
                    if price < best:
                        best, move = price, Move(layer, at or AS_IT_IS, rung)
        return move

    def _divergence(self, layer: str, rung: str | None) -> float:
        return self.sensitivity[layer][rung] if rung else 0.0

    def _settle(self, state: State, score: float) -> tuple[State, float]:
        """The last move often saves more than was asked for, and the order of moves is not the best for every size:
        of all states of this size, the one of the least divergence, unless it breaks the floor."""
        assert self.target is not None
        saved = {
            layer: {rung: bytes for rung, bytes in rungs.items() if (layer, rung) not in self.refused}
            for layer, rungs in self.ladder.saved.items()
        }
        try:
            best = allocate(saved, self.sensitivity, self.ladder.bytes - self.target)
        except ValueError:
            return state, score  # only what rounding to units leaves out of reach
        if self._sum(best) >= self._sum(state):
            return state, score
        names = sorted(state.keys() | best.keys())
        rungs = {name: (state.get(name, AS_IT_IS), best.get(name, AS_IT_IS)) for name in names}
        moves = [Move(name, before, after) for name, (before, after) in rungs.items() if before != after]
        found = self._try(best, moves)
        return (best, found) if self.steps[-1].kept else (state, score)

    def _sum(self, state: State) -> float:
        return sum(self._divergence(layer, rung) for layer, rung in state.items())


def _after(state: State, moves: list[Move]) -> State:
    return state | {move.layer: move.after for move in moves}
