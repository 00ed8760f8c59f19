"""A trained model made smaller by bits, measured beside what it was, and written where it can be loaded again."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neural_layers.distill.files import replacing, save_json
from neural_layers.distill.recipes.quantizing_subjects import Data, Subject, load_subject
from neural_layers.errors import InputError
from neural_layers.wrappers.quantization import (
    Progressive,
    SizeTable,
    compare_sizes,
    progressive_quantize,
    quantize,
    save_quantized,
)
from neural_layers.wrappers.quantization.ladder import rung_options
from neural_layers.wrappers.quantization.trials import shell

NEEDS_CALIBRATION = "int8_static"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)


@dataclass(frozen=True)
class QuantizingOptions:
    """The options of `neural-layers quantize`.

    model:   the folder of a hybrid language model, a CVM translator, or a language model or classifier of transformers
    scheme:  of `quantize`, with double_quant, block_size, observer, exclude and embeddings as there; None where
             `progressive` lowers layer by layer down `ladder`, to `target_mb` (10⁶ bytes) or the `floor` of the score
    data:    what is measured and calibrated on. chunks: of `progressive_quantize`. rounds: calls of each on the clock
    """

    model: Path
    out: Path
    data: Data
    scheme: str | None = None
    double_quant: bool = False
    block_size: int | None = None
    observer: str | None = None
    exclude: tuple[str, ...] = ()
    embeddings: bool = True
    progressive: bool = False
    ladder: tuple[str, ...] = ("bf16", "int8", "nf4")
    floor: float | None = None
    target_mb: float | None = None
    chunks: int = 10
    rounds: int = 20

    def check(self) -> None:
        """Raise InputError for options that do not go together."""
        if (self.scheme is None) == (not self.progressive):
            raise InputError("give --scheme NAME, or --progressive")
        if self.progressive and (self.double_quant or self.block_size or self.observer):
            raise InputError(
                "--double-quant, --block-size and --observer belong to --scheme; a rung of --ladder may be nf4-double"
            )
        if not self.progressive and (self.floor is not None or self.target_mb is not None):
            raise InputError("--floor and --target-mb belong to --progressive")
        calibrated = self.progressive or self.scheme == NEEDS_CALIBRATION
        if calibrated and self.data.calibration is None:
            what = "--progressive" if self.progressive else f"--scheme {self.scheme}"
            raise InputError(f"{what} needs --calibration, data as the model reads it, and not what it is judged by")
        if not calibrated and self.data.calibration is not None:
            raise InputError(f"--scheme {self.scheme} takes no --calibration; leave it out")
        if self.rounds < 1:
            raise InputError(f"--rounds {self.rounds} must be at least 1")
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise InputError(f"{self.out} is there already; give a new folder")


def quantize_folder(
    options: QuantizingOptions, command: str = "", tell: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Quantize, measure, and write `out`: the model, its tokenizer, quantization.json, sizes.json, and of a progressive
    run progressive.json and progressive.png.

    Returns {"table": SizeTable, "progressive": Progressive or None}. Raises InputError for what a person can mend;
    nothing is written then.
    """
    options.check()
    subject = load_subject(options.model, options.data)
    try:
        if options.progressive:
            found, table = _progressive(options, subject, tell)
        else:
            found, table = None, _at_once(options, subject)
    except ValueError as error:
        raise InputError(str(error)) from error
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.out) as beside:
        save_quantized(subject.model, beside)
        for name in TOKENIZER:
            # Not saved anew: a tokenizer that was used also tells how it cut and padded.
            if (options.model / name).is_file():
                shutil.copy(options.model / name, beside / name)
        save_json(beside / "sizes.json", {"command": command, "threads": torch.get_num_threads(), **table.to_dict()})
        if found is not None:
            save_json(beside / "progressive.json", {"command": command, "score": subject.scored, **found.to_dict()})
            title = "/".join(options.model.resolve().parts[-2:])
            found.plot(beside / "progressive.png", title=title, score=subject.scored)
    return {"table": table, "progressive": found}


def _at_once(options: QuantizingOptions, subject: Subject) -> SizeTable:
    scheme = str(options.scheme)
    settings: dict[str, Any] = {
        "double_quant": options.double_quant,
        "block_size": options.block_size,
        "observer": options.observer,
        "exclude": options.exclude,
        "embeddings": options.embeddings,
    }
    original = shell(subject.model)
    calibration = subject.calibration if scheme == NEEDS_CALIBRATION else None
    quantize(subject.model, scheme, **settings, calibration=calibration)
    return _measured(options, original, subject, {scheme + " double" * options.double_quant: subject.model})


def _progressive(
    options: QuantizingOptions, subject: Subject, tell: Callable[[str], None]
) -> tuple[Progressive, SizeTable]:
    limits: dict[str, Any] = {"exclude": options.exclude, "embeddings": options.embeddings}
    original = shell(subject.model)
    found = progressive_quantize(
        subject.model,
        subject.score,
        calibration=subject.calibration,
        floor=options.floor,
        target_bytes=None if options.target_mb is None else int(options.target_mb * 1e6),
        ladder=options.ladder,
        chunks=options.chunks,
        tell=tell,
        **limits,
    )
    if not found.plan.layers:
        raise InputError(f"no layer can be lowered: {found.ended}; give a lower --floor")
    rows: dict[str, Any] = {rung: {**rung_options(rung), **limits} for rung in options.ladder}
    return found, _measured(options, original, subject, {**rows, "progressive": subject.model})


def _measured(options: QuantizingOptions, original: nn.Module, subject: Subject, rows: dict[str, Any]) -> SizeTable:
    return compare_sizes(
        original,
        rows,
        inputs=subject.inputs,
        metric=subject.metric,
        calibration=subject.calibration or None,
        rounds=options.rounds,
    )
