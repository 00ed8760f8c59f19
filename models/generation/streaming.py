"""Generated text as it comes."""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList, StopStringCriteria

from neural_layers.errors import InputError
from neural_layers.models.generation.assisted import assisted_tokens
from neural_layers.models.generation.pieces import TextPieces
from neural_layers.models.generation.prompts import checked_ids, prompt_ids
from neural_layers.models.generation.steps import Prepared, contrastive_tokens, prepare, sampled_tokens

_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens")
_LENGTHS = ("max_new_tokens", "max_length")


class TextStream:
    """An iterator over pieces of text, which also knows what was said so far.

    text:             all pieces so far
    token_ids:        the prompt's and the new tokens, those included whose text is not complete yet
    num_prompt_tokens: how many of them are the prompt's
    past_key_values:  the cache, which has read all of `token_ids` but the last
    stopped_by:       None while it runs; then "end" (the model said so), "length", "stop" (a stop string or another
                      criterion), "error" or "closed"
    end_ids:          the tokens with which the model ends a text

    close() ends the generation; so does leaving a `with` block, and forgetting the stream.
    """

    def __init__(
        self, steps: Generator[list[int], None, None], pieces: TextPieces, prompt: Sequence[int], prepared: Prepared
    ) -> None:
        self.token_ids, self.num_prompt_tokens = list(prompt), len(prompt)
        self.past_key_values = prepared.model_kwargs.get("past_key_values")
        self.stopped_by: str | None = None
        self._steps, self._pieces = steps, pieces
        ends = prepared.config._eos_token_tensor
        self._max_length = prepared.config.max_length
        self.end_ids: tuple[int, ...] = () if ends is None else tuple(ends.tolist())

    @property
    def text(self) -> str:
        return self._pieces.text

    @property
    def new_ids(self) -> list[int]:
        """The tokens behind the prompt."""
        return self.token_ids[self.num_prompt_tokens :]

    def __iter__(self) -> "TextStream":
        return self

    def __next__(self) -> str:
        if self.stopped_by is not None:
            raise StopIteration
        try:
            for step in self._steps:
                self.token_ids += step
                if piece := self._pieces.push(step):
                    return piece
        except BaseException:
            self.stopped_by = "error"
            raise
        self.stopped_by = self._reason()
        if rest := self._pieces.finish():
            return rest
        raise StopIteration

    def close(self) -> None:
        """End the generation; `text` then also holds what was held back."""
        if self.stopped_by is None:
            self.stopped_by = "closed"
            self._steps.close()
            self._pieces.finish()

    def __enter__(self) -> "TextStream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _reason(self) -> str:
        if self.token_ids[-1] in self.end_ids:
            return "end"
        return "length" if len(self.token_ids) == self._max_length else "stop"


def stream(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[int] | Tensor,
    *,
    callback: Callable[[str], object] | None = None,
    past_key_values: Any = None,
    skip_special_tokens: bool = True,
    **arguments: Any,
) -> TextStream:
    """Continue `prompt` and give out the new text in pieces as it comes.

        for piece in stream(model, tokenizer, "Once upon", max_new_tokens=50, do_sample=True, temperature=0.8):
            print(piece, end="", flush=True)

    prompt:    a text, or token ids
    callback:  called with each piece; `stream` then returns when the text is finished
    past_key_values: a cache that has read the beginning of the prompt, which is not read again. The prompt is the whole
               text all the same, given as ids: `s.token_ids + more`, behind a stream `s` whose cache goes on.
    skip_special_tokens: leave special tokens out of the text
    arguments: those of `generate`, for one text: greedy decoding, sampling, penalties, `stop_strings` (the text ends
               with one), `penalty_alpha` (contrastive search), `prompt_lookup_num_tokens`, `assistant_model`,
               `prefill_chunk_size`. Without a length, as many tokens as the context has room for.

    Returns a `TextStream`. The pieces together are what decoding the new tokens at once gives, and these are the tokens
    that `generate` gives with the same arguments and random state. Nothing runs between two pieces.
    Raises InputError for an empty prompt, ids outside the vocabulary, a text over the context, and for beams.
    """
    _refuse(model, arguments)
    ids = prompt_ids(tokenizer, prompt)
    input_ids = checked_ids(model.config, ids).to(model.device)
    if not _has_length(model, arguments):
        arguments["max_new_tokens"] = model.config.max_position_embeddings - len(ids)
    if arguments.get("attention_mask") is None:
        arguments["attention_mask"] = torch.ones_like(input_ids)
    if past_key_values is not None:
        _check_cache(past_key_values, len(ids))
        arguments["past_key_values"] = past_key_values
    if arguments.get("penalty_alpha"):
        arguments.setdefault("top_k", 4)
    if arguments.get("stop_strings") is not None:
        criteria = [*(arguments.get("stopping_criteria") or [])]
        criteria.append(StopStringCriteria(tokenizer, arguments.pop("stop_strings")))
        arguments["stopping_criteria"] = StoppingCriteriaList(criteria)

    result = _start(model, input_ids, TextPieces(tokenizer, skip_special_tokens), arguments)
    if callback is not None:
        for piece in result:
            callback(piece)
    return result


def _start(model: Any, input_ids: Tensor, pieces: TextPieces, arguments: dict[str, Any]) -> TextStream:
    prepared = prepare(model, input_ids, **arguments)
    ids = input_ids[0].tolist()
    checked_ids(model.config, ids, prepared.config.max_length - len(ids))
    if any(arguments.get(name) for name in _ASSISTED):
        steps = assisted_tokens(prepared, arguments.get("assistant_model"))
    elif prepared.config.penalty_alpha and not prepared.config.do_sample:
        steps = contrastive_tokens(prepared)
    else:
        steps = sampled_tokens(prepared)
    return TextStream(steps, pieces, ids, prepared)


def _check_cache(cache: Any, length: int) -> None:
    if cache.get_seq_length() >= length:
        raise InputError(
            f"past_key_values has read {cache.get_seq_length()} tokens, and the prompt has {length}; give the whole "
            "text as ids, with at least one token that was not read"
        )


def _has_length(model: Any, arguments: dict[str, Any]) -> bool:
    configs = [arguments.get("generation_config"), model.generation_config]
    values = [getattr(config, name, None) for config in configs for name in _LENGTHS]
    return any(value is not None for value in [*values, *(arguments.get(name) for name in _LENGTHS)])


def _refuse(model: Any, arguments: dict[str, Any]) -> None:
    """Raise InputError for what cannot be streamed, or does not go together."""

    def value(name: str) -> Any:
        given = arguments.get(name)
        own = getattr(arguments.get("generation_config") or model.generation_config, name, None)
        return own if given is None else given

    for name in ("num_beams", "num_return_sequences"):
        if (value(name) or 1) > 1:
            raise InputError(
                f"{name}={value(name)}: several texts are compared until the end, so that none can be streamed; use "
                "model.generate, or leave it out"
            )
    if value("penalty_alpha"):
        others = [name for name in ("do_sample", *_ASSISTED) if value(name)]
        if others:
            raise InputError(
                f"penalty_alpha={value('penalty_alpha')} (contrastive search) and {others[0]} choose tokens in two "
                "ways; leave one of them out"
            )
