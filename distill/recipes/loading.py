"""Teachers and tokenizers from folders, with the errors that a person can mend."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from neural_layers.distill.data.tokenizer import vocabulary_fingerprint
from neural_layers.errors import InputError
from neural_layers.models.cvm import CVMForConditionalGeneration


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`. Raises InputError where there is none, it cannot be read, or it does not serve a
    translator: without tokens for padding, start and end, or without the end after each sentence."""
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder} holds no tokenizer.json; give a folder that a tokenizer was saved to")
    # What a broken file raises differs from library to library; whatever it is, the folder cannot be used.
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"the tokenizer in {folder} cannot be read: {_first_line(error)}") from error
    missing = [name for name in ("pad_token", "bos_token", "eos_token") if getattr(tokenizer, name) is None]
    if missing:
        raise InputError(f"the tokenizer in {folder} has no {missing[0]}; a translator needs one")
    if tokenizer("a")["input_ids"][-1:] != [tokenizer.eos_token_id]:
        raise InputError(f"the tokenizer in {folder} does not end a sentence with its eos_token; a translator needs it")
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_teacher(folder: Path, tokenizer: Any = None) -> tuple[CVMForConditionalGeneration, Any]:
    """The CVM model in `folder` with its tokenizer.

    tokenizer: one that is to be used with it, or None. Raises InputError for a folder without a CVM model, weights
    that cannot be read or do not fit the config, and vocabularies that differ.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no {name}; --teacher takes a folder such as RUN/teacher")
    own = load_tokenizer(folder)
    try:
        loaded: Any = CVMForConditionalGeneration.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        model, info = loaded
    except Exception as error:
        raise InputError(f"the model in {folder} cannot be read: {_first_line(error)}") from error
    if info["missing_keys"] or info["unexpected_keys"]:
        raise InputError(f"the weights in {folder} are not those of a CVM model of its config.json")
    if model.config.vocab_size != len(own):
        raise InputError(
            f"the teacher in {folder} has a vocabulary of {model.config.vocab_size} and its tokenizer {len(own)} "
            "tokens; give the folder with the tokenizer that it was trained with"
        )
    if tokenizer is not None and vocabulary_fingerprint(tokenizer) != vocabulary_fingerprint(own):
        raise InputError(
            f"--tokenizer ({len(tokenizer)} tokens) differs from the tokenizer of the teacher in {folder} ({len(own)} "
            "tokens); leave --tokenizer out to take the teacher's"
        )
    return model, own
