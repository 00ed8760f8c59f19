"""Weights of other models in a `HybridForCausalLM`."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from neural_layers.errors import InputError
from neural_layers.models.conversion.architectures import architecture_of, hybrid_config
from neural_layers.models.conversion.checkpoint import Checkpoint, checkpoint_of_model, read_checkpoint
from neural_layers.models.hybrid import HybridConfig, HybridForCausalLM

_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def from_transformers(
    model: PreTrainedModel | str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> HybridForCausalLM:
    """The same language model as a `HybridForCausalLM`: the same logits and the same tokens.

    model: a Llama, Mistral, Qwen2, Qwen3, Mamba or Mamba-2 model of transformers (`…ForCausalLM`), which stays as it
           is, or a folder that one was saved to. Of a folder, config.json and safetensors are read (one file, or
           several and their index) and nothing is unpickled; a progress bar shows where that takes long.
    dtype: of the weights; by default the dtype that they have.

    RoPE as it is or with linear, dynamic, YaRN or llama3 scaling; windows; biases; norms of q and k; tied embeddings or
    not; the generation defaults come along. Every tensor is accounted for.
    Raises InputError for an architecture that is not known, for a field of the config that asks for what is not
    supported, for a file that is missing or cannot be read, and for a tensor that is missing, unexpected or of another
    shape than the config says.
    """
    if isinstance(model, PreTrainedModel):
        architecture_of(model.config.model_type)
        checkpoint = checkpoint_of_model(model)
    elif isinstance(model, str | os.PathLike):
        checkpoint = read_checkpoint(Path(model))
    else:
        raise InputError(f"from_transformers takes a model of transformers or a folder, not {type(model).__name__}")
    dtype = checkpoint.dtype if dtype is None else dtype
    config = hybrid_config(checkpoint.config, dtype)
    original = architecture_of(checkpoint.config.model_type).original
    return assemble(config, _renamed(checkpoint), checkpoint.origin, checkpoint.generation_config, original)


def assemble(
    config: HybridConfig,
    tensors: dict[str, Tensor],
    origin: str,
    generation_config: GenerationConfig | None = None,
    original: Callable[[str], str] = str,
) -> HybridForCausalLM:
    """A model of these tensors, copied to the dtype of `config` without a second model in memory meanwhile.

    origin and original: what an error calls the model, and a tensor by our name.
    Raises InputError that names the first tensor which is missing, unexpected or of another shape.
    """
    with torch.device("meta"), no_init_weights():
        model = HybridForCausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected[_HEAD]
        tensors = _without_tied_head(tensors, origin)
    _check_tensors(expected, tensors, origin, original)
    model.load_state_dict(
        {name: _copy(tensor, config.dtype) for name, tensor in tensors.items()}, strict=False, assign=True
    )
    model.tie_weights()
    model.requires_grad_(True)
    if generation_config is not None:
        model.generation_config = GenerationConfig.from_dict(generation_config.to_dict())
    return model.eval()


def _renamed(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors under our names."""
    name_of = architecture_of(checkpoint.config.model_type).name
    renamed: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        ours = name_of(name)
        if ours in renamed:
            raise InputError(f"{checkpoint.origin} holds {name} twice, under two names")
        if ours is not None:
            renamed[ours] = tensor
    return renamed


def _without_tied_head(tensors: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    head = tensors.get(_HEAD)
    if head is None:
        return tensors
    if _EMBEDDINGS in tensors and not torch.equal(head, tensors[_EMBEDDINGS]):
        raise InputError(
            f"{origin}: {_HEAD} differs from the embeddings, and the config says tie_word_embeddings=True; set it to "
            "False where the head is its own"
        )
    return {name: tensor for name, tensor in tensors.items() if name != _HEAD}


def _check_tensors(
    expected: dict[str, tuple[int, ...]], tensors: dict[str, Tensor], origin: str, original: Callable[[str], str]
) -> None:
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    for names, what in ((missing, "lacks"), (unexpected, "holds what its config has no place for:")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{origin} {what} {original(names[0])}{more}")
    for name, shape in expected.items():
        given = tuple(tensors[name].shape)
        if given != shape:
            raise InputError(f"{origin}: {original(name)} has shape {given}; its config says {shape}")


def _copy(tensor: Tensor, dtype: Any) -> Tensor:
    return tensor.detach().to(dtype, copy=True) if tensor.is_floating_point() else tensor.detach().clone()
