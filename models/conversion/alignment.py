"""Fitting what is new in a converted layer to what the layer it replaces gave.

Letters: B batch, T length, D width, H heads.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neural_layers.mamba2 import Mamba2
from neural_layers.models.hybrid import HybridCache, HybridForCausalLM

Tell = Callable[[int, float, float], None]
SEQUENCES, LENGTH = 32, 128
_BATCH, _LEARNING_RATE, _WARMUP = 8, 0.05, 10


@torch.no_grad()
def own_samples(model: HybridForCausalLM, seed: int = 0, count: int = SEQUENCES, length: int = LENGTH) -> Tensor:
    """Sequences (B, T) that the model itself writes, sampled at temperature 1 from its first token, or from any token
    where it has none: data in its own words (as in arXiv 2305.17888), where none is at hand."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    if config.bos_token_id is None:
        ids = torch.randint(config.vocab_size, (count, 1), generator=generator)
    else:
        ids = torch.full((count, 1), config.bos_token_id)
    cache = HybridCache(config)
    for _ in range(min(length, config.max_position_embeddings) - 1):
        logits = model(ids[:, -1:].to(model.device), past_key_values=cache).logits[:, -1]
        chosen = torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator)
        ids = torch.cat([ids, chosen], dim=1)
    return ids


def align(
    model: HybridForCausalLM,
    original: HybridForCausalLM,
    layers: list[int],
    ids: Tensor,
    steps: int,
    seed: int = 0,
    tell: Tell | None = None,
) -> None:
    """Fit each of the `layers` of `model` by itself to the outputs of the same layer of `original` on `ids` (B, T), on
    the inputs which that one has there (hidden-state alignment, arXiv 2408.10189).

    Only what `carry` has not taken from the attention moves: the decay, Δ, D, the gate's bias, the convolution and the
    norm's weight. Adam on the mean squared error, `steps` batches of at most 8 rows, in float32 at least; a layer that
    did not become better keeps what it had. tell(layer, before, after) hears of the relative squared errors.
    """
    for layer in layers:
        inputs_BTD, outputs_BTD = _seen(original, layer, ids)
        mixer = model.model.layers[layer].mixer.inner
        dtype = torch.promote_types(model.dtype, torch.float32)
        fitted = copy.deepcopy(mixer).to(dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.enable_grad():
            errors = _fit(fitted, inputs_BTD.to(dtype), outputs_BTD.to(dtype), steps, generator)
        if errors[1] < errors[0]:
            mixer.load_state_dict(fitted.state_dict())
        if tell is not None:
            tell(layer, errors[0], min(errors))


@torch.no_grad()
def _seen(model: HybridForCausalLM, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into the mixer of the layer, and what comes out."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, given: tuple[Tensor, ...], __: dict[str, Any], output: Tensor) -> None:
        seen.extend((given[0], output))

    hook = model.model.layers[layer].mixer.inner.register_forward_hook(keep, with_kwargs=True)
    try:
        model.model(ids.to(model.device), use_cache=False)
    finally:
        hook.remove()
    return seen[0], seen[1]


def _fit(
    mixer: Mamba2, inputs_BTD: Tensor, outputs_BTD: Tensor, steps: int, generator: torch.Generator
) -> tuple[float, float]:
    """Fit; the relative squared errors before and after."""
    scales = _scales(mixer, inputs_BTD)
    start = {name: parameter.detach().clone() for name, parameter in mixer.named_parameters()}
    moves = {name: torch.zeros_like(scale, requires_grad=True) for name, scale in scales.items()}

    def moved() -> dict[str, Tensor]:
        return {name: start[name] + scale * moves[name] for name, scale in scales.items()}

    optimizer = torch.optim.Adam(moves.values(), betas=(0.9, 0.98))
    size = outputs_BTD.square().mean().clamp_min(torch.finfo(outputs_BTD.dtype).tiny)
    before = _error(mixer, inputs_BTD, outputs_BTD, size)
    for step in range(steps):
        rows = torch.randperm(len(inputs_BTD), generator=generator)[:_BATCH]
        given_BTD: Any = torch.func.functional_call(mixer, moved(), (inputs_BTD[rows],))
        ((given_BTD - outputs_BTD[rows]).square().mean() / size).backward()
        rate = _LEARNING_RATE * min(1.0, (step + 1) / _WARMUP) * (1 - step / steps)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    mixer.load_state_dict({**start, **moved()})
    return before, _error(mixer, inputs_BTD, outputs_BTD, size)


@torch.no_grad()
def _scales(mixer: Any, inputs_BTD: Tensor) -> dict[str, Tensor]:
    """For the parameters that may move, how far a step of size 1 moves each entry: about as far as changes what it acts
    on by its own size, so that one learning rate serves layers of all sizes. 0 for what is carried, and for the gate's
    rows, which stay 0: they fit no better when they move."""
    inner, _, states, _, heads = mixer.widths
    projected_BTX = mixer.in_proj(inputs_BTD[:_BATCH])
    convolved_E = projected_BTX[..., inner:-heads].square().mean((0, 1)).sqrt()
    x, b, c = (part.square().mean().sqrt() for part in convolved_E.split([inner, states, states]))
    rows = torch.zeros_like(mixer.in_proj.weight)
    rows[-heads:] = (inputs_BTD.square().mean().sqrt() * inputs_BTD.shape[-1] ** 0.5).clamp_min(1e-6).reciprocal()
    biases = torch.zeros_like(mixer.in_proj.bias)
    biases[:inner] = biases[-heads:] = 1.0
    product = torch.ones(()) if mixer.B_norm.state_dict() else b * c
    return {
        "A_log": torch.ones_like(mixer.A_log),
        "dt_bias": torch.ones_like(mixer.dt_bias),
        "D": torch.ones_like(mixer.D) * product * mixer.state_dim**0.5,
        "conv1d.weight": torch.ones_like(mixer.conv1d.weight),
        "conv1d.bias": torch.cat([x.expand(inner), b.expand(states), c.expand(states)]),
        "norm.weight": torch.ones_like(mixer.norm.weight) * mixer.norm.weight.square().mean().sqrt(),
        "in_proj.weight": rows,
        "in_proj.bias": biases,
    }


@torch.no_grad()
def _error(mixer: Mamba2, inputs_BTD: Tensor, outputs_BTD: Tensor, size: Tensor) -> float:
    errors = [
        (mixer(x) - y).square().mean() for x, y in zip(inputs_BTD.split(_BATCH), outputs_BTD.split(_BATCH), strict=True)
    ]
    return float(torch.stack(errors).mean() / size)
