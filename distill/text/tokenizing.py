"""Tokenizers for language models: made on the spot or loaded, and told apart by a fingerprint."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from neural_layers.distill.text.errors import TextError, first_line
from neural_layers.errors import InputError

END, UNKNOWN = "<|endoftext|>", "<|unknown|>"
_BYTES = 256


def character_tokenizer(texts: Iterable[str]) -> Any:
    """A tokenizer with an entry for each character of `texts`, which may be pieces of documents.

    `<|unknown|>` is 0 and stands for every other character, `<|endoftext|>` is 1 and ends a document; the characters
    follow in the order of their code points. A special token's name inside a text is text.
    Raises: TextError where there is no text.
    """
    from tokenizers import Tokenizer, decoders, models

    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if not characters:
        raise TextError("no text to make a tokenizer of; give data that is not empty")
    vocabulary = {token: i for i, token in enumerate([UNKNOWN, END, *sorted(characters)])}
    # BPE without merges leaves single characters, and takes a quarter of the time of a split into words of one.
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([UNKNOWN, END])
    return _fast(tokenizer, unk_token=UNKNOWN)


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of at most `vocab_size` entries, the same for the same texts.

    `<|endoftext|>` is 0 and ends a document; nothing is unknown, and decoding gives back the text exactly.
    Raises: InputError where `vocab_size` has no room for the 256 bytes and the end; TextError where there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < _BYTES + 1:
        raise InputError(f"bpe:{vocab_size} is too small; 256 bytes and the end of a document need at least 257")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counted = _Counted(texts)
    tokenizer.train_from_iterator(iter(counted), trainer)
    if not counted.characters:
        raise TextError("no text to train a tokenizer on; give data that is not empty")
    return _fast(tokenizer)


def load_text_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`. Raises InputError where there is none or it cannot be read."""
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; --tokenizer takes char, bpe:VOCABULARY or a tokenizer's folder")
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise InputError(f"{folder} holds no tokenizer.json; give a folder that a tokenizer was saved to")
    # What a broken file raises differs from library to library; whatever it is, the folder cannot be used.
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"the tokenizer in {folder} cannot be read: {first_line(error)}") from error


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without special tokens: a special token's name inside a text is text where it can be."""
    # verbose: a piece may be longer than a model's context, which is none of the tokenizer's business here.
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def fingerprint(tokenizer: Any) -> str:
    """The SHA-256 of what decides a tokenizer's ids: equal where two encode alike and end documents alike."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = {"vocabulary": tokenizer.get_vocab(), "end": tokenizer.eos_token_id}
    if backend is None:
        content["class"] = type(tokenizer).__name__
    else:
        parts = json.loads(backend.to_str())
        # Truncation and padding are what a call last asked for, and not the tokenizer's own.
        content |= {k: v for k, v in parts.items() if k not in ("truncation", "padding", "version")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _Counted:
    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.characters = texts, 0

    def __iter__(self) -> Any:
        for text in self.texts:
            self.characters += len(text)
            yield text


def _fast(tokenizer: Any, **tokens: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        model_input_names=["input_ids", "attention_mask"],
        **tokens,
    )
