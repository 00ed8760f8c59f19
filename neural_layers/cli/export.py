"""`neural-layers export`: write a model as ONNX, verified, into a folder that is enough to serve it."""

import argparse
import sys
from pathlib import Path
from typing import Any


def add(subcommands: Any) -> None:
    """Declare `export`."""
    parser = subcommands.add_parser(
        "export",
        help="write a model as ONNX",
        description="Write a model as ONNX into a folder that neural_layers.models.export.OnnxModel serves: one graph "
        "that reads a prompt, continues and decodes, compared with PyTorch before it takes its name.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a hybrid language model or CVM translator")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write to")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="weights of 8 or 4 bits; default: float32")
    parser.add_argument("--task", default="auto", choices=("auto", "causal-lm", "translation"), help="default: auto")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: the tokenizer in MODEL_DIR")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the graph with PyTorch")
    parser.add_argument(
        "--external-data", action="store_true", help="weights in a file of their own; default: those over 2 GB"
    )
    parser.set_defaults(run=run_export)


def run_export(options: argparse.Namespace) -> int:
    """Load, export, print what was verified and what was written."""
    from neural_layers.errors import require

    require("onnx", "onnxruntime", extra="onnx")
    require("transformers", extra="models")
    from transformers.utils import logging

    from neural_layers.models.export.export import export_onnx
    from neural_layers.models.export.graph import OPSET
    from neural_layers.models.export.loading import load_exportable
    from neural_layers.models.export.verify import VerificationError

    logging.disable_progress_bar()
    print(f"loading {options.model}", flush=True)
    model = load_exportable(options.model, options.task)
    kind = f"{type(model).__name__}, opset {OPSET}, {options.quantize or 'float32'}"
    print(f"writing {kind}" + ("" if options.no_verify else ", then comparing it with PyTorch"), flush=True)
    table = _Table()
    try:
        export_onnx(
            model,
            options.out,
            quantize=options.quantize,
            verify=not options.no_verify,
            tokenizer=options.tokenizer,
            external_data=options.external_data or None,
            tell=table.add,
        )
    except VerificationError as error:
        print(f"neural-layers: nothing was written: {error}", file=sys.stderr)
        return 1
    table.end()
    if not options.no_verify:
        is_exact = options.quantize is None
        print("error: " + ("largest difference / largest value" if is_exact else "root mean square, of the output's"))
    for path in sorted(options.out.iterdir()):
        if path.is_file():
            print(f"{path.stat().st_size / 1e6:10.2f} MB  {path}")
    return 0


class _Table:
    """Prints a line for each length as soon as all checks of it are made."""

    def __init__(self) -> None:
        self.row: list[Any] = []
        self.is_begun = False

    def add(self, check: Any) -> None:
        if not self.is_begun:
            print(f"{'tokens':>8} {'tokens before':>14} {'rows':>6} {'error':>14}")
            self.is_begun = True
        if self.row and self.row[0].length != check.length:
            self.end()
        self.row.append(check)

    def end(self) -> None:
        """Print the length that is complete."""
        if self.row:
            past, batch = (sorted({getattr(check, name) for check in self.row}) for name in ("past", "batch"))
            shown = [", ".join(map(str, values)) for values in (past, batch)]
            worst = max(check.error for check in self.row)
            print(f"{self.row[0].length:>8} {shown[0]:>14} {shown[1]:>6} {worst:>14.1e}", flush=True)
        self.row = []
