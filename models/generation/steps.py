"""One token after another out of `generate`'s own preparation, without a thread.

Letters: B batch (here 1), T length, V vocabulary.
"""

import contextvars
import queue
import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from neural_layers.models.generation.contrastive import ContrastiveSteps


@dataclass
class Prepared:
    """What `generate` hands to a decoding loop: processors and criteria built from all its arguments, the cache."""

    model: Any
    input_ids: Tensor
    processors: Any
    criteria: Any
    config: Any
    model_kwargs: dict[str, Any]


def prepare(model: Any, input_ids: Tensor, **arguments: Any) -> Prepared:
    """Let `generate` check and prepare everything, and stop before its loop."""

    def capture(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Prepared:
        return Prepared(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)

    return model.generate(input_ids, custom_generate=capture, **arguments)


@torch.no_grad()
def sampled_tokens(prepared: Prepared) -> Generator[list[int], None, None]:
    """The token of each step of greedy decoding or sampling: those of `generate` with the same random state.

    Whenever a step has been given out, the cache has read all tokens but its last: here and in the functions below.
    """
    model, ids, config, kwargs = prepared.model, prepared.input_ids, prepared.config, prepared.model_kwargs
    output = model._prefill(ids, config, kwargs)
    while True:
        kwargs = model._update_model_kwargs_for_generation(output, kwargs)
        scores_BV = prepared.processors(ids, output.logits[:, -1].to(copy=True, dtype=torch.float32))
        if config.do_sample:
            token_B = torch.multinomial(scores_BV.softmax(-1), num_samples=1).squeeze(1)
        else:
            token_B = scores_BV.argmax(-1)
        ids = torch.cat([ids, token_B[:, None]], dim=1)
        is_last = bool(prepared.criteria(ids, None).all())
        yield [int(token_B)]
        if is_last:
            return
        length = 1 if kwargs.get("use_cache") else None
        output = model(**model.prepare_inputs_for_generation(ids, next_sequence_length=length, **kwargs))


def contrastive_tokens(prepared: Prepared) -> Generator[list[int], None, None]:
    """The token of each step of contrastive search."""
    p = prepared
    for token_B in ContrastiveSteps(p.model, p.input_ids, p.processors, p.criteria, p.config, p.model_kwargs):
        yield [int(token_B)]


class _Handing(BaseStreamer, StoppingCriteria):
    """Hands tokens out of a thread that runs `generate`, which waits after each step until it is asked for another."""

    def __init__(self) -> None:
        self.steps: queue.Queue[list[int] | BaseException | None] = queue.Queue()
        self.asked = threading.Semaphore(0)
        self.is_prompt, self.is_closed = True, False

    def put(self, value: Tensor) -> None:
        if not self.is_prompt:
            self.steps.put(value.flatten().tolist())
        self.is_prompt = False

    def end(self) -> None:
        """`generate` is about to return; what `run` puts into the queue says when it has."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.asked.acquire()
        return torch.full((input_ids.shape[0],), self.is_closed, dtype=torch.bool, device=input_ids.device)


def assisted_tokens(model: Any, input_ids: Tensor, **arguments: Any) -> Generator[list[int], None, None]:
    """The tokens of each step of assisted decoding or prompt lookup.

    transformers' loop cannot be paused, so it runs in a thread, which works only while the next step is waited for.
    Errors of the generation are raised here; closing the iterator ends the thread.
    """
    handing = _Handing()
    criteria = StoppingCriteriaList([*(arguments.pop("stopping_criteria", None) or []), handing])

    def run() -> None:
        try:
            model.generate(input_ids, streamer=handing, stopping_criteria=criteria, **arguments)
            handing.steps.put(None)
        except BaseException as error:
            handing.steps.put(error)

    # In the caller's context: a backend forced by `use_backend` holds in the thread too.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    thread.start()
    try:
        while (step := handing.steps.get()) is not None:
            if isinstance(step, BaseException):
                raise step
            yield step
            handing.asked.release()
    finally:
        handing.is_closed = True
        handing.asked.release()
        thread.join()
