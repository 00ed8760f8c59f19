"""What an export bought: bytes, times of a prompt and of a decoding step, and error of the logits, beside PyTorch.

Letters: B batch, T length, S source length, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neural_layers.errors import InputError
from neural_layers.models.export.onnx_model import OnnxModel
from neural_layers.models.export.stepper import Stepper
from neural_layers.models.export.translator import OnnxTranslator
from neural_layers.timing import percentiles, take_turns
from neural_layers.wrappers.modules import tensor_bytes
from neural_layers.wrappers.quantization.plan import Plan
from neural_layers.wrappers.quantization.table import lines

SHARES = ("p50", "p95", "p99")


@dataclass(frozen=True)
class ExportRow:
    """bytes: of the weights in memory for PyTorch, of the files for a graph. ratio: bytes of the first row / bytes.
    prefill_ms: of all logits of a prompt, or of sources and targets; step_ms: of one token with the state behind it:
    {"p50", "p95", "p99"}. error: root mean square of the logits' difference from the first row's, over that of those.
    agreement: share of positions where the likeliest token is the same."""

    name: str
    bytes: int
    ratio: float
    prefill_ms: dict[str, float]
    step_ms: dict[str, float]
    error: float
    agreement: float


@dataclass(frozen=True)
class ExportTable:
    """rows: PyTorch, then each graph. `str()` is a table, `to_dict()` what JSON takes."""

    rows: tuple[ExportRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """{"rows": [{"name", "bytes", …}, …]}."""
        return {"rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        times = [f"{kind} {share}" for kind in ("prefill ms", "step ms") for share in SHARES]
        head = ("form", "MB", "ratio", *(name.replace("ms p95", "p95").replace("ms p99", "p99") for name in times))
        cells = [
            (
                row.name,
                f"{row.bytes / 1e6:.3f}",
                f"{row.ratio:.2f}",
                *(f"{given[share]:.2f}" for given in (row.prefill_ms, row.step_ms) for share in SHARES),
                f"{row.error:.2%}",
                f"{row.agreement:.1%}",
            )
            for row in self.rows
        ]
        return lines([(*head, "error", "same token"), *cells])


@dataclass(frozen=True)
class Form:
    """A model that can be timed. prefill: all logits (B, T, V) of the given ids. step: reads one more token of the
    first row, from a state that goes on from call to call."""

    bytes: int
    prefill: Callable[[], np.ndarray]
    step: Callable[[], Any]


def compare_exports(
    model: Any,
    folders: Mapping[str, str | Path],
    *,
    others: Mapping[str, Any] | None = None,
    length: int = 128,
    batch: int = 1,
    rounds: int = 20,
) -> ExportTable:
    """Measure a model in PyTorch, and side by side the graphs that `export_onnx` made of it.

    model:   a `HybridForCausalLM` or `CVMForConditionalGeneration`, the first row; others: further ones by name
    folders: exports, by the names of their rows
    length:  tokens of the prompt, or of source and target, at most half of the context; they are drawn at random.
             A step has as many behind it. batch: rows that are read at once; a step reads one.
    rounds:  calls of each. In a round every form has its turn, because a busy machine slows all of them.

    All run on as many threads as torch does. Percentiles of few rounds are close to the slowest call.
    Raises InputError for folders that hold no export of such a model, and for numbers below 1.
    """
    for name, value in (("length", length), ("batch", batch), ("rounds", rounds)):
        if value < 1:
            raise InputError(f"{name}={value} must be at least 1")
    length = max(1, min(length, model.config.max_position_embeddings // 2))
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=random)
    make_torch, make_onnx = (_cvm, _onnx_cvm) if model.config.is_encoder_decoder else (_hybrid, _onnx_hybrid)
    models = {f"PyTorch {bits_of(model)}": model, **(others or {})}
    modes = [(one, one.training) for one in models.values()]
    try:
        with torch.no_grad():
            forms = {name: make_torch(one.eval(), ids) for name, one in models.items()}
            forms |= {name: make_onnx(Path(folder), ids.numpy()) for name, folder in folders.items()}
            return _measured(forms, min(rounds, model.config.max_position_embeddings - length - 1))
    finally:
        for one, mode in modes:
            one.train(mode)


def _measured(forms: Mapping[str, Form], steps: int) -> ExportTable:
    prefill = take_turns({name: _ignoring(form.prefill) for name, form in forms.items()}, range(steps))
    step = take_turns({name: _ignoring(form.step) for name, form in forms.items()}, range(steps))
    first = next(iter(forms.values()))
    wanted, rows = first.prefill(), []
    scale = max(float(np.square(wanted, dtype=np.float64).mean()), 1e-300)
    for name, form in forms.items():
        found = form.prefill()
        error = float(np.sqrt(np.square(found - wanted, dtype=np.float64).mean() / scale))
        same = float((found.argmax(-1) == wanted.argmax(-1)).mean())
        times = percentiles(prefill[name]), percentiles(step[name])
        rows.append(ExportRow(name, form.bytes, first.bytes / form.bytes, *times, error, same))
    return ExportTable(tuple(rows))


def _ignoring(call: Callable[[], Any]) -> Callable[[int], Any]:
    return lambda turn: call()


def bits_of(model: Any) -> str:
    """The schemes of a model's quantized layers, or the dtype of a model without."""
    schemes = dict.fromkeys(entry["scheme"] for entry in Plan.of(model).layers.values())
    return ", ".join(schemes) or str(next(model.parameters()).dtype).removeprefix("torch.")


def _hybrid(model: Any, ids: torch.Tensor) -> Form:
    cache = model(ids[:1], use_cache=True).past_key_values
    return Form(
        tensor_bytes(model),
        lambda: _numpy(model(ids, use_cache=False).logits),
        lambda: model(ids[:1, :1], past_key_values=cache, use_cache=True),
    )


def _cvm(model: Any, ids: torch.Tensor) -> Form:
    one, mask = ids[:1], torch.ones_like(ids[:1])
    encoded = model.encoder(one, mask)
    known = {"encoder_outputs": encoded, "attention_mask": mask, "use_cache": True}
    cache = model(decoder_input_ids=one, **known).past_key_values
    return Form(
        tensor_bytes(model),
        lambda: _numpy(model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids).logits),
        lambda: model(decoder_input_ids=one[:, :1], past_key_values=cache, **known),
    )


def _numpy(logits: torch.Tensor) -> np.ndarray:
    found: np.ndarray = logits.float().cpu().numpy()
    return found


def _onnx_hybrid(folder: Path, ids: np.ndarray) -> Form:
    served = OnnxModel(folder, threads=torch.get_num_threads())
    _, state = served.forward(ids[:1], keep=1)
    stepper = Stepper(served.session, state)
    return Form(file_bytes(folder), lambda: served.forward(ids)[0], lambda: stepper(ids[:1, :1]))


def _onnx_cvm(folder: Path, ids: np.ndarray) -> Form:
    served, mask = OnnxTranslator(folder, threads=torch.get_num_threads()), np.ones_like(ids)

    def prefill() -> np.ndarray:
        context = served.encoder.run(ids, mask)
        return served.decoder.run(ids, mask, served.decoder.start(len(ids)), ids.shape[1], **context)[0]

    context = served.encoder.run(ids[:1], mask[:1])
    _, state = served.decoder.run(ids[:1], mask[:1], served.decoder.start(1), 1, **context)
    stepper = Stepper(served.decoder, state, **context)
    return Form(file_bytes(folder), prefill, lambda: stepper(ids[:1, :1]))


def file_bytes(folder: Path) -> int:
    """Bytes of the graphs in a folder and of their weights."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".onnx", ".data"))
