"""A teacher's largest logits on disk, and training from them."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from neural_layers.distill.losses import DistillationLoss, Outputs
from neural_layers.distill.teacher_cache import TeacherCache, build_cache
from neural_layers.errors import InputError

VOCABULARY = 12


class Tagger(nn.Module):
    """Tokens to logits of tokens."""

    def __init__(self, seed: int, width: int = 6, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.head.weight, std=2.0)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.embedding(ids).tanh())


@dataclass
class Task:
    """`per_token`: labels (B, T), else one for each example; `with_head`: hidden states and head, else logits."""

    per_token: bool = True
    with_head: bool = True

    def labels(self, batch):
        return batch["labels"] if self.per_token else batch["labels"][:, 0]

    def outputs(self, model, batch, with_states):
        assert not with_states
        hidden = model(batch["input_ids"])
        if not self.per_token:
            mask = (batch["labels"] != -100).unsqueeze(-1)
            hidden = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        if self.with_head:
            return Outputs(hidden=hidden, head=model.head.weight)
        return Outputs(logits=model.head(hidden))


def make_examples(count: int = 7, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (1 + i % 4,), generator=generator).tolist() for i in range(count)]


def collate(rows):
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "labels": labels}


def build(folder, task=None, teacher=None, examples=None, **options):
    teacher, examples = teacher or Tagger(0), examples or make_examples()
    return build_cache(
        folder, task or Task(), teacher, examples, collate, **{"k": 4, "temperature": 2.0, "batch_size": 3, **options}
    )


def as_trained(cache, task, student, teacher, examples, numbers, **options):
    """(loss from the cache, exact loss) of a batch of these examples."""
    batch = {**collate([examples[i] for i in numbers]), "index": torch.tensor(numbers)}
    labels, loss = task.labels(batch), DistillationLoss(temperature=2.0, **options)
    student, teacher = (task.outputs(model.eval(), batch, False) for model in (student, teacher))
    return loss(student, labels, cache.outputs(batch["index"], labels))[0], loss(student, labels, teacher)[0]


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize(("k", "logits"), [(12, "float32"), (99, "float16")])
def test_a_cache_of_all_entries_is_exact(tmp_path, per_token, with_head, k, logits) -> None:
    task, teacher, examples = Task(per_token, with_head), Tagger(0), make_examples()
    cache = build(tmp_path / "c", task, teacher, k=k, logits=logits)
    assert cache.k == VOCABULARY
    for numbers in ([0, 1, 2], [6, 3, 3, 5]):  # in any order, and again
        cached, exact = as_trained(cache, task, Tagger(1), teacher, examples, numbers)
        assert cached.item() == pytest.approx(exact.item(), rel=1e-5 if logits == "float32" else 2e-3)
    assert cache.meta["error"]["outside_max"] == 0


def test_a_small_cache_is_close_and_never_above(tmp_path) -> None:
    task, teacher, examples = Task(), Tagger(0), make_examples()
    gaps = []
    for k in (1, 4, 8):
        cache = build(tmp_path / str(k), task, teacher, k=k, logits="float32")
        cached, exact = as_trained(cache, task, Tagger(1), teacher, examples, [1, 3, 5], beta=0.0)
        gaps.append((exact - cached).item())
    assert gaps[0] > gaps[1] > gaps[2] > 0


def test_what_is_stored_are_the_teachers_largest_logits_and_the_mass_outside(tmp_path) -> None:
    teacher, examples = Tagger(0).eval(), make_examples()
    cache = build(tmp_path / "c", teacher=teacher, examples=examples, logits="float32")
    rows = cache.rows(torch.tensor([2]), torch.tensor([3]))
    with torch.no_grad():
        logits = teacher.head(teacher(torch.tensor(examples[2])))
    judge = logits.topk(4)
    assert torch.equal(rows.indices, judge.indices)
    torch.testing.assert_close(rows.logits, judge.values - judge.values[:, :1])
    mass = 1 - (logits / 2.0).softmax(-1).gather(-1, judge.indices).sum(-1)
    torch.testing.assert_close(rows.rest.exp(), mass)
    torch.testing.assert_close(rows.log_cells(torch.arange(3), torch.float64).exp().sum(-1), torch.ones(3).double())


@settings(derandomize=True, deadline=None, database=None, max_examples=15)
@given(batch_size=st.integers(1, 9))
def test_the_batch_size_changes_nothing(tmp_path_factory, batch_size) -> None:
    folder = tmp_path_factory.mktemp("cache")
    one, other = build(folder / "1", batch_size=1), build(folder / "n", batch_size=batch_size)
    for name in ("indices", "offsets"):
        assert (folder / "1" / f"{name}.bin").read_bytes() == (folder / "n" / f"{name}.bin").read_bytes()
    index = torch.arange(len(one))
    torch.testing.assert_close(one.rows(index).logits, other.rows(index).logits, atol=2e-3, rtol=2e-3)


def test_the_error_is_measured_told_and_kept(tmp_path, capsys) -> None:
    teacher, student = Tagger(0), Tagger(1)
    uniform = build(tmp_path / "u", teacher=teacher)
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert "the 4 largest of 12 logits at T=2, 16 rows of 7 examples" in told
    assert "T²·KL against the uniform distribution on 16 rows" in told
    error = json.loads((tmp_path / "u" / "meta.json").read_text())["error"]
    assert error == uniform.meta["error"]
    ids = torch.cat([torch.tensor(row) for row in make_examples()])
    with torch.no_grad():
        p = (teacher.eval().head(teacher(ids)) / 2).softmax(-1).double()
    outside = 1 - p.topk(4).values.sum(-1)
    assert error["outside_mean"] == pytest.approx(outside.mean().item(), rel=1e-4)
    assert error["outside_max"] == pytest.approx(outside.max().item(), rel=1e-4)
    exact = 4 * (p * (p * VOCABULARY).log()).sum(-1).mean().item()
    assert error["exact"] == pytest.approx(exact, rel=1e-4)
    assert 0 < error["cached"] < error["exact"]

    against = build(tmp_path / "s", teacher=teacher, student=student)
    assert against.meta["error"]["against"] == "student"
    assert against.meta["error"]["exact"] != pytest.approx(exact, rel=1e-2)


def test_a_cache_is_found_again_and_the_teacher_not_run(tmp_path) -> None:
    class Counting(Task):
        runs = 0

        def outputs(self, *args, **kwargs):
            self.runs += 1
            return super().outputs(*args, **kwargs)

    task = Counting()
    first = build(tmp_path / "c", task)
    runs, before = task.runs, (tmp_path / "c" / "meta.json").stat().st_mtime_ns
    again = build(tmp_path / "c", task, batch_size=5)
    assert runs > 0
    assert task.runs == runs
    assert (tmp_path / "c" / "meta.json").stat().st_mtime_ns == before
    assert again.meta == first.meta


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 3.0}, "built with temperature=2.0, and temperature=3.0 is wanted"),
        ({"k": 5}, "built with k=4, and k=5 is wanted"),
        ({"logits": "float32"}, "built with logits=float16, and logits=float32 is wanted"),
        ({"teacher": Tagger(7)}, "built with teacher="),
        ({"examples": make_examples(seed=1)}, "built with data="),
        ({"examples": make_examples(8)}, "built with data="),
    ],
)
def test_a_cache_of_something_else_is_refused_by_what_differs(tmp_path, change, message) -> None:
    build(tmp_path / "c")
    with pytest.raises(InputError, match=message):
        build(tmp_path / "c", **change)


def test_a_teacher_keeps_its_mode_and_does_not_drop_out(tmp_path) -> None:
    teacher = Tagger(0).train()
    one = build(tmp_path / "1", teacher=teacher)
    assert teacher.training
    other = build(tmp_path / "2", teacher=teacher.eval())
    index = torch.arange(len(one))
    assert torch.equal(one.rows(index).logits, other.rows(index).logits)


def test_a_run_that_fails_leaves_nothing_behind(tmp_path) -> None:
    def stop(done, total):
        assert total == 7
        if done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "c", progress=stop)
    assert not list(tmp_path.iterdir())
    build(tmp_path / "c")


class Broken(Task):
    def outputs(self, model, batch, with_states):
        outputs = super().outputs(model, batch, with_states)
        outputs.hidden[batch["index"] == 4] = math.nan
        return outputs


class Unlabelled(Task):
    def labels(self, batch):
        return torch.full_like(batch["labels"], -100)


class Changing(list):
    def in_epoch(self, row, epoch):
        return self[row]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0 and batch_size=3 must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive and finite"),
        ({"logits": "int8"}, "logits='int8' must be 'float16' or 'float32'"),
        ({"task": Broken()}, "logits of example 4 are not finite"),
        ({"task": Unlabelled()}, "none of the 7 examples has a label that counts"),
        ({"examples": Changing(make_examples())}, "change from epoch to epoch"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, options, message) -> None:
    with pytest.raises(InputError, match=message):
        build(tmp_path / "c", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else_is_refused_and_kept(tmp_path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no teacher cache"):
        build(tmp_path)
    assert (tmp_path / "note.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["indices", "logits", "rest", "offsets"])
def test_a_file_that_was_cut_is_named(tmp_path, name) -> None:
    build(tmp_path / "c")
    path = tmp_path / "c" / f"{name}.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{name}.bin has .* bytes and should have"):
        TeacherCache(tmp_path / "c")


def test_examples_that_do_not_fit_the_cache_are_named(tmp_path) -> None:
    cache = build(tmp_path / "c")
    with pytest.raises(ValueError, match="example 2 has 2 labels that count, and 3 rows"):
        cache.rows(torch.tensor([1, 2]), torch.tensor([2, 2]))
    with pytest.raises(ValueError, match="index goes from 0 to 7, and the teacher cache .* has 7 examples"):
        cache.rows(torch.tensor([0, 7]))


def test_training_at_another_temperature_is_refused(tmp_path) -> None:
    cache = build(tmp_path / "c", temperature=3.0)
    with pytest.raises(ValueError, match="temperature=2.0, and the teacher cache was built for 3.0"):
        as_trained(cache, Task(), Tagger(1), Tagger(0), make_examples(), [0, 1])
