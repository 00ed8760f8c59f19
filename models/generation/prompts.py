"""Prompts as token ids, checked before a model reads them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neural_layers.errors import InputError

_EMPTY = "the prompt is empty; give at least one character"


def prompt_ids(tokenizer: Any, prompt: str | Sequence[int] | Tensor) -> list[int]:
    """The ids of a text, or those given as a list or tensor (T) or (1, T).

    A text gets the special tokens that the tokenizer puts before one, and no end behind it. Raises InputError for an
    empty prompt and for more than one.
    """
    if isinstance(prompt, str):
        check_text(prompt)
        # verbose: that a text is longer than the context is told below, with the model's own limit.
        ids = list(tokenizer(prompt, verbose=False)["input_ids"])
        if len(ids) > 1 and ids[-1] in tokenizer.all_special_ids:
            ids = ids[:-1]
    else:
        ids = prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)
        if ids and isinstance(ids[0], list):
            if len(ids) > 1:
                raise InputError(f"the prompt has {len(ids)} rows; one text is continued at a time")
            ids = ids[0]
    if not ids:
        raise InputError(_EMPTY)
    return ids


def check_text(prompt: str) -> None:
    """Raise InputError for a text that is empty or cannot be written as UTF-8."""
    if not prompt:
        raise InputError(_EMPTY)
    # What was no UTF-8 on a command line comes as surrogates, which tokenizers refuse in words of their own.
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt is no UTF-8 text: {error}") from error


def checked_ids(config: Any, ids: Sequence[int], new_tokens: int | None = None) -> Tensor:
    """`ids` as a tensor (1, T) that a model of `config` can read and continue by `new_tokens`.

    Raises InputError for ids outside the vocabulary, and where the text would be longer than the context.
    """
    wrong = next((i for i in ids if not 0 <= i < config.vocab_size), None)
    if wrong is not None:
        raise InputError(
            f"token id {wrong} lies outside the model's vocabulary of {config.vocab_size}; use the tokenizer that it "
            "was trained with"
        )
    room = config.max_position_embeddings - len(ids)
    if room < 1:
        raise InputError(
            f"the prompt has {len(ids)} tokens, and the model reads {config.max_position_embeddings} with what it adds;"
            f" shorten it to {config.max_position_embeddings - 1} at most, or model.extend_context(…)"
        )
    if new_tokens is not None and new_tokens > room:
        raise InputError(
            f"a prompt of {len(ids)} tokens and {new_tokens} new ones are over the context of "
            f"{config.max_position_embeddings}; ask for {room} new tokens at most, or shorten the prompt"
        )
    return torch.tensor([list(ids)])
