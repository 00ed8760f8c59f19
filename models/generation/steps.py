"""One token after another out of `generate`'s own preparation, in steps that can be paused.

Letters: B batch (here 1), T length, V vocabulary.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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

    Whenever a step has been given out, the cache has read all tokens but its last; with `contrastive_tokens` too.
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
    """The token of each step of contrastive search. Raises InputError as `contrastive_search` does."""
    p = prepared
    steps = ContrastiveSteps(p.model, p.input_ids, p.processors, p.criteria, p.config, p.model_kwargs)
    return ([int(token_B)] for token_B in steps)
