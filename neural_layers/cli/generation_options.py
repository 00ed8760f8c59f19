"""How text is chosen: the options that `generate` and `chat` share, and what contradicts what."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neural_layers.errors import InputError, require

# option: (argument of `generate`, lowest value, highest value, whether the ends belong to the range)
_RANGES: dict[str, tuple[str, float, float, bool]] = {
    "max_new_tokens": ("max_new_tokens", 1, float("inf"), True),
    "temperature": ("temperature", 0, float("inf"), False),
    "top_k": ("top_k", 1, float("inf"), True),
    "top_p": ("top_p", 0, 1, True),
    "min_p": ("min_p", 0, 1, True),
    "typical_p": ("typical_p", 0, 1, False),
    "repetition_penalty": ("repetition_penalty", 0, float("inf"), False),
    "no_repeat_ngram": ("no_repeat_ngram_size", 1, float("inf"), True),
    "contrastive": ("penalty_alpha", 0, 1, True),
    "prompt_lookup": ("prompt_lookup_num_tokens", 1, float("inf"), True),
    "prefill_chunk": ("prefill_chunk_size", 1, float("inf"), True),
    "beams": ("num_beams", 2, float("inf"), True),
    "n_best": ("num_return_sequences", 1, float("inf"), True),
    "length_penalty": ("length_penalty", -float("inf"), float("inf"), False),
}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")


def add_choice_options(parser: argparse.ArgumentParser, max_new_tokens: str) -> None:
    """Declare how tokens are chosen. The values are checked by `generation_arguments`."""
    add = parser.add_argument
    add("--max-new-tokens", type=int, metavar="N", help=max_new_tokens)
    add("--greedy", action="store_true", help="always the likeliest token, whatever the model's own settings say")
    add("--temperature", type=float, metavar="T", help="sample, with logits divided by T; below 1 is more predictable")
    add("--top-k", type=int, metavar="K", help="sample of the K likeliest tokens (50 where another option samples)")
    add("--top-p", type=float, metavar="P", help="sample of the likeliest tokens that have probability P together")
    add("--min-p", type=float, metavar="P", help="sample of the tokens at least P times as likely as the likeliest")
    add("--typical-p", type=float, metavar="P", help="locally typical sampling (arXiv 2202.00666)")
    add("--repetition-penalty", type=float, metavar="R", help="above 1: tokens that stand in the text get less likely")
    add("--no-repeat-ngram", type=int, metavar="N", help="no N tokens stand in the text twice")
    add("--stop", action="append", metavar="STRING", help="end the text there (\\n is a line's end); may be repeated")
    add("--contrastive", type=float, metavar="ALPHA", help="contrastive search over the --top-k (4) likeliest; try 0.6")
    add("--prompt-lookup", type=int, metavar="N", help="guess N tokens ahead by what stands in the text: same output")
    add("--assistant", type=Path, metavar="DIR", help="a smaller model that guesses ahead: same output, maybe sooner")
    add("--seed", type=int, metavar="N", help="of sampling; the same seed gives the same text")
    add("--prefill-chunk", type=int, metavar="N", help="read the prompt N tokens at a time, in less memory")


def generation_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `generate` that the options stand for, without the assistant.

    Raises InputError for values out of range and options that contradict each other.
    """
    arguments: dict[str, Any] = {}
    for name, (argument, low, high, ends) in _RANGES.items():
        value = getattr(options, name, None)
        if value is not None:
            _check_range(name, value, low, high, ends)
            arguments[argument] = value
    _check_together(options)
    given = [name for name in _SAMPLING if getattr(options, name) is not None]
    if options.contrastive is not None:
        arguments |= {"do_sample": False, "top_k": options.top_k or 4}
    elif given:
        arguments["do_sample"] = True
    elif options.greedy:
        arguments["do_sample"] = False
    if options.stop:
        from neural_layers.cli.train import unescaped

        if not all(options.stop):
            raise InputError("--stop takes at least one character")
        arguments["stop_strings"] = [unescaped(stop) for stop in options.stop]
    return arguments


