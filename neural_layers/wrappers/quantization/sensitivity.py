"""How much each layer alone moves the logits when its bits are taken."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neural_layers.wrappers.quantization.calibration import feed
from neural_layers.wrappers.quantization.ladder import Ladder
from neural_layers.wrappers.quantization.trials import logits

# {layer: {rung: divergence}}
Sensitivity = dict[str, dict[str, float]]


def measure(ladder: Ladder, batches: list[Any]) -> Sensitivity:
    """The divergence from the model's own output, for each layer lowered alone to each rung that it can take.

    Where the output has `logits`: mean KL(softmax(own) ‖ softmax(lowered)) in nats over the positions that count: those
    with a label that is not −100, else those of the attention mask, where their shape is that of the positions;
    otherwise all. For other outputs the squared difference over the squared output. One pass over `batches` for each
    layer and rung, without gradients; the model's own logits of all batches are held.
    """
    compare = _kl if hasattr(feed(ladder.model, batches[0]), "logits") else _squared
    own = [logits(ladder.model, batch) for batch in batches]
    return {
        layer: {rung: _divergence(ladder.build({layer: rung}), batches, own, compare) for rung in options}
        for layer, options in ladder.saved.items()
    }


def _divergence(
    lowered: nn.Module, batches: list[Any], own: list[Tensor], compare: Callable[..., tuple[float, float]]
) -> float:
    parts = [compare(logits(lowered, batch), before, batch) for batch, before in zip(batches, own, strict=True)]
    return sum(part for part, _ in parts) / max(sum(weight for _, weight in parts), 1e-30)


def _kl(found: Tensor, own: Tensor, batch: Any) -> tuple[float, float]:
    log_p, log_q = F.log_softmax(own.float(), dim=-1), F.log_softmax(found.float(), dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    counted = _counted(batch, divergence)
    return float(divergence[counted].double().sum()), float(counted.sum())


def _counted(batch: Any, positions: Tensor) -> Tensor:
    if isinstance(batch, Mapping):
        for name in ("labels", "decoder_attention_mask", "attention_mask"):
            given = batch.get(name)
            if isinstance(given, Tensor) and given.shape == positions.shape:
                return given != -100 if name == "labels" else given.bool()
    return torch.ones_like(positions, dtype=torch.bool)


def _squared(found: Tensor, own: Tensor, batch: Any) -> tuple[float, float]:
    return float((found.double() - own.double()).square().sum()), float(own.double().square().sum())
