"""`neural-layers evaluate`: how well and how fast a language model reads a text."""

import argparse
from pathlib import Path
from typing import Any


def add(subcommands: Any) -> None:
    """Declare `evaluate`."""
    parser = subcommands.add_parser(
        "evaluate",
        help="perplexity, bits per byte, speed and memory of a language model",
        description="Read a text with a trained model: loss, perplexity, bits per byte, loss by position, tokens/s and "
        "peak memory; or run tasks of the lm-eval harness.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a folder with a model, such as RUN/model")
    parser.add_argument("--data", metavar="SOURCE", help="a file, folder, pattern or hf:NAME, as train takes it")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of a sequence; default: the most it takes")
    parser.add_argument("--stride", type=int, metavar="N", help="between beginnings of sequences; default: context - 1")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="sequences of a forward pass; default: 8")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="the field of a row; default: text")
    parser.add_argument("--document-separator", metavar="TEXT", help="what divides .txt files into documents")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="of tokens; default: ~/.cache/neural_layers/tokens")
    parser.add_argument("--tasks", metavar="NAMES", help="tasks of lm-eval with commas between, where it is installed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU")
    parser.set_defaults(run=run_evaluate)


def run_evaluate(options: argparse.Namespace) -> int:
    """Read the text or run the tasks, print the table."""
    from neural_layers.cli.train import unescaped
    from neural_layers.errors import InputError, require

    if (options.data is None) == (options.tasks is None):
        raise InputError("give --data with a text to read, or --tasks with the names of tasks of lm-eval")
    require("transformers", "tqdm", "rich", extra="train")
    import torch
    from transformers.utils import logging

    from neural_layers.distill.files import save_json
    from neural_layers.distill.recipes.language_model_evaluation import (
        EvaluationOptions,
        evaluate_language_model,
        print_evaluation,
        run_tasks,
    )

    logging.disable_progress_bar()
    if options.threads is not None:
        torch.set_num_threads(max(1, options.threads))
    if options.tasks is not None:
        report = run_tasks(options.model, options.tasks.split(","), options.batch)
        for task, figures in report.items():
            print(task, *(f"{name}={value}" for name, value in figures.items()))
    else:
        fields = {
            name: value for name, value in vars(options).items() if name in EvaluationOptions.__dataclass_fields__
        }
        if options.document_separator is not None:
            fields["document_separator"] = unescaped(options.document_separator)
        report = evaluate_language_model(EvaluationOptions(**fields))
        print_evaluation(report)
    if options.json is not None:
        save_json(options.json, report)
        print(options.json)
    return 0
