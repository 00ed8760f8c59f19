"""Contrastive search: text that is likely and yet does not go round in circles (arXiv 2202.06417).

Letters: B batch, T length, D width, C candidates of each row, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from neural_layers.errors import InputError


def contrastive_generate(
    model: Any,
    input_ids: Tensor,
    *,
    penalty_alpha: float = 0.6,
    top_k: int = 4,
    streamer: Any = None,
    tokenizer: Any = None,
    **arguments: Any,
) -> Any:
    """Continue `input_ids` (B, T) by contrastive search; see `contrastive_search` for the method.

    streamer, tokenizer: as in `generate` (`stop_strings` need the tokenizer); `generate(custom_generate=…)` hands
    neither of them on to a function. All other arguments are those of `generate`.
    Returns what `generate` returns. Raises InputError where `contrastive_search` does.
    """

    def search(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
        return contrastive_search(model, input_ids, **prepared, streamer=streamer)

    stop_strings = arguments.pop("stop_strings", None)
    if stop_strings is not None:
        if tokenizer is None:
            raise InputError(f"stop_strings={stop_strings!r} need the model's tokenizer; give tokenizer=…")
        criteria = [StopStringCriteria(tokenizer, stop_strings), *arguments.pop("stopping_criteria", [])]
        arguments["stopping_criteria"] = StoppingCriteriaList(criteria)
    arguments = {"do_sample": False, **arguments}
    return model.generate(
        input_ids, custom_generate=search, penalty_alpha=penalty_alpha, top_k=top_k, streamer=None, **arguments
    )


def contrastive_search(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Any:
    """The decoding loop for `model.generate(ids, custom_generate=contrastive_search, penalty_alpha=0.6, top_k=4)`.

    Of the `top_k` most probable tokens v the one with the highest
        (1 − α) p(v | x) − α max_j cos(h_v, h_j)
    is taken, where h_v is the last hidden state (B, D) that the model has after v, and j runs over the tokens of the
    prompt and of the text so far, padding left out. p follows from the logits after all processors. α = 0 is greedy
    decoding.

    Each step reads all candidates at once from the same state, which the cache repeats for them and then selects from,
    so that recurrent layers are exact. A returned cache has read all but the last token, as after any other method.
    Raises InputError for an α outside [0, 1], sampling, beams, and a cache that has been read before (the states of its
    tokens are not known).
    """
    steps = ContrastiveSteps(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    for tokens in steps:
        if streamer is not None:
            streamer.put(tokens.cpu())
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return steps.input_ids
    output: Any = GenerateDecoderOnlyOutput  # annotated as tensors of other classes
    return output(
        sequences=steps.input_ids,
        scores=tuple(steps.scores) if generation_config.output_scores else None,
        past_key_values=steps.cache,
    )


class ContrastiveSteps:
    """The tokens (B,) of contrastive search, one step at a time; `input_ids` grows with them.

    Given what `generate` prepares for a decoding loop. Whenever a step has been given out, the cache has read every
    token but that step's. Raises InputError as `contrastive_search` does.
    """

    def __init__(
        self, model: Any, input_ids: Tensor, processors: Any, criteria: Any, config: Any, model_kwargs: dict[str, Any]
    ) -> None:
        self.cache: Any = model_kwargs.get("past_key_values")
        _check(config, self.cache, model_kwargs)
        self.model, self.input_ids, self.config = model, input_ids, config
        self.processors, self.criteria = processors, criteria
        self.mask_BT, self.position_ids = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        self.scores: list[Tensor] = []

    @torch.no_grad()
    def __iter__(self) -> Iterator[Tensor]:
        logits_BV, directions_BTD = self._prefill()
        unfinished_B = torch.ones_like(self.input_ids[:, 0])
        while bool(unfinished_B.any()):
            scores_BV = self.processors(self.input_ids, logits_BV.to(copy=True, dtype=torch.float32))
            if self.config.return_dict_in_generate and self.config.output_scores:
                self.scores.append(scores_BV)
            before = self.cache.fork()
            tokens_B, logits_BV, directions_BTD = self._step(scores_BV, directions_BTD)
            after = self.cache.fork()
            self.cache.rollback(before)
            if self.config._eos_token_tensor is not None:
                tokens_B = tokens_B * unfinished_B + self.config._pad_token_tensor * (1 - unfinished_B)
            self.input_ids = torch.cat([self.input_ids, tokens_B[:, None]], dim=1)
            unfinished_B = unfinished_B & ~self.criteria(self.input_ids, None)
            yield tokens_B
            self.cache.rollback(after if bool(unfinished_B.any()) else before)

    def _prefill(self) -> tuple[Tensor, Tensor]:
        """Logits behind the prompt, and the directions of its states: unit vectors, zero where there is padding."""
        length = self.input_ids.shape[1]
        chunk = self.config.prefill_chunk_size or length
        states, logits = [], torch.empty(0)
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            logits, state_BTD = self._read(self.input_ids[:, start:end], end)
            states.append(state_BTD)
        directions_BTD = torch.nn.functional.normalize(torch.cat(states, dim=1), dim=-1)
        if self.mask_BT is not None:
            directions_BTD = directions_BTD * self.mask_BT[:, :, None].to(directions_BTD)
        return logits, directions_BTD

    def _step(self, scores_BV: Tensor, directions_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The chosen tokens, the logits behind them, and all directions with theirs; the cache has then read them."""
        alpha, batch = self.config.penalty_alpha, len(scores_BV)
        p_BC, tokens_BC = scores_BV.softmax(-1).topk(min(self.config.top_k, scores_BV.shape[-1]))
        candidates, rows_B = p_BC.shape[1], torch.arange(batch, device=p_BC.device)
        self.cache.reorder_cache(rows_B.repeat_interleave(candidates))
        logits, states = self._read(tokens_BC.reshape(-1, 1), self.input_ids.shape[1] + 1, candidates)
        new_BCD = torch.nn.functional.normalize(states.view(batch, candidates, -1), dim=-1)
        cosine_BCT = new_BCD @ directions_BTD.transpose(1, 2)
        if self.mask_BT is not None:
            counts_BT = directions_BTD.new_ones(directions_BTD.shape[:2])
            counts_BT[:, : self.mask_BT.shape[1]] = self.mask_BT
            cosine_BCT = cosine_BCT.masked_fill(counts_BT[:, None] == 0, -1.0)
        value_BC = (1 - alpha) * p_BC.to(cosine_BCT) - alpha * cosine_BCT.amax(-1)
        # A token that a processor forbids may be among the candidates where few are allowed.
        chosen_B = value_BC.masked_fill(p_BC == 0, -torch.inf).argmax(-1)
        self.cache.reorder_cache(rows_B * candidates + chosen_B)
        logits_BV = logits.view(batch, candidates, -1)[rows_B, chosen_B]
        directions_BTD = torch.cat([directions_BTD, new_BCD[rows_B, chosen_B].unsqueeze(1)], dim=1)
        return tokens_BC[rows_B, chosen_B], logits_BV, directions_BTD

    def _read(self, tokens: Tensor, end: int, repeats: int = 1) -> tuple[Tensor, Tensor]:
        """Logits behind the last of `tokens`, which end at position `end` of the row, and the last states of all."""
        mask, positions = self._mask(end), self._positions(end)
        output = self.model(
            input_ids=tokens,
            attention_mask=None if mask is None else mask.repeat_interleave(repeats, dim=0),
            position_ids=None if positions is None else positions[:, -tokens.shape[1] :].repeat_interleave(repeats, 0),
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1], output.hidden_states[-1]

    def _mask(self, end: int) -> Tensor | None:
        """The mask of the first `end` tokens, those behind the prompt included."""
        if self.mask_BT is None or end <= self.mask_BT.shape[1]:
            return None if self.mask_BT is None else self.mask_BT[:, :end]
        return torch.nn.functional.pad(self.mask_BT, (0, end - self.mask_BT.shape[1]), value=1)

    def _positions(self, end: int) -> Tensor | None:
        if self.position_ids is None or end <= self.position_ids.shape[1]:
            return None if self.position_ids is None else self.position_ids[:, :end]
        more = torch.arange(1, end - self.position_ids.shape[1] + 1, device=self.position_ids.device)
        return torch.cat([self.position_ids, self.position_ids[:, -1:] + more], dim=1)


