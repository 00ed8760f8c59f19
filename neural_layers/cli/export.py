"""`neural-layers export`: write a model as ONNX, verified, into a folder that is enough to serve it."""

import argparse
import sys
from pathlib import Path
from typing import Any

# By ONNX Runtime or in its blocks; and by `quantize`, whose layers go into the graph.
_BY_EXPORT = ("int8", "int8_dynamic", "int8_static")
_BY_QUANTIZE = ("int4", "nf4", "fp4")


def add(subcommands: Any) -> None:
    """Declare `export`."""
    parser = subcommands.add_parser(
        "export",
        help="write a model as ONNX",
        description="Write a model as ONNX into a folder that neural_layers.models.export.OnnxModel serves: one graph "
        "that reads a prompt, continues and decodes, compared with PyTorch before it takes its name. A model that "
        "neural-layers quantize wrote is exported in its own bits. At the end: bytes, times and errors beside PyTorch.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a hybrid language model or CVM translator")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write to")
    parser.add_argument(
        "--quantize",
        choices=(*_BY_EXPORT, *_BY_QUANTIZE),
        help="int8: blocks of 64 that share a scale; int8_dynamic, int8_static: products of integers; int4, nf4, fp4: "
        "4 bits, of embeddings too; default: as the model is",
    )
    parser.add_argument("--double-quant", action="store_true", help="nf4 and fp4 with quantized scales")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="for int8_static: text, or of a translator source TAB target"
    )
    parser.add_argument("--task", default="auto", choices=("auto", "causal-lm", "translation"), help="default: auto")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: the tokenizer in MODEL_DIR")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the graph with PyTorch")
    parser.add_argument(
        "--external-data", action="store_true", help="weights in a file of their own; default: those over 2 GB"
    )
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="timed calls of each form; 0: no table")
    parser.add_argument("--length", type=int, default=128, metavar="N", help="tokens of a timed prompt; default: 128")
    parser.set_defaults(run=run_export)


def run_export(options: argparse.Namespace) -> int:
    """Load, export, print what was verified, what was written, and what it buys."""
    from neural_layers.errors import InputError, require

    require("onnx", "onnxruntime", extra="onnx")
    require("transformers", extra="models")
    from transformers.utils import logging

    from neural_layers.models.export.compare import bits_of
    from neural_layers.models.export.export import export_onnx
    from neural_layers.models.export.graph import OPSET
    from neural_layers.models.export.loading import load_exportable
    from neural_layers.models.export.reference import tolerance
    from neural_layers.models.export.verify import VerificationError
    from neural_layers.wrappers.quantization.trials import quantized_shell

    logging.disable_progress_bar()
    if (options.calibration is None) != (options.quantize != "int8_static"):
        raise InputError("--calibration FILE is for --quantize int8_static, which needs it")
    if options.double_quant and options.quantize not in ("nf4", "fp4"):
        raise InputError("--double-quant is for --quantize nf4 and fp4; leave it out")
    if options.rounds < 0 or options.length < 1:
        raise InputError(f"--rounds {options.rounds} must be at least 0, and --length {options.length} at least 1")
    print(f"loading {options.model}", flush=True)
    model = exported = load_exportable(options.model, options.task)
    arguments: dict[str, Any] = {"quantize": options.quantize if options.quantize in _BY_EXPORT else None}
    if options.quantize in _BY_QUANTIZE:
        extra = {"double_quant": True} if options.double_quant else {}
        exported = quantized_shell(model, options.quantize, **extra)
    if options.calibration is not None:
        from neural_layers.cli.export_calibration import read_calibration

        arguments["calibration"] = read_calibration(model, options.tokenizer or options.model, options.calibration)
    kind = f"{type(model).__name__}, opset {OPSET}, {options.quantize or bits_of(model)}"
    print(f"writing {kind}" + ("" if options.no_verify else ", then comparing it with PyTorch"), flush=True)
    table = _Table()
    try:
        export_onnx(
            exported,
            options.out,
            verify=not options.no_verify,
            tokenizer=options.tokenizer,
            external_data=options.external_data or None,
            tell=table.add,
            **arguments,
        )
    except VerificationError as error:
        print(f"neural-layers: nothing was written: {error}", file=sys.stderr)
        return 1
    table.end()
    if not options.no_verify:
        is_mean = tolerance(exported, arguments["quantize"]).is_mean
        print("error: " + ("root mean square, of the output's" if is_mean else "largest difference / largest value"))
    for path in sorted(options.out.iterdir()):
        if path.is_file():
            print(f"{path.stat().st_size / 1e6:10.2f} MB  {path}")
    if options.rounds:
        _print_comparison(model, options)
    return 0


def _print_comparison(model: Any, options: argparse.Namespace) -> None:
    """The model in PyTorch, its float32 graph, and the one that was written."""
    import tempfile

    from neural_layers.models.export.compare import bits_of, compare_exports
    from neural_layers.models.export.export import export_onnx

    with tempfile.TemporaryDirectory(prefix="neural-layers-") as folder:
        forms = {f"ONNX {options.quantize or bits_of(model)}": options.out}
        if options.quantize is not None:
            export_onnx(model, folder, verify=False)
            forms = {"ONNX float32": Path(folder), **forms}
        print(compare_exports(model, forms, length=options.length, rounds=options.rounds))


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
