"""Assisted decoding and prompt lookup as steps that can be paused (arXiv 2211.17192).

Letters: B batch (here 1), T length, V vocabulary.
"""

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import _speculative_sampling

from neural_layers.errors import InputError
from neural_layers.models.generation.steps import Prepared


def assisted_tokens(prepared: Prepared, assistant: Any) -> Generator[list[int], None, None]:
    """The tokens of each step: guessed by `assistant`, or by prompt lookup without one, and checked in one call.

    Guesses are transformers' own, and so is the rule by which sampling takes them; the tokens are those of
    `generate(assistant_model=…)` or `generate(prompt_lookup_num_tokens=…)` with the same random state. Whenever a step
    has been given out, the cache has read all tokens but its last: a guess that was wrong is taken back by `crop`.
    The prompt is read in chunks where `prefill_chunk_size` says so.
    Raises InputError without a cache that goes back, and for an assistant of another vocabulary.
    """
    _check(prepared, prepared.model_kwargs.get("past_key_values"), assistant)
    return _recorded_steps(prepared, assistant)


def _recorded_steps(p: Prepared, assistant: Any) -> Generator[list[int], None, None]:
    with p.model_kwargs["past_key_values"].past_recording():
        yield from _steps(p, assistant)


@torch.no_grad()
def _steps(p: Prepared, assistant: Any) -> Generator[list[int], None, None]:
    ids, kwargs = p.input_ids, p.model_kwargs
    cache = kwargs["past_key_values"]
    guesser = p.model._get_candidate_generator(
        generation_config=p.config,
        input_ids=ids,
        inputs_tensor=ids,
        assistant_model=assistant,
        logits_processor=p.processors,
        model_kwargs=kwargs,
    )
    _prefill(p, cache)
    while True:
        guess, guess_logits = guesser.get_candidates(ids)
        scores_TV = _read(p, cache, guess, guess.shape[1] - ids.shape[1])
        for i in range(len(scores_TV)):
            scores_TV[i] = p.processors(guess[:, : ids.shape[1] + i], scores_TV[i : i + 1])[0]
        tokens = _accepted(p, guess, guess_logits, scores_TV)[: p.config.max_length - ids.shape[1]]
        tokens = _until_end(tokens, p.config._eos_token_tensor)
        cache.crop(-(len(scores_TV) - len(tokens)))
        ids = torch.cat([ids, tokens[None]], dim=1)
        guesser.update_candidate_strategy(ids, scores_TV[None], len(tokens) - 1)
        is_last = bool(p.criteria(ids, None).all())
        yield tokens.tolist()
        if is_last:
            return


def _prefill(p: Prepared, cache: Any) -> None:
    """Read all but the last token in chunks, where chunks are asked for."""
    end = p.input_ids.shape[1] - 1
    while p.config.prefill_chunk_size and cache.get_seq_length() < end:
        start = cache.get_seq_length()
        _read(p, cache, p.input_ids[:, : min(start + p.config.prefill_chunk_size, end)], 0)
        cache.crop(0)


def _read(p: Prepared, cache: Any, ids: Tensor, guessed: int) -> Tensor:
    """The logits (guessed + 1, V) behind the last token that is no guess and behind each guess."""
    start, end = cache.get_seq_length(), ids.shape[1]
    mask, positions = p.model_kwargs.get("attention_mask"), p.model_kwargs.get("position_ids")
    if mask is not None:
        mask = torch.nn.functional.pad(mask[:, :end], (0, max(end - mask.shape[1], 0)), value=1)
    if positions is not None:
        behind = torch.arange(1, max(end - positions.shape[1], 0) + 1, device=positions.device)
        positions = torch.cat([positions[:, :end], positions[:, -1:] + behind], dim=1)[:, start:]
    output = p.model(
        input_ids=ids[:, start:],
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=guessed + 1,
    )
    return output.logits[0].to(copy=True, dtype=torch.float32)


def _accepted(p: Prepared, guess: Tensor, guess_logits: Tensor | None, scores_TV: Tensor) -> Tensor:
    """The guesses that hold, and one token behind them."""
    count = len(scores_TV) - 1
    if p.config.do_sample and guess_logits is not None:
        tokens, _ = _speculative_sampling(guess, guess_logits, count, scores_TV[None])
        return tokens[0]
    if p.config.do_sample:
        chosen = torch.multinomial(scores_TV.softmax(-1), num_samples=1)[:, 0]
    else:
        chosen = scores_TV.argmax(-1)
    is_right = guess[0, guess.shape[1] - count :] == chosen[:count]
    return chosen[: int(is_right.long().cumprod(0).sum()) + 1]


def _until_end(tokens: Tensor, ends: Tensor | None) -> Tensor:
    places = [] if ends is None else torch.isin(tokens, ends.to(tokens.device)).nonzero().flatten().tolist()
    return tokens[: places[0] + 1] if places else tokens


def _check(p: Prepared, cache: Any, assistant: Any) -> None:
    if not hasattr(cache, "rollback"):
        raise InputError(f"guesses need a cache that goes back, not {type(cache).__name__}; use HybridCache")
    if p.config.assistant_ensemble_weight is not None:
        raise InputError("assistant_ensemble_weight is not streamed; use model.generate, or leave it out")
    own = p.model.config.vocab_size
    if assistant is not None and assistant.config.vocab_size != own:
        raise InputError(
            f"the assistant has a vocabulary of {assistant.config.vocab_size} and the model one of {own}; guesses are "
            "tokens, so give a model with the same tokenizer"
        )
