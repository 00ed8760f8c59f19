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
    config = model.config
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
    mixer.requires_grad_(False)
    masks = _free(mixer)
    for parameter in masks:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(masks, betas=(0.9, 0.98))
    size = outputs_BTD.square().mean().clamp_min(torch.finfo(outputs_BTD.dtype).tiny)
    before = _error(mixer, inputs_BTD, outputs_BTD, size)
    for step in range(steps):
        rows = torch.randperm(len(inputs_BTD), generator=generator)[:_BATCH]
        difference_BTD = mixer(inputs_BTD[rows]) - outputs_BTD[rows]
        (difference_BTD.square().mean() / size).backward()
        for parameter, mask in masks.items():
            parameter.grad = parameter.grad * mask
        rate = _LEARNING_RATE * min(1.0, (step + 1) / _WARMUP) * (1 - step / steps)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return before, _error(mixer, inputs_BTD, outputs_BTD, size)


def _free(mixer: Mamba2) -> dict[nn.Parameter, Tensor]:
    """The parameters that may move, each with ones for the entries that may: Adam leaves an entry that never had a
    gradient as it is, to the bit."""
    inner, heads = mixer.widths[0], mixer.widths[-1]
    weight_mask, bias_mask = torch.zeros_like(mixer.in_proj.weight), torch.zeros_like(mixer.in_proj.bias)
    weight_mask[-heads:] = 1  # Δ from the input; the gate's rows stay 0, which fits no worse and learns no less later
    bias_mask[:inner] = bias_mask[-heads:] = 1
    free = (mixer.A_log, mixer.dt_bias, mixer.D, mixer.conv1d.weight, mixer.conv1d.bias, mixer.norm.weight)
    masks = {parameter: torch.ones_like(parameter) for parameter in free}
    return {**masks, mixer.in_proj.weight: weight_mask, mixer.in_proj.bias: bias_mask}


@torch.no_grad()
def _error(mixer: Mamba2, inputs_BTD: Tensor, outputs_BTD: Tensor, size: Tensor) -> float:
    errors = [
        (mixer(x) - y).square().mean() for x, y in zip(inputs_BTD.split(_BATCH), outputs_BTD.split(_BATCH), strict=True)
    ]
    return float(torch.stack(errors).mean() / size)
