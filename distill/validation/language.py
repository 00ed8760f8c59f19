"""How well a language model predicts a text: loss, perplexity, bits per byte, loss by position."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neural_layers.distill.files import save_json
from neural_layers.distill.text.packing import IGNORED, Packed, pack
from neural_layers.distill.text.sampling import collate
from neural_layers.distill.text.store import TokenStore
from neural_layers.distill.validation.measures import Array, Measure, quotient
from neural_layers.errors import InputError


@dataclass(frozen=True)
class TextScore:
    """The sum of −ln p over the tokens of a text that something predicts, and what it is divided by.

    nats:       the sum
    predicted:  how many tokens those are: all but the first of each document
    documents:  how many documents there are
    text_bytes: their length in UTF-8
    vocab_size: entries of the vocabulary; the first token of a document, which nothing predicts, costs ln of it in
                `bits_per_byte`, so that this is the length of a code for the whole text
    """

    nats: float
    predicted: int
    documents: int
    text_bytes: int
    vocab_size: int

    @property
    def loss(self) -> float:
        """Mean −ln p of the predicted tokens."""
        return self.nats / max(self.predicted, 1)

    def metrics(self) -> dict[str, float]:
        """`loss`, `perplexity` (exp of the loss) and `bits_per_byte`."""
        nats = self.nats + self.documents * math.log(self.vocab_size)
        perplexity = math.exp(min(self.loss, 700.0))
        return {"loss": self.loss, "perplexity": perplexity, "bits_per_byte": nats / self.text_bytes / math.log(2)}


def windows(store: TokenStore, context: int, stride: int | None = None) -> Iterator[Packed]:
    """The sequences that together predict every token of the store once, but for the first of each document.

    A sequence begins every `stride` tokens (by default context − 1), and labels are −100 where an earlier sequence has
    them. With a smaller stride a token has at least context − stride − 1 tokens before it, in documents that long.
    """
    stride = context - 1 if stride is None else stride
    counted, begin, length = 0, 0, len(store)
    while counted < length:
        end = min(begin + context, length)
        first, last = np.searchsorted(store.starts, [begin, end])
        packed = pack(store.tokens[begin:end], store.starts[first:last] - begin)
        labels = packed.labels.copy()
        labels[: max(counted - begin, 0)] = IGNORED
        yield Packed(packed.input_ids, labels, packed.seq_idx, packed.position_ids)
        counted, begin = end, begin + stride


def batched(sequences: Iterator[Packed], batch: int) -> Iterator[dict[str, Tensor]]:
    """Batches of equally long sequences; the last of a text, which may be shorter, comes alone."""
    waiting: list[Packed] = []
    for sequence in sequences:
        if waiting and (len(waiting) == batch or len(waiting[0].input_ids) != len(sequence.input_ids)):
            yield collate(waiting)
            waiting = []
        waiting.append(sequence)
    if waiting:
        yield collate(waiting)


class TextScorer:
    """Adds up −ln p of every predicted token, and apart by how many tokens of its document came before it.

    model: with `model` and `lm_head`, as `HybridForCausalLM` has. device: where it is. context: the longest sequence
    """

    def __init__(self, model: Any, device: torch.device, context: int) -> None:
        self.model, self.device = model, device
        # Positions 1, 2–3, 4–7, …: each twice as long as the last.
        self._nats = torch.zeros(max(context - 1, 1).bit_length(), dtype=torch.float64)
        self._counts = torch.zeros_like(self._nats)
        self._context = context

    @torch.no_grad()
    def add(self, inputs: dict[str, Tensor]) -> None:
        """Score a batch as `batched` gives it."""
        labels = inputs["labels"][:, 1:]
        own = {name: value.to(self.device) for name, value in inputs.items() if name != "labels"}
        hidden = self.model.model(**own).last_hidden_state[:, :-1]
        position = inputs.get("position_ids", torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"]))
        is_counted = labels != IGNORED
        losses = [
            torch.nn.functional.cross_entropy(self.model.lm_head(states).float(), targets, reduction="none").cpu()
            for states, targets in zip(
                hidden[is_counted.to(self.device)].split(1024),
                labels[is_counted].to(self.device).split(1024),
                strict=True,
            )
        ]
        if losses:
            bucket = position[:, 1:][is_counted].double().log2().floor().long()
            self._nats.index_add_(0, bucket, torch.cat(losses).double())
            self._counts.index_add_(0, bucket, torch.ones(len(bucket), dtype=torch.float64))

    def score(self, documents: int, text_bytes: int) -> TextScore:
        """The sum so far, of a text of so many documents and bytes."""
        predicted, vocab_size = int(self._counts.sum()), self.model.config.vocab_size
        return TextScore(float(self._nats.sum()), predicted, documents, text_bytes, vocab_size)

    def by_position(self) -> list[dict[str, float]]:
        """The mean loss of the tokens that had `first` to `last` tokens of their document before them."""
        return [
            {
                "first": 2**i,
                "last": min(2 ** (i + 1), self._context) - 1,
                "loss": float(nats / count),
                "tokens": int(count),
            }
            for i, (nats, count) in enumerate(zip(self._nats.tolist(), self._counts.tolist(), strict=True))
            if count
        ]


class LanguageValidator:
    """`validate(model, step) → metrics` of a text, by the model's own loss; every process takes a share of it.

    store, context, batch: the text, and how long and how many the sequences of a forward pass are
    vocab_size: as in `TextScore`
    device:     where the batches go
    rank, world: the process, and how many share the work
    folder:     where `step-<n>.json` is written with the metrics; None for nowhere

    measures: of the last call: `loss`, of whose examples each is a batch of windows
    """

    def __init__(
        self,
        store: TokenStore,
        context: int,
        batch: int,
        vocab_size: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        folder: Path | None = None,
    ) -> None:
        self.store, self.context, self.batch, self.vocab_size = store, context, batch, vocab_size
        self.device, self.rank, self.world, self.folder = device, rank, world, folder
        self.measures: dict[str, Measure] = {}

    @torch.no_grad()
    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        sums: list[Tensor] = []
        own: dict[str, Tensor] = {}
        for number, inputs in enumerate(batched(windows(self.store, self.context), self.batch)):
            sums.append(torch.zeros(2, dtype=torch.float64))
            if number % self.world == self.rank:
                own = inputs
                sums[-1] = self._sums(model, inputs)
        rounds = len(sums)
        if self.world > 1 and rounds % self.world and self.rank >= rounds % self.world:
            # Where parameters are split over the processes, all of them must call the model equally often.
            self._sums(model, own or inputs)
        each = torch.stack(sums)
        if self.world > 1:
            each = each.to(self.device)
            torch.distributed.all_reduce(each)
        nats, predicted = each.sum(dim=0).tolist()
        score = TextScore(nats, int(predicted), len(self.store.starts), self.store.text_bytes, self.vocab_size)
        metrics = score.metrics()
        if self.folder is not None:
            save_json(self.folder / f"step-{step}.json", {"step": step, **metrics, "batches": each.tolist()})
        self.measures = _measures(each.cpu().numpy())
        return metrics

    def load(self, step: int) -> dict[str, Measure]:
        """The measures of an earlier step, out of its file.

        Raises InputError where that is missing or broken, ValueError where validations are kept nowhere.
        """
        if self.folder is None:
            raise ValueError(f"no validation of step {step}: they are kept nowhere; give a folder")
        path = self.folder / f"step-{step}.json"
        try:
            return _measures(np.array(json.loads(path.read_text(encoding="utf-8"))["batches"], dtype=np.float64))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: no validation to compare with ({error}); validate that step again") from error

    def set_best(self, step: int | None) -> None:
        """Which step counts as the best; nothing is compared with it here."""

    def _sums(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        counted = int((inputs["labels"][:, 1:] != IGNORED).sum())
        if not counted:
            inputs["labels"] = inputs["input_ids"]
        loss = model(**inputs, skip_logits=True).loss.double().item()
        return torch.tensor([loss * counted if counted else 0.0, counted], dtype=torch.float64)


def _measures(batches: Array) -> dict[str, Measure]:
    """Of (batches, 2): the sum of −ln p of each, and over how many tokens."""
    return {"loss": Measure("loss", batches, quotient, higher_is_better=False)}
