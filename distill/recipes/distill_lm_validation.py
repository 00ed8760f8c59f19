"""How well a language model predicts a text, window by window, beside its teacher.

Letters: B batch, T length, N labels that count, V vocabulary.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neural_layers.distill.data.batches import IGNORED_LABEL
from neural_layers.distill.tasks import CausalTask
from neural_layers.distill.text.packing import Packed
from neural_layers.distill.text.store import TokenStore
from neural_layers.distill.validation.language import batched, windows
from neural_layers.distill.validation.measures import Array, Measure, quotient
from neural_layers.distill.validation.recording import RecordingValidator, Resampling, digest, fingerprint

COMPARED = ("loss", "bits_per_byte")
_ROWS, _TOKENS = 512, 4096


class LanguageTest:
    """A text, cut into windows that together predict every token once, but for the first of each document.

    store, context: the text and how long the windows are; vocab_size: V, whose logarithm the first token of a document
    costs in `bits_per_byte`, so that this is the length of a code for the whole text
    """

    def __init__(self, store: TokenStore, context: int, vocab_size: int) -> None:
        self.store, self.context, self.vocab_size = store, context, vocab_size
        self.windows = list(windows(store, context))
        self.batch_size = max(1, _TOKENS // context)

    def sums(self, model: nn.Module) -> Array:
        """(windows, 2): of each the sum of −ln p, and over how many tokens."""
        return score(model, self.windows, self.batch_size)

    def measures(self, sums: Array) -> dict[str, Measure]:
        """`loss`, `perplexity` and `bits_per_byte`, whose examples are the windows.

        A window's share of the bytes and of the documents is taken to be that of the tokens, which is exact for the
        whole text and close for samples of it.
        """
        share = sums[:, 1] / max(sums[:, 1].sum(), 1.0)
        nats = sums[:, 0] + share * len(self.store.starts) * math.log(self.vocab_size)
        bits = np.stack([nats / math.log(2), share * self.store.text_bytes], axis=-1)
        return {
            "loss": Measure("loss", sums, quotient, higher_is_better=False),
            "perplexity": Measure("perplexity", sums, _perplexity, higher_is_better=False),
            "bits_per_byte": Measure("bits_per_byte", bits, quotient, higher_is_better=False),
        }

    @property
    def name(self) -> str:
        """What the text and the windows hash to."""
        tokens = hashlib.sha256(np.asarray(self.store.tokens, dtype="<i8").tobytes()).hexdigest()
        return digest([tokens, repr(self.store.starts.tolist()), str(self.context), str(self.vocab_size)])


def _perplexity(sums: Array) -> Array:
    return np.exp(np.minimum(quotient(sums), 700.0))


@torch.no_grad()
def score(model: nn.Module, sequences: Iterable[Packed], batch_size: int) -> Array:
    """(sequences, 2): of each the sum of −ln p over its labels that count, and their number."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    found = []
    for batch in batched(iter(sequences), batch_size):
        found.append(_sums(model, {name: value.to(device) for name, value in batch.items()}))
    model.train(was_training)
    return torch.cat(found).numpy()


def _sums(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    task = CausalTask()
    labels = task.labels(batch)
    counted = labels != IGNORED_LABEL
    outputs = task.outputs(model, batch, with_states=False)
    rows = outputs.hidden if outputs.logits is None else outputs.logits
    assert rows is not None
    losses = [torch.zeros(0, device=labels.device)]
    for part, targets in zip(rows[counted].split(_ROWS), labels[counted].split(_ROWS), strict=True):
        logits = part if outputs.head is None else F.linear(part, outputs.head)
        losses.append(F.cross_entropy(logits.float(), targets, reduction="none"))
    owners = counted.nonzero()[:, 0].cpu()
    nats = torch.zeros(len(labels), dtype=torch.float64).index_add_(0, owners, torch.cat(losses).double().cpu())
    return torch.stack([nats, counted.sum(dim=1).double().cpu()], dim=-1)


class LanguageTeacherValidator(RecordingValidator):
    """Scores a language model on a text, beside its teacher; keeps and compares validations as `RecordingValidator`.

    A file also holds the sum of −ln p and the number of tokens of every window (`windows`). The teacher reads the text
    once, and `folder/teacher.json` keeps its sums. teacher: None for a validation of the model alone
    """

    def __init__(self, test: LanguageTest, folder: Path, teacher: nn.Module | None, resampling: Resampling) -> None:
        super().__init__(folder, test.name, COMPARED, resampling)
        self.test, self.teacher = test, teacher
        self._teachers: dict[str, Measure] | None = None

    def validate(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Measure], dict[str, Measure] | None]:
        sums = self.test.sums(model)
        return {"windows": sums.tolist()}, self.test.measures(sums), self.teacher_measures()

    def restore(self, record: dict[str, Any]) -> dict[str, Measure]:
        return self.test.measures(np.array(record["windows"], dtype=np.float64))

    def teacher_measures(self) -> dict[str, Measure] | None:
        """The teacher's measures of the text."""
        teacher = self.teacher
        if teacher is not None and self._teachers is None:
            made_by = {"data": self.data, "teacher": fingerprint(teacher)}
            kept = self.teacher_record(made_by, lambda: {"windows": self.test.sums(teacher).tolist()})
            self._teachers = self.restore(kept)
        return self._teachers


def worst_windows(ours: Array, theirs: Array, count: int) -> Sequence[int]:
    """The windows on which the student's loss is above its teacher's by most."""
    gap: Sequence[int] = np.argsort(-(quotient(ours) - quotient(theirs)), kind="stable")[:count].tolist()
    return gap
