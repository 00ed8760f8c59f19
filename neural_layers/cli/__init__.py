"""The command line: `neural-layers COMMAND`, also `python -m neural_layers COMMAND`.

Each command is a module here with `add(subcommands)`, which declares its arguments, and a function that runs it and
returns the exit status. What a command needs is imported when it runs, so that `--help` is instant.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from neural_layers.cli import (
    bench,
    chat,
    convert,
    distill,
    evaluate,
    export,
    generate,
    lora,
    prune,
    quantize,
    search,
    train,
)
from neural_layers.errors import InputError


class _Parser(argparse.ArgumentParser):
    """Answers a wrong argument in one line, as all other bad input is answered."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="neural-layers", description="Transformer blocks, distilled and compressed.")
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (bench, chat, convert, distill, evaluate, export, generate, lora, prune, quantize, search, train):
        command.add(subcommands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 where it succeeded, 2 for bad input, 1 for what broke on the way (a loss that is not finite, a
    file that cannot be written); both are told in one line on standard error."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        before, recipe_arguments = search.separated(given)
        options = build_parser().parse_args(before)
        options.recipe_arguments = recipe_arguments
        options.command_line = "neural-layers " + " ".join(given)
        return options.run(options)
    # ImportError: `errors.require` tells which extra to install.
    except (InputError, ImportError) as error:
        print(f"neural-layers: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:
        print(f"neural-layers: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("neural-layers: interrupted", file=sys.stderr)
        return 130
