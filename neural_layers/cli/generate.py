"""`neural-layers generate`: continue a text."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from neural_layers.cli.generation_options import add_choice_options, generation_arguments, open_model
from neural_layers.errors import InputError


def add(subcommands: Any) -> None:
    """Declare `generate`."""
    parser = subcommands.add_parser(
        "generate",
        help="continue a text with a language model",
        description="Continue a text; it appears as it is generated, and the speed behind it on standard error.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="config.json, model.safetensors, tokenizer.json")
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="the text, or - for standard input (less its last line's end)"
    )
    add_choice_options(parser, "default: 128, or what the context has room for")
    parser.add_argument("--beams", type=int, metavar="N", help="beam search with N beams; printed when it is finished")
    parser.add_argument("--length-penalty", type=float, metavar="P", help="of --beams: above 0 favours long texts")
    parser.add_argument("--n-best", type=int, metavar="N", help="of --beams: print the N best texts")
    parser.add_argument("--stream", action="store_true", help="print the text as it comes; so it is but with --beams")
    parser.set_defaults(run=run_generate)


def run_generate(options: argparse.Namespace) -> int:
    """Load, generate, print the text, and its speed on standard error."""
    arguments = generation_arguments(options)
    prompt = _prompt(options.prompt)
    model, tokenizer = open_model(options, arguments)
    from neural_layers.models.generation.prompts import checked_ids, prompt_ids

    ids = prompt_ids(tokenizer, prompt)
    checked_ids(model.config, ids, options.max_new_tokens)
    arguments.setdefault("max_new_tokens", min(128, model.config.max_position_embeddings - len(ids)))
    begin = time.perf_counter()
    # What transformers finds wrong with a combination of arguments is bad input too.
    try:
        tokens = (
            _beams(model, tokenizer, ids, arguments) if options.beams else _stream(model, tokenizer, ids, arguments)
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    seconds = time.perf_counter() - begin
    print(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


def _prompt(given: str) -> str:
    if given != "-":
        return given
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is no UTF-8 text: {error}") from error


def _stream(model: Any, tokenizer: Any, ids: list[int], arguments: dict[str, Any]) -> int:
    """Print pieces as they come; the number of new tokens."""
    from neural_layers.models.generation import stream

    with stream(model, tokenizer, ids, **arguments) as pieces:
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        finally:
            print(flush=True)
        return len(pieces.new_ids)


def _beams(model: Any, tokenizer: Any, ids: list[int], arguments: dict[str, Any]) -> int:
    """Print the best texts, with their scores where there are several; the number of all their tokens."""
    import torch

    prompt = torch.tensor([ids], device=model.device)
    arguments |= {"attention_mask": torch.ones_like(prompt), "return_dict_in_generate": True, "output_scores": True}
    found, count = model.generate(prompt, tokenizer=tokenizer, **arguments), 0
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    for rank, (row, score) in enumerate(zip(found.sequences, found.sequences_scores, strict=True), 1):
        said = row[len(ids) :].tolist()
        length = next((i + 1 for i, token in enumerate(said) if token in ends), len(said))
        if len(found.sequences) > 1:
            print(f"[{rank}] {score:.3f}")
        print(tokenizer.decode(said[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False))
        count += length
    return count
