"""The joint tokenizer of both languages: byte-level BPE, where nothing is unknown and decoding gives back the text."""

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from neural_layers.distill.data.pairs import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, START, END = "<pad>", "<s>", "</s>"
SPECIAL_TOKENS = (PAD, START, END)
_BYTES = 256


def train_tokenizer(
    pairs: Iterable[tuple[str, str]], vocab_size: int, *, lowercase: bool = False
) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer for both sides of the pairs, the same for the same pairs.

    `<pad>` is 0, `<s>` 1 (the decoder's first input) and `</s>` 2, which ends every encoded text. Decoding without
    special tokens gives back the text exactly (lowercased, where that is asked for). A special token's name inside a
    text is text, not the token.

    Arguments:
        pairs:      (source, target) sentences
        vocab_size: the most entries; a small corpus fills fewer, then `len(tokenizer)` is smaller
        lowercase:  whether case is dropped before encoding
    Raises:
        ValueError: `vocab_size` has no room for the 256 bytes and the special tokens
        DataError:  there are no pairs
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = _BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {smallest}: 256 bytes and {len(SPECIAL_TOKENS)} more"
        )
    texts = [text for pair in pairs for text in pair]
    if not texts:
        raise DataError("no pairs to train a tokenizer on; give at least one")
    tokenizer = Tokenizer(models.BPE())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, SPECIAL_TOKENS.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        model_input_names=["input_ids", "attention_mask"],
    )


def vocabulary_fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """The SHA-256 of a tokenizer's vocabulary with its ids and its merges: equal where two encode alike.

    Arguments: `tokenizer`, a fast tokenizer.
    Returns: 64 hexadecimal digits.
    Raises: TypeError for a tokenizer without the `tokenizers` backend, whose merges cannot be seen.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise TypeError(f"{type(tokenizer).__name__} is not a fast tokenizer; load it with use_fast=True")
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    content = {"vocabulary": tokenizer.get_vocab(), "merges": model.get("merges", [])}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
