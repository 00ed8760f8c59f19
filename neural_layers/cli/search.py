"""`neural-layers search`: the best options of a recipe, hyperparameters and architecture, by Optuna."""

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_USAGE = "neural-layers search RECIPE --trials N --parameter NAME=SPEC ... --out DIR -- [the recipe's options]"


def add(subcommands: Any) -> None:
    """Declare `search`."""
    parser = subcommands.add_parser(
        "search",
        help="tune the options of a recipe",
        usage=_USAGE,
        description="Run a recipe again and again with options that Optuna proposes (TPE), end bad trials early, and "
        "tell the best. The same command on the same --out continues a search that was interrupted, and may run in "
        "several processes at once. What stands behind -- are the recipe's own options, which all trials share.",
    )
    parser.set_defaults(recipe_arguments=[])
    parser.add_argument("recipe", nargs="+", metavar="RECIPE", help="train, or distill with ntmm, cvm or lm")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the search's folder, or one to continue"
    )
    parser.add_argument(
        "--trials", type=int, required=True, metavar="N", help="in all, those of earlier calls included"
    )
    parser.add_argument(
        "--parameter",
        action="append",
        default=[],
        metavar="NAME=SPEC",
        help="an option of the recipe and its values: lr=1e-4..1e-2:log, layers=1..4, width=32..128:step=32, "
        "'mixers=mamba|mamba,attention', bf16=true|false; repeat it for several",
    )
    parser.add_argument(
        "--objective",
        action="append",
        default=[],
        metavar="METRIC[:min|:max]",
        help="a score of the validation or a cost such as parameters; repeat it for a Pareto front",
    )
    parser.add_argument("--prune", default="median", metavar="HOW", help="median (default), hyperband or none")
    parser.add_argument(
        "--prune-after", type=int, default=5, metavar="N", help="trials the median waits for; default: 5"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is proposed; default: 0")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes on this machine; default: 1")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU, for each process")
    parser.set_defaults(run=run_search)


def separated(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line, and what stands behind -- where it is that of a search: the recipe's own options."""
    if given[:1] != ["search"] or "--" not in given:
        return list(given), []
    place = list(given).index("--")
    return list(given[:place]), list(given[place + 1 :])


def run_search(options: argparse.Namespace) -> int:
    """Search, print the best and where it is written; 1 where no trial came to its end."""
    from neural_layers.errors import InputError, require

    if options.workers < 1:
        raise InputError(f"--workers {options.workers} must be at least 1")
    require("optuna", "transformers", "accelerate", "tqdm", "matplotlib", "rich", extra="train")
    from neural_layers.distill.search import SearchFailed
    from neural_layers.distill.search.results import print_results, write_results

    search = _open(options)
    try:
        if options.workers == 1:
            search.run()
        else:
            _run_side_by_side(options)
        written = write_results(search)
    except SearchFailed as failed:
        print(f"neural-layers: {failed}", file=sys.stderr)
        return 1
    print_results(search)
    print("written: " + " ".join(map(str, written)))
    return 0


def _open(options: argparse.Namespace) -> Any:
    """The search that the options describe, its input checked."""
    import os

    import torch
    from transformers.utils import logging

    from neural_layers.cli.search_recipes import recipe_named
    from neural_layers.distill.search import Search, SearchOptions
    from neural_layers.errors import InputError

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    threads = options.threads
    if threads is None and options.workers > 1:
        threads = max(1, (os.cpu_count() or 1) // options.workers)
    if threads is not None:
        if threads < 1:
            raise InputError(f"--threads {threads} must be at least 1")
        torch.set_num_threads(threads)
    chosen = SearchOptions(
        out=options.out,
        trials=options.trials,
        parameters=tuple(options.parameter),
        objectives=tuple(options.objective),
        arguments=tuple(options.recipe_arguments),
        seed=options.seed,
        prune=options.prune,
        prune_after=options.prune_after,
    )
    return Search(chosen, recipe_named(tuple(options.recipe)))


def _run_side_by_side(options: argparse.Namespace) -> None:
    """Carry the trials out in several processes; this one waits for them.

    Raises SearchFailed or what else ended one of them; an interruption ends them all.
    """
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    plain = copy.copy(options)
    del plain.run  # a function of the command line, which another process imports itself
    workers = [context.Process(target=_work, args=(plain,), name=f"worker {i}") for i in range(options.workers)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        for worker in workers:
            worker.terminate()
        raise
    failed = [worker for worker in workers if worker.exitcode]
    if failed:
        raise OSError(f"{failed[0].name} ended with status {failed[0].exitcode}; the same command continues the search")


def _work(options: argparse.Namespace) -> None:
    """What each process does."""
    from neural_layers.distill.search import SearchFailed

    try:
        _open(options).run(show_bar=False)
    except SearchFailed:
        pass  # the first process tells
    except OSError as error:
        print(f"neural-layers: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
