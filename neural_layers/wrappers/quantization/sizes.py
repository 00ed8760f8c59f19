"""What a model costs in each scheme, and what it loses: bytes, time, error, quality."""

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from neural_layers.timing import percentiles, take_turns
from neural_layers.wrappers.modules import tensor_bytes
from neural_layers.wrappers.quantization.plan import Plan
from neural_layers.wrappers.quantization.table import lines
from neural_layers.wrappers.quantization.trials import as_batches, evaluating, logits, quantized_shell, rows, run

Metric = Callable[[Any], "float | Mapping[str, float]"]


@dataclass(frozen=True)
class SizeRow:
    """bytes: of parameters and buffers, shared memory once. file_bytes: of their safetensors file. ratio: bytes of the
    first row / bytes. latency_ms: {"p50", "p95", "p99"} of a call. throughput: examples (rows of a batch) per second.
    error: root mean square of the difference of the logits from the first row's, over that of those. quality: of the
    metric."""

    name: str
    bytes: int
    file_bytes: int
    ratio: float
    latency_ms: dict[str, float]
    throughput: float
    error: float
    quality: dict[str, float]


@dataclass(frozen=True)
class SizeTable:
    """rows: the model as it is, then each scheme. `str()` is a table, `to_dict()` what JSON takes."""

    rows: tuple[SizeRow, ...]

    def __getitem__(self, name: str) -> SizeRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"the table has no row {name!r}; it has {', '.join(row.name for row in self.rows)}")

    def to_dict(self) -> dict[str, Any]:
        """{"rows": [{"name", "bytes", …}, …]}."""
        return {"rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        metrics = list(self.rows[0].quality)
        head = ("scheme", "MB", "file MB", "ratio", "ms p50", "p95", "p99", "examples/s", "error", *metrics)
        cells = [
            (
                row.name,
                f"{row.bytes / 1e6:.3f}",
                f"{row.file_bytes / 1e6:.3f}",
                f"{row.ratio:.2f}",
                *(f"{row.latency_ms[share]:.2f}" for share in ("p50", "p95", "p99")),
                f"{row.throughput:.4g}",
                f"{row.error:.2%}",
                *(f"{row.quality[metric]:.5g}" for metric in metrics),
            )
            for row in self.rows
        ]
        return lines([head, *cells])


def compare_sizes(
    model: nn.Module,
    schemes: Iterable[str] | Mapping[str, str | Plan | Mapping[str, Any] | nn.Module],
    *,
    inputs: Iterable[Any],
    metric: Metric | None = None,
    calibration: Iterable[Any] | None = None,
    rounds: int = 20,
) -> SizeTable:
    """Quantize copies of `model` by each scheme, and measure them side by side; `model` stays as it is.

    schemes:     names of `quantize`; or {name of the row: a scheme, a Plan, `quantize`'s arguments as a dict such as
                 {"scheme": "nf4", "double_quant": True}, or a model that was quantized before}
    inputs:      batches: a dict is `model(**batch)`, a tuple or list `model(*batch)`, a tensor `model(batch)`.
                 The error of the logits is over all of them; they are timed in turn, `rounds` calls for each model, but
                 each batch at least once. In a round every scheme has its turn before the next batch comes, because a
                 busy machine slows all of them.
    metric:      the quality of a model: a number, or several by name
    calibration: batches for int8_static

    Models run in evaluation mode without gradients. Percentiles of few rounds are close to the slowest call.
    Raises InputError where there are no batches or outputs are not finite, ValueError for a scheme that the model
    cannot take, for one that is given twice, for rounds below 1 and for a quality that is not finite.
    """
    batches = as_batches("inputs", inputs)
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    held = None if calibration is None else as_batches("calibration", calibration)
    models = {_dtype(model): model}
    for name, how in _named(schemes).items():
        if name in models:
            raise ValueError(f"the row {name!r} is there twice; the model as it is has one already, name each once")
        models[name] = _made(model, name, how, held)
    with evaluating(*models.values()):
        errors = _errors(models, batches)
        quality = {name: _quality(metric, name, one) for name, one in models.items()}
        calls = {name: _caller(one) for name, one in models.items()}
        examples = [batches[i % len(batches)] for i in range(max(rounds, len(batches)))]
        seconds = take_turns(calls, examples)
    first, count = tensor_bytes(model), sum(map(rows, examples))
    return SizeTable(
        tuple(
            SizeRow(
                name,
                tensor_bytes(one),
                file_bytes(one),
                round(first / max(tensor_bytes(one), 1), 4),
                percentiles(seconds[name]),
                round(count / max(sum(seconds[name]), 1e-9), 3),
                errors[name],
                quality[name],
            )
            for name, one in models.items()
        )
    )


def file_bytes(model: nn.Module) -> int:
    """The size of a safetensors file of the model's state, in which what several modules share stands once."""
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, int]] = set()
    for name, tensor in model.state_dict().items():
        place = tensor.data_ptr(), tensor.numel()
        if tensor.numel() == 0 or place not in seen:
            tensors[name] = tensor.contiguous()
        seen.add(place)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        return path.stat().st_size


def _named(schemes: Any) -> dict[str, Any]:
    if isinstance(schemes, Mapping):
        return dict(schemes)
    names = [schemes] if isinstance(schemes, str) else list(schemes)
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(f"schemes[{i}] is a {type(name).__name__}; give names, or a dict of names to schemes")
        if name in names[:i]:
            raise ValueError(f"the scheme {name!r} is there twice; name each once")
    return {name: name for name in names}


def _made(model: nn.Module, name: str, how: Any, calibration: list[Any] | None) -> nn.Module:
    if isinstance(how, nn.Module):
        return how
    options = dict(how) if isinstance(how, Mapping) else {"scheme": how}
    if "scheme" not in options:
        raise ValueError(f"the row {name!r} has no 'scheme'; give the arguments of quantize")
    options.setdefault("calibration", calibration)
    return quantized_shell(model, options.pop("scheme"), **options)


def _dtype(model: nn.Module) -> str:
    """The name of the model's own row: the dtype of most of its weights."""
    counts: dict[str, int] = {}
    for parameter in model.parameters():
        name = str(parameter.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + parameter.numel()
    return max(counts, key=lambda name: counts[name], default="unchanged")


def _errors(models: Mapping[str, nn.Module], batches: list[Any]) -> dict[str, float]:
    squares, total = dict.fromkeys(models, 0.0), 0.0
    (_, original), *others = models.items()
    for batch in batches:
        expected = logits(original, batch).double()
        total += float(expected.square().sum())
        for name, one in others:
            squares[name] += float((logits(one, batch).double() - expected).square().sum())
    return {name: math.sqrt(square / total) if total else 0.0 for name, square in squares.items()}


def _quality(metric: Metric | None, name: str, model: nn.Module) -> dict[str, float]:
    if metric is None:
        return {}
    found = metric(model)
    quality = {str(k): float(v) for k, v in found.items()} if isinstance(found, Mapping) else {"quality": float(found)}
    for what, value in quality.items():
        if not math.isfinite(value):
            raise ValueError(f"the metric gives {what}={value} for {name}; it must be finite")
    return quality


def _caller(model: nn.Module) -> Callable[[Any], Any]:
    return lambda batch: run(model, batch)
