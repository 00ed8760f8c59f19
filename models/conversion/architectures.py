"""The architectures whose weights a `HybridForCausalLM` takes over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from neural_layers.errors import InputError
from neural_layers.models.conversion import decoders, recurrent
from neural_layers.models.conversion.fields import expect
from neural_layers.models.hybrid import HybridConfig


@dataclass(frozen=True)
class Architecture:
    """fields: from a config to the fields of `HybridConfig`. name: from a tensor's name to ours, or to None for a
    tensor that is not needed. original: back from ours. has_wide_residual: whether the config has residual_in_fp32."""

    fields: Callable[[Any], dict[str, Any]]
    name: Callable[[str], str | None]
    original: Callable[[str], str]
    has_wide_residual: bool = False


ARCHITECTURES = {
    "llama": Architecture(decoders.llama, decoders.decoder_name, decoders.decoder_original),
    "mistral": Architecture(decoders.mistral, decoders.decoder_name, decoders.decoder_original),
    "qwen2": Architecture(decoders.qwen2, decoders.decoder_name, decoders.decoder_original),
    "qwen3": Architecture(decoders.qwen3, decoders.decoder_name, decoders.decoder_original),
    "mamba": Architecture(
        recurrent.mamba, recurrent.recurrent_name, recurrent.recurrent_original, has_wide_residual=True
    ),
    "mamba2": Architecture(
        recurrent.mamba2, recurrent.recurrent_name, recurrent.recurrent_original, has_wide_residual=True
    ),
    "neural_hybrid": Architecture(lambda config: config.to_dict(), str, str),
}


def architecture_of(model_type: Any) -> Architecture:
    """The architecture called `model_type`. Raises InputError naming those that are known."""
    if model_type not in ARCHITECTURES:
        raise InputError(f"model_type={model_type!r} is not supported; known are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]


def hybrid_config(config: Any, dtype: torch.dtype) -> HybridConfig:
    """The config of the hybrid model that computes in `dtype` what a model of `config` computes.

    Raises InputError for an architecture that is not known, and for a field that asks for what is not supported.
    """
    architecture = architecture_of(config.model_type)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"{config.model_type}: quantization_config is set, and quantized weights are not supported; "
            "dequantize the model first, or take the checkpoint it was made from"
        )
    if architecture.has_wide_residual and dtype in (torch.bfloat16, torch.float16):
        remedy = f" in {dtype}; load it with dtype=float32, where it makes no difference"
        expect(config, "residual_in_fp32", (False,), remedy)
    try:
        return HybridConfig(**{**architecture.fields(config), "dtype": dtype})
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{config.model_type}: {error}") from error
