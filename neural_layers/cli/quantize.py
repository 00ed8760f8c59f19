"""`neural-layers quantize`: a trained model in fewer bits, beside what it was."""

import argparse
from pathlib import Path
from typing import Any

SCHEMES = ("float16", "bfloat16", "int8_dynamic", "int8_static", "int4", "nf4", "fp4")


def add(subcommands: Any) -> None:
    """Declare `quantize`."""
    parser = subcommands.add_parser(
        "quantize",
        help="write a model in fewer bits",
        description="Quantize a trained model, by one scheme or layer by layer (--progressive), compare it with what "
        "it was (bytes, times, error of the logits, quality) and write it where from_pretrained and load_quantized "
        "find it. Models: hybrid language models, CVM translators, language models and classifiers of transformers.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a folder with a model and its tokenizer")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    group = parser.add_argument_group("bits")
    group.add_argument("--scheme", choices=SCHEMES, help="for all layers")
    group.add_argument("--double-quant", action="store_true", help="quantize the scales of nf4 and fp4 too")
    group.add_argument("--block-size", type=int, metavar="N", help="weights that share a scale in 4 bits; default: 64")
    group.add_argument("--observer", metavar="NAME", help="of int8_static: minmax (default), percentile or mse")
    group.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="layers to leave; repeat it for several"
    )
    group.add_argument("--no-embeddings", dest="embeddings", action="store_false", help="leave embeddings, tied heads")
    group = parser.add_argument_group("layer by layer")
    group.add_argument("--progressive", action="store_true", help="lower the layers that need their bits least first")
    group.add_argument("--ladder", metavar="NAMES", help="default: bf16,int8,nf4")
    group.add_argument("--floor", type=float, metavar="X", help="share of the model's own score to keep; default: 0.9")
    group.add_argument("--target-mb", type=float, metavar="X", help="millions of bytes to come down to")
    group.add_argument("--chunks", type=int, metavar="N", help="evaluations on the way; default: 10")
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="what quality is measured on: text, sentence pairs (source TAB target), or labelled texts",
    )
    group.add_argument("--calibration", metavar="FILE", help="for int8_static and --progressive; not the data above")
    group.add_argument("--calibration-rows", type=int, metavar="N", help="of it, at most; default: 64")
    group.add_argument("--limit", type=int, metavar="N", help="sequences, sentences or texts of --data, at most")
    group.add_argument("--context", type=int, metavar="N", help="of a language model's sequences; default: 256")
    group.add_argument("--batch", type=int, default=8, metavar="N", help="rows of a timed batch; default: 8")
    group.add_argument("--rounds", type=int, default=20, metavar="N", help="calls of each model on the clock")
    group.add_argument("--cache", type=Path, metavar="DIR", help="of tokens; default: ~/.cache/neural_layers/tokens")
    group.add_argument("--threads", type=int, metavar="N", help="of the CPU")
    parser.set_defaults(run=run_quantize)


def run_quantize(options: argparse.Namespace) -> int:
    """Quantize, print the table and the paths."""
    from neural_layers.errors import InputError, require

    require("transformers", "sacrebleu", "rouge_score", "matplotlib", extra="train")
    import torch
    from transformers.utils import logging

    from neural_layers.distill.recipes.quantizing import QuantizingOptions, quantize_folder
    from neural_layers.distill.recipes.quantizing_subjects import Data

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if options.threads is not None:
        if options.threads < 1:
            raise InputError(f"--threads {options.threads} must be at least 1")
        torch.set_num_threads(options.threads)
    _fill(options)
    data = Data(
        options.data,
        options.calibration,
        options.calibration_rows,
        options.batch,
        options.limit,
        options.context,
        options.cache,
    )
    given = {name: value for name, value in vars(options).items() if name in QuantizingOptions.__dataclass_fields__}
    given |= {"data": data, "exclude": tuple(options.exclude), "ladder": tuple(options.ladder.split(","))}
    report = quantize_folder(QuantizingOptions(**given), options.command_line, lambda line: print(line, flush=True))
    if report["progressive"] is not None:
        print(report["progressive"])
    print(report["table"])
    for path in sorted(options.out.iterdir()):
        print(f"{path.stat().st_size / 1e6:10.3f} MB  {path}")
    return 0


def _fill(options: argparse.Namespace) -> None:
    """Put defaults in the places of what was not given. Raises InputError for what would do nothing."""
    from neural_layers.errors import InputError

    for name, default, other in (
        ("ladder", "bf16,int8,nf4", "progressive"),
        ("chunks", 10, "progressive"),
        ("calibration_rows", 64, "calibration"),
    ):
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif not getattr(options, other):
            raise InputError(f"--{name.replace('_', '-')} belongs to --{other}; give it too, or leave this out")
