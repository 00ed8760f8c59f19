"""`neural-layers prune`: a language model with weights set to zero, or with units removed, and trained on."""

import argparse
from pathlib import Path
from typing import Any

_TRAINING = ("data", "valid", "context", "steps", "batch", "lr", "seed", "cache")
# What each of these is without the option; None in the namespace means that it was not given.
_DEFAULTS: dict[str, Any] = {
    "method": "l1",
    "multiple_of": 1,
    "scores": "norms",
    "context": 256,
    "steps": 500,
    "batch": 12,
    "lr": 1e-3,
    "seed": 0,
    "times": 10,
    "shape": "cubic",
}


def add(subcommands: Any) -> None:
    """Declare `prune`."""
    parser = subcommands.add_parser(
        "prune",
        help="prune a language model, or take units out of it",
        description="Set weights of a hybrid language model to zero (--amount), or remove units, which makes it "
        "smaller and faster (--remove). With --data it is trained on, weights are pruned step by step, and the losses "
        "are compared.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a hybrid language model")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, or one to continue")
    group = parser.add_argument_group("weights")
    group.add_argument("--method", metavar="NAME", help="l1 (default), random, ln_structured or n:m")
    group.add_argument("--amount", type=float, metavar="X", help="the share of weights to prune, in [0, 1)")
    group.add_argument("--scope", metavar="NAME", help="layer (default) or global")
    group.add_argument("--pattern", metavar="N:M", help="of n:m; default: 2:4")
    group.add_argument("--include", action="append", metavar="PATTERN", help="names of layers; repeat it for several")
    group.add_argument("--exclude", action="append", default=[], metavar="PATTERN")
    group = parser.add_argument_group("units")
    group.add_argument(
        "--remove",
        action="append",
        metavar="KIND=SHARE",
        help="feed_forward, kv_heads, query_heads, mamba or mamba2, and the share to remove; repeat it for several",
    )
    group.add_argument("--multiple-of", type=int, metavar="N", help="what the width that stays is rounded up to")
    group.add_argument("--scores", metavar="NAME", help="norms (default), or data: the first of --data")
    group = parser.add_argument_group("training")
    group.add_argument("--data", action="append", metavar="SOURCE", help="text to train on, as of neural-layers train")
    group.add_argument("--valid", metavar="SOURCE", help="text to compare the losses on; default: of the data's folder")
    group.add_argument("--context", type=int, metavar="N", help="default: 256")
    group.add_argument("--steps", type=int, metavar="N", help="default: 500")
    group.add_argument("--batch", type=int, metavar="N", help="default: 12")
    group.add_argument("--lr", type=float, metavar="X", help="default: 0.001")
    group.add_argument("--cache", type=Path, metavar="DIR", help="of tokens; default: ~/.cache/neural_layers/tokens")
    group.add_argument("--seed", type=int, metavar="N", help="of the training and of --method random; default: 0")
    group.add_argument("--times", type=int, metavar="N", help="prunings to the amount; default: 10")
    group.add_argument("--shape", metavar="NAME", help="of the rise: cubic (default) or linear")
    group.add_argument(
        "--recovery", type=int, metavar="N", help="steps after the last pruning; default: a third of all"
    )
    group.add_argument("--threads", type=int, metavar="N", help="of the CPU")
    parser.set_defaults(run=run_prune)


def run_prune(options: argparse.Namespace) -> int:
    """Run the recipe, print the table and the paths."""
    from neural_layers.errors import InputError, require

    require("transformers", "accelerate", "tqdm", extra="train")
    import torch
    from transformers.utils import logging

    from neural_layers.distill.recipes.language_model_options import LanguageModelOptions
    from neural_layers.distill.recipes.pruning import PruningOptions, prune_language_model

    logging.disable_progress_bar()
    if options.threads is not None:
        if options.threads < 1:
            raise InputError(f"--threads {options.threads} must be at least 1")
        torch.set_num_threads(options.threads)
    _refuse_idle(options)
    for name, value in _DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    training = None
    if options.data:
        given = {name: getattr(options, name) for name in _TRAINING}
        training = LanguageModelOptions(**{**given, "data": tuple(options.data), "out": options.out / "training"})
    report = prune_language_model(
        PruningOptions(
            options.model,
            options.out,
            options.method,
            options.amount,
            options.scope,
            _pattern(options.pattern),
            None if options.include is None else tuple(options.include),
            tuple(options.exclude),
            _shares(options.remove),
            options.multiple_of,
            options.scores,
            options.times,
            options.shape,
            options.recovery,
            training,
            options.seed,
        ),
        options.command_line,
    )
    _print(report, options.out)
    return 0


def _refuse_idle(options: argparse.Namespace) -> None:
    """Raise InputError for options that would do nothing beside the others."""
    from neural_layers.errors import InputError

    idle: dict[str, tuple[str, ...]] = {}
    if not options.data:
        idle["is for a training; give --data, or leave it out"] = (
            *("valid", "context", "steps", "batch", "lr", "cache", "times", "shape", "recovery"),
            *(() if options.method == "random" else ("seed",)),
        )
    if options.remove:
        idle["is for weights, and --remove takes units; run one, then the other"] = (
            *("method", "amount", "scope", "pattern", "times", "shape", "recovery"),
        )
    else:
        idle["is for --remove; give it, or leave this out"] = ("multiple_of", "scores")
    if options.method == "n:m":
        idle["does not go with --method n:m, which prunes once; leave it out"] = ("times", "shape")
    for why, names in idle.items():
        for name in names:
            if getattr(options, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)} {why}")


def _pattern(given: str | None) -> tuple[int, int] | None:
    from neural_layers.errors import InputError

    if given is None:
        return None
    parts = given.split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise InputError(f"--pattern {given} must be N:M, as in 2:4")
    return int(parts[0]), int(parts[1])


def _shares(given: list[str] | None) -> dict[str, float] | None:
    from neural_layers.errors import InputError

    shares: dict[str, float] = {}
    for one in given or ():
        kind, _, share = one.partition("=")
        if kind in shares:
            raise InputError(f"--remove {kind} is given twice; give one share of it")
        try:
            shares[kind] = float(share)
        except ValueError as error:
            raise InputError(f"--remove {one} must be KIND=SHARE, as in feed_forward=0.5") from error
    return shares or None


def _print(report: dict[str, Any], out: Path) -> None:
    if "scores" in report:
        print(f"{'':<15} {'parameters':>11} {'zeros':>7} {'MB':>8} {'loss':>8} {'perplexity':>11} {'ms':>8}")
        for name, s in report["scores"].items():
            print(
                f"{name:<15} {s['parameters']:>11,} {s['sparsity']:>7.1%} {s['bytes'] / 1e6:>8.2f} {s['loss']:>8.4f} "
                f"{s['perplexity']:>11.3f} {s['milliseconds']:>8.2f}"
            )
        print("ms: median time of 8 sequences, the models in turns")
    for folder in [*list(report["models"].values())[1:], out / "pruning.json"]:
        print(folder)
