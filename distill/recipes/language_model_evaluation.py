"""How well and how fast a trained language model reads a text: `neural-layers evaluate`."""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from neural_layers.distill.text.reading import ReadingOptions
from neural_layers.distill.text.sampling import check_length
from neural_layers.distill.text.sources import Part, parse_sources
from neural_layers.distill.text.store import default_cache, open_store
from neural_layers.distill.validation.language import TextScorer, batched, windows
from neural_layers.errors import InputError
from neural_layers.models.loading import load_language_model


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of `neural-layers evaluate`.

    model:   a folder with a hybrid model and its tokenizer. data: a source, as in training (a folder that divides its
             files is read for validation)
    context: tokens of a sequence, by default as many as the model takes; stride: how far a sequence begins behind the
             last, by default context − 1; batch: sequences of a forward pass
    """

    model: Path
    data: str
    context: int | None = None
    stride: int | None = None
    batch: int = 8
    text_field: str = "text"
    document_separator: str | None = None
    cache: Path | None = None


def evaluate_language_model(options: EvaluationOptions) -> dict[str, Any]:
    """Loss, perplexity, bits per byte, tokens/s, peak memory and the loss by position of a model on a text.

    Raises InputError for input that a person can mend.
    """
    (source,) = parse_sources([options.data])
    parts: tuple[Part, ...] = source.valid or source.parts
    model, tokenizer = load_language_model(options.model)
    context, stride = _window(options, model.config.max_position_embeddings)
    reading = ReadingOptions(options.text_field, options.document_separator)
    store = open_store(parts, tokenizer, reading, options.cache or default_cache())
    if len(store) < 2:
        check_length(len(store), 2, options.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    scorer = TextScorer(model, device, context)
    read, started = 0, time.perf_counter()
    total = 1 + max(0, len(store) - context + stride - 1) // stride
    with tqdm(total=total, desc="evaluate", unit="sequence", leave=False) as bar:
        for inputs in batched(windows(store, context, stride), options.batch):
            scorer.add(inputs)
            read += inputs["input_ids"].numel()
            bar.update(len(inputs["input_ids"]))
    seconds = time.perf_counter() - started
    score = scorer.score(len(store.starts), store.text_bytes)
    return {
        "model": str(options.model),
        "data": options.data,
        "context": context,
        "stride": stride,
        "tokens": score.predicted,
        "unknown_tokens": store.count(tokenizer.unk_token_id),
        "documents": score.documents,
        "text_bytes": score.text_bytes,
        **score.metrics(),
        "tokens_per_second": round(read / seconds, 1),
        "peak_memory_mib": round(_peak_memory(device) / 2**20, 1),
        "loss_by_position": scorer.by_position(),
    }


def _window(options: EvaluationOptions, longest: int) -> tuple[int, int]:
    context = longest if options.context is None else options.context
    if context < 2 or context > longest:
        raise InputError(f"--context {context} must lie between 2 and {longest}, the longest that the model takes")
    stride = context - 1 if options.stride is None else options.stride
    if not 1 <= stride < context:
        raise InputError(f"--stride {stride} must lie between 1 and {context - 1}, one less than the context")
    if options.batch < 1:
        raise InputError(f"--batch {options.batch} must be at least 1")
    return context, stride


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where the model is on one, else the most that this process ever had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run_tasks(model: Path, tasks: Sequence[str], batch: int) -> dict[str, Any]:
    """The results of tasks of the `lm-eval` harness, by its `hf` model type.

    Raises: ImportError that names what to install where it is missing; InputError where a task is unknown.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise ImportError("--tasks needs the lm-eval harness, which is missing; pip install 'lm-eval[hf]'") from error
    load_language_model(model)  # its errors are told better than the harness would
    try:
        found = lm_eval.simple_evaluate(
            model="hf", model_args={"pretrained": str(model)}, tasks=list(tasks), batch_size=batch
        )
    except (KeyError, ValueError) as error:
        raise InputError(f"--tasks {','.join(tasks)}: {error}; see lm-eval ls tasks for their names") from error
    return dict(found["results"])


def print_evaluation(report: dict[str, Any]) -> None:
    """Print the figures and the loss by position."""
    from rich.console import Console
    from rich.table import Table

    console, table = Console(), Table(show_header=False)
    rows = (
        ("loss", f"{report['loss']:.4f}"),
        ("perplexity", f"{report['perplexity']:.4f}"),
        ("bits per byte", f"{report['bits_per_byte']:.4f}"),
        ("tokens", f"{report['tokens']:,}"),
        ("unknown tokens", f"{report['unknown_tokens']:,}"),
        ("tokens/s", f"{report['tokens_per_second']:,.0f}"),
        ("peak memory", f"{report['peak_memory_mib']:,.0f} MiB"),
    )
    for row in rows:
        table.add_row(*row)
    console.print(table)
    positions = Table("tokens before it", "loss", "tokens")
    for entry in report["loss_by_position"]:
        positions.add_row(f"{entry['first']}–{entry['last']}", f"{entry['loss']:.4f}", f"{entry['tokens']:,}")
    console.print(positions)