def _check(config: Any, cache: Any, model_kwargs: dict[str, Any]) -> None:
    alpha, known = config.penalty_alpha, {"attention_mask", "position_ids", "past_key_values", "use_cache"}
    if alpha is None or not 0 <= alpha <= 1:
        raise InputError(f"penalty_alpha={alpha} must lie in [0, 1]; 0.6 is usual")
    if not config.top_k or config.top_k < 1:
        raise InputError(f"top_k={config.top_k} must be at least 1: as many candidates are compared; 4 is usual")
    if config.do_sample or (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1:
        raise InputError(
            f"contrastive search gives one text: do_sample={config.do_sample}, num_beams={config.num_beams}, "
            f"num_return_sequences={config.num_return_sequences} do not go with penalty_alpha={alpha}"
        )
    if not hasattr(cache, "rollback"):
        raise InputError(
            f"contrastive search needs a cache that goes back, not {type(cache).__name__}; use HybridCache"
        )
    if cache.get_seq_length():
        raise InputError(
            f"past_key_values has read {cache.get_seq_length()} tokens, whose states contrastive search would need; "
            "leave it out"
        )
    unknown = {k for k, v in model_kwargs.items() if v is not None} - known - {"logits_to_keep", "output_hidden_states"}
    if unknown:
        raise InputError(f"contrastive search does not take {', '.join(sorted(unknown))}")
