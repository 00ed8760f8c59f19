"""The recipes as a search sees them: their options out of the parsers of their commands, and what they measure."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any


def recipe_named(words: tuple[str, ...]) -> Any:
    """The recipe of that command, for a search. Raises InputError for another command."""
    from neural_layers.distill.search.recipe import SearchedRecipe, measured_language_model, measured_student
    from neural_layers.errors import InputError

    recipes = _recipes()
    if words not in recipes:
        known = ", ".join(" ".join(recipe) for recipe in recipes)
        raise InputError(f"there is no recipe {' '.join(words)!r} to search; there are {known}")
    parser = _recipe_parser(words)
    if parser is None:
        raise InputError(f"{' '.join(words)} is no command of this version")
    make, scores, costs, default = recipes[words]
    kind, run = make()
    return SearchedRecipe(
        words=words,
        options=_searchable(parser, kind),
        scores=scores,
        costs=costs,
        default=default,
        parse=lambda arguments: _options(parser, kind, arguments),
        run=run,
        measure=measured_language_model if words == ("train",) else measured_student,
    )


def _recipe_parser(words: tuple[str, ...]) -> Any:
    """The parser of that command, out of those that are declared for it."""
    from neural_layers.cli import build_parser

    parser: Any = build_parser()
    for word in words:
        (choices,) = (a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = choices.get(word)
        if parser is None:
            return None
    return parser


def _searchable(parser: argparse.ArgumentParser, kind: type) -> dict[str, Any]:
    """The options that have one value and are fields of the recipe's options."""
    from neural_layers.distill.search import Option

    names, found = {field.name for field in fields(kind)}, {}
    types: dict[Any, str] = {int: "int", float: "float"}
    for action in parser._actions:
        is_switch = isinstance(action, argparse._StoreTrueAction)
        if action.dest in names - _NEVER and (is_switch or type(action) is argparse._StoreAction):
            flag, *aliases = action.option_strings
            found[action.dest] = Option(flag, "switch" if is_switch else types.get(action.type, "text"), tuple(aliases))
    return found


# What says where a run is, and not what it does.
_NEVER = {"out", "resume", "threads", "find_lr", "report_to", "statistics", "cache", "teacher_cache", "keep", "seed"}


def _options(parser: argparse.ArgumentParser, kind: type, arguments: Sequence[str]) -> Any:
    """The recipe's options out of its command line."""
    from neural_layers.errors import InputError

    parsed = vars(parser.parse_args(list(arguments)))
    if parsed.get("find_lr"):
        raise InputError("--find-lr trains nothing; leave it out of a search")
    if parsed.get("threads") is not None:
        raise InputError("--threads is an option of the search itself; give it before --")
    known = {name: value for name, value in parsed.items() if name in kind.__dataclass_fields__}  # type: ignore[attr-defined]
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})


def _recipes() -> dict[tuple[str, ...], Any]:
    """By its words: what gives a recipe's options and function, its scores, its costs, and the usual objective."""
    from neural_layers.distill.search.recipe import COSTS

    language = {"loss": "min", "perplexity": "min", "bits_per_byte": "min"}
    classes = {"accuracy": "max", "macro_f1": "max", "loss": "min", "calibration_error": "min"}
    translation = dict.fromkeys(("bleu", "chrf", "rouge1", "rouge2", "rougeL", "bertscore", "exact_match"), "max")
    return {
        ("train",): (_train, language, {"parameters": "min", "seconds": "min"}, "loss"),
        ("distill", "ntmm"): (_ntmm, classes, COSTS, "accuracy"),
        ("distill", "cvm"): (_cvm, {**translation, "ter": "min"}, COSTS, "chrf"),
        ("distill", "lm"): (_lm, language, COSTS, "loss"),
    }


def _train() -> tuple[type, Callable[..., Any]]:
    from neural_layers.distill.recipes.language_model import train_language_model
    from neural_layers.distill.recipes.language_model_options import LanguageModelOptions

    return LanguageModelOptions, train_language_model


def _ntmm() -> tuple[type, Callable[..., Any]]:
    from neural_layers.distill.recipes.ntmm import distill_ntmm
    from neural_layers.distill.recipes.ntmm_options import NTMMOptions

    return NTMMOptions, distill_ntmm


def _cvm() -> tuple[type, Callable[..., Any]]:
    from neural_layers.distill.recipes.cvm import distill_cvm
    from neural_layers.distill.recipes.cvm_options import CVMOptions

    return CVMOptions, distill_cvm


def _lm() -> tuple[type, Callable[..., Any]]:
    from neural_layers.distill.recipes.distill_lm import distill_language_model
    from neural_layers.distill.recipes.distill_lm_options import DistillLMOptions

    return DistillLMOptions, distill_language_model