def open_model(options: argparse.Namespace, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """The model of MODEL_DIR and its tokenizer, loaded without a word; the assistant joins `arguments`, and sampling is
    seeded, as the options say.

    Raises InputError for folders that do not fit, and ImportError without the extra `models`.
    """
    require("transformers", extra="models")
    from transformers.utils import logging

    from neural_layers.models.loading import load_language_model

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model, tokenizer = load_language_model(options.model)
    if options.assistant is not None:
        arguments["assistant_model"] = _load_assistant(options.assistant, tokenizer)
    _seed_sampling(options.seed, arguments, model)
    return model, tokenizer


def _load_assistant(folder: Path, tokenizer: Any) -> Any:
    """The model in `folder`. Raises InputError unless its tokenizer has the vocabulary of `tokenizer`."""
    from neural_layers.models.loading import load_language_model

    assistant, own = load_language_model(folder)
    if own.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"--assistant {folder} has another tokenizer ({len(own)} tokens, not {len(tokenizer)}); guesses are "
            "tokens, so give a model with the same tokenizer"
        )
    return assistant


def _seed_sampling(seed: int | None, arguments: dict[str, Any], model: Any) -> None:
    """Seed the random state. Raises InputError where nothing is drawn."""
    if seed is None:
        return
    import torch

    if not arguments.get("do_sample", model.generation_config.do_sample):
        raise InputError(
            f"--seed {seed}: nothing is drawn; add --temperature, --top-k, --top-p, --min-p or --typical-p"
        )
    torch.manual_seed(seed)


def _check_range(name: str, value: float, low: float, high: float, ends: bool) -> None:
    if not (low <= value <= high if ends else low < value < high):
        flag = "--" + name.replace("_", "-")
        if high == float("inf"):
            wanted = f"must be {'at least' if ends else 'above'} {low:g}"
        else:
            wanted = f"must lie {'from' if ends else 'between'} {low:g} {'to' if ends else 'and'} {high:g}"
        hint = "; leave it out, or give --greedy, for the likeliest tokens" if name == "temperature" else ""
        raise InputError(f"{flag} {value:g} {wanted}{hint}")


def _check_together(options: argparse.Namespace) -> None:
    """Raise InputError for two options of which one would be ignored."""
    value: Callable[[str], Any] = vars(options).get
    flags = {name: "--" + name.replace("_", "-") for name in vars(options)}
    # --beams with sampling is stochastic beam search, which there is; --top-k with --contrastive is its candidates.
    clashes = [(name, "greedy") for name in _SAMPLING]
    clashes += [(name, "contrastive") for name in (*_SAMPLING, "greedy") if name != "top_k"]
    clashes += [("prompt_lookup", "contrastive"), ("assistant", "contrastive"), ("assistant", "prompt_lookup")]
    clashes += [(name, "beams") for name in ("contrastive", "prompt_lookup", "assistant", "stream")]
    for first, second in clashes:
        if value(first) not in (None, False) and value(second) not in (None, False):
            is_stream = first == "stream"
            reason = "which text is best is known at the end" if is_stream else "each chooses tokens in its own way"
            raise InputError(
                f"{_given(flags[first], value(first))} and {_given(flags[second], value(second))} do not go together: "
                f"{reason}; leave one of them out"
            )
    for name in ("length_penalty", "n_best"):
        if value(name) is not None and value("beams") is None:
            raise InputError(f"{_given(flags[name], value(name))} compares beams; add --beams 4, or leave it out")
    if value("n_best") is not None and value("n_best") > value("beams"):
        raise InputError(f"--n-best {value('n_best')} is more than --beams {value('beams')}; give as many beams")


def _given(flag: str, value: Any) -> str:
    return flag if value is True else f"{flag} {value}"
