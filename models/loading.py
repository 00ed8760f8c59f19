"""A language model and its tokenizer out of the folder that they were saved to."""

import json
from pathlib import Path
from typing import Any

from neural_layers.errors import InputError

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")
_LONGEST = 300


def load_language_model(folder: str | Path) -> tuple[Any, Any]:
    """The `HybridForCausalLM` saved in `folder`, in evaluation mode, and its tokenizer.

    The tokens that begin, end and pad a text are the tokenizer's where the model's own settings name none. Weights load
    from safetensors only. Raises InputError, in one line that says what is wrong and what would be right, for a folder
    that is missing or incomplete, a model of another kind, weights that cannot be read or do not fit config.json, and a
    tokenizer that does not fit the model.
    """
    folder = Path(folder)
    check_model_folder(folder)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder)
    check_vocabulary(tokenizer, model.config.vocab_size, folder)
    own = model.generation_config
    own.bos_token_id = tokenizer.bos_token_id if own.bos_token_id is None else own.bos_token_id
    own.eos_token_id = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
    if own.pad_token_id is None:
        end = own.eos_token_id[0] if isinstance(own.eos_token_id, list) else own.eos_token_id
        own.pad_token_id = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return model, tokenizer


def model_type(folder: Path) -> Any:
    """The `model_type` that config.json names. Raises InputError for a folder without one that can be read."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give one that a model was saved to")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json; give a folder that a model was saved to")
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be read: {error}") from error


def check_weights(folder: Path) -> None:
    """Raise InputError unless `folder` holds weights as safetensors."""
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise InputError(f"{folder} holds no {_WEIGHTS[0]}; weights are read from safetensors alone")


def check_model_folder(folder: Path) -> None:
    """Raise InputError unless `folder` holds the config of a hybrid language model, and weights as safetensors."""
    kind = model_type(folder)
    if kind != "neural_hybrid":
        raise InputError(
            f"{folder} holds a model of type {kind!r}, and a hybrid language model ('neural_hybrid') is needed; "
            "neural-layers convert makes one of Llama, Mistral, Qwen and Mamba checkpoints"
        )
    _read_config(folder)
    check_weights(folder)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`. Raises InputError where there is none or it cannot be read."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise InputError(f"{folder} holds no {_TOKENIZERS[0]}; save the tokenizer beside the model")
    # What a broken file raises differs from library to library; whatever it is, the folder cannot be used.
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"the tokenizer in {folder} cannot be read: {_in_one_line(error)}") from error


def check_vocabulary(tokenizer: Any, vocab_size: int, folder: Path) -> None:
    """Raise InputError where a tokenizer gives ids that a model of `vocab_size` has not, or has far too few.

    A vocabulary that a model pads (to a multiple of 128, say) fits.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size or len(tokenizer) + max(256, vocab_size // 50) < vocab_size:
        raise InputError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens (ids to {largest}), and the model a vocabulary of "
            f"{vocab_size}; put the tokenizer there that the model was trained with"
        )


def _read_config(folder: Path) -> None:
    from neural_layers.models.hybrid import HybridConfig

    try:
        HybridConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"{folder / 'config.json'} cannot be used: {_in_one_line(error)}") from error


def load_model(folder: Path) -> Any:
    """The model in `folder`, which `check_model_folder` has passed. Raises InputError for weights that do not fit."""
    from neural_layers.models.hybrid import HybridForCausalLM

    try:
        loaded: Any = HybridForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below
        )
        model, info = loaded
    except Exception as error:
        raise InputError(f"the model in {folder} cannot be read: {_in_one_line(error)}") from error
    for name, saved, expected in sorted(info["mismatched_keys"]):
        raise InputError(
            f"the weights in {folder} do not fit its config.json: {name} has shape {tuple(saved)}, expected "
            f"{tuple(expected)}"
        )
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise InputError(f"the weights in {folder} do not fit its config.json: {wrong[0]} is missing or unknown")
    wrong = [name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())]
    if wrong:
        raise InputError(f"{wrong[0]} in {folder} holds numbers that are not finite; take an earlier checkpoint")
    return model.eval()


def _in_one_line(error: Exception) -> str:
    """What an error says, shortened: weights that do not fit are listed one by one."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= _LONGEST else said[:_LONGEST] + " …"
