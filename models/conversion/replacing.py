"""Attention layers of a pretrained model turned into Mamba-2 layers."""

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from neural_layers.attention import GroupedQueryAttention
from neural_layers.errors import InputError
from neural_layers.models.conversion.alignment import Tell, align, own_samples
from neural_layers.models.conversion.carrying import carry, mamba2_layer
from neural_layers.models.conversion.loading import assemble, from_transformers
from neural_layers.models.hybrid import HybridConfig, HybridForCausalLM
from neural_layers.models.hybrid.layers import build_mixer

_ATTENTION = ("attention", "sliding_attention")
_NOT_MAMBA = (
    "mixer='mamba' is not supported: all channels of a Mamba-1 layer share one B and one C, and an attention layer of "
    "several heads has a q and a k for each; give mixer='mamba2'"
)


def convert_to_hybrid(
    model: PreTrainedModel | str | os.PathLike[str],
    replace_layers: Sequence[int],
    mixer: str = "mamba2",
    *,
    calibration_ids: Tensor | None = None,
    calibration_steps: int = 200,
    seed: int = 0,
    tell: Tell | None = None,
) -> HybridForCausalLM:
    """A copy of the model with Mamba-2 in place of the attention of chosen layers (arXiv 2408.15237), to be distilled
    from the original, which stays as it is.

    model:             a `HybridForCausalLM`, or what `from_transformers` takes
    replace_layers:    indices of attention layers, counted from 0
    mixer:             "mamba2", the only one with a B and a C for each head
    calibration_ids:   (B, T) token ids, a few thousand, to fit what is new to; by default the model writes them itself
    calibration_steps: steps of that fit, for each layer by itself; 0 for none
    seed:              of the written tokens and of the order in which the fit takes them
    tell:              called with a layer and its output's relative squared error before and after the fit

    The projections q, k, v and o become C, B, x and out, to the bit, and so do the norms of q and k; C and B keep the
    rotation by position. That is linear attention, with what Mamba-2 has besides: a decay, a step Δ, a convolution, a
    gate, a norm. These begin neutral (see `carry`) and are then fitted to what the attention gave (see `align`). All
    other weights are copies, to the bit.

    Raises InputError for layers that are out of range, named twice or without attention, for another mixer, and for
    what `from_transformers` raises it.
    """
    original = model if isinstance(model, HybridForCausalLM) else from_transformers(model)
    if mixer != "mamba2":
        raise InputError(_NOT_MAMBA if mixer == "mamba" else f"mixer={mixer!r} is not supported, only 'mamba2'")
    layers = _checked(replace_layers, original.config.mixers or [])
    if calibration_steps < 0:
        raise InputError(f"calibration_steps={calibration_steps} must not be negative")
    config = _config(original, layers)
    tensors = dict(original.state_dict())
    for layer in layers:
        prefix = f"model.layers.{layer}.mixer.inner."
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
        tensors |= {prefix + name: tensor for name, tensor in _replaced(original, config, layer).items()}
    converted = assemble(config, tensors, type(original).__name__, original.generation_config)
    if calibration_steps:
        was_training = original.training
        original.eval()
        ids = own_samples(original, seed) if calibration_ids is None else calibration_ids
        align(converted, original, layers, ids, calibration_steps, seed, tell)
        original.train(was_training)
    return converted


def _checked(replace_layers: Sequence[int], mixers: list[str]) -> list[int]:
    layers = [int(layer) for layer in replace_layers]
    if not layers:
        raise InputError("replace_layers names no layer; give at least one")
    attention = [i for i, name in enumerate(mixers) if name in _ATTENTION]
    for layer in layers:
        if not 0 <= layer < len(mixers):
            raise InputError(f"layer {layer} is out of range: the model has layers 0 to {len(mixers) - 1}")
        if layer not in attention:
            listed = ", ".join(map(str, attention)) or "none"
            raise InputError(f"layer {layer} is {mixers[layer]!r} and not attention; layers with attention: {listed}")
        if layers.count(layer) > 1:
            raise InputError(f"layer {layer} is named {layers.count(layer)} times; name it once")
    return sorted(layers)


def _config(original: HybridForCausalLM, layers: list[int]) -> HybridConfig:
    """The same config but for the replaced layers."""
    old: Any = original.config
    fields: dict[str, Any] = copy.deepcopy(old.to_dict())
    fields["mixers"] = ["mamba2" if i in layers else name for i, name in enumerate(old.mixers or [])]
    fields["mamba2_layers"] = {**(old.mamba2_layers or {}), **{str(i): mamba2_layer(old) for i in layers}}
    return HybridConfig.from_dict({**fields, "dtype": original.dtype})


def _replaced(original: HybridForCausalLM, config: HybridConfig, layer: int) -> dict[str, Tensor]:
    """The tensors of the layer's new mixer."""
    branch = original.model.layers[layer].mixer
    attention = branch.inner
    if not isinstance(attention, GroupedQueryAttention) or not isinstance(attention.q_proj, nn.Linear):
        raise InputError(
            f"layer {layer} is wrapped or quantized ({type(attention).__name__} of {type(attention.q_proj).__name__}); "
            "merge adapters and dequantize before converting"
        )
    with torch.random.fork_rng(devices=[]):  # what it draws is written over
        mixer: Any = build_mixer(config, layer, config.rotary())
    mixer.to(device=original.device, dtype=original.dtype)
    carry(attention, mixer, branch.norm.weight.detach())
    return mixer.state_dict()
