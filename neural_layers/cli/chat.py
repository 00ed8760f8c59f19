"""`neural-layers chat`: a conversation in the terminal."""

import argparse
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neural_layers.cli.generation_options import add_choice_options, generation_arguments, open_model
from neural_layers.errors import InputError

_HELP = """\
/undo   take the last turn back
/reset  begin anew
/help   this
/quit   leave (also Ctrl-D)
Ctrl-C  stop the answer\
"""


def add(subcommands: Any) -> None:
    """Declare `chat`."""
    parser = subcommands.add_parser(
        "chat",
        help="talk to a language model",
        description="A conversation of several turns: each line is a message, answers appear as they come, and the "
        "model's state is kept, so that nothing is read twice. Lines may also come through a pipe.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="config.json, model.safetensors, tokenizer.json")
    parser.add_argument("--system", metavar="TEXT", help="a message before the first turn")
    add_choice_options(parser, "of an answer; default: 512")
    parser.set_defaults(run=run_chat)


def run_chat(options: argparse.Namespace) -> int:
    """Read lines and answer them until they end."""
    arguments = generation_arguments(options)
    model, tokenizer = open_model(options, arguments)
    from neural_layers.models.generation import ChatSession

    session = ChatSession(model, tokenizer, system=options.system, **arguments)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        _tell(f"{options.model}: context {model.config.max_position_embeddings} tokens; /help tells the commands")
    for line in _lines(is_terminal):
        if line in ("/quit", "/exit"):
            break
        if line.startswith("/"):
            _command(session, line)
        elif line:
            _turn(session, line)
    return 0


def _lines(is_terminal: bool) -> Iterator[str]:
    """Lines without blanks around them; Ctrl-C at the prompt drops a line."""
    while True:
        try:
            if is_terminal:
                import readline  # noqa: F401  (editing and history for input)

                line = input("> ")
            else:
                line = sys.stdin.readline()
                if not line:
                    return
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print()
            continue
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is no UTF-8 text: {error}") from error
        yield line.strip()


def _command(session: Any, line: str) -> None:
    if line == "/reset":
        session.reset()
        _tell("(a new conversation)")
    elif line == "/undo":
        try:
            _tell(f"(taken back: {session.undo()})")
        except InputError as error:
            _tell(f"({error})")
    else:
        _tell(_HELP if line == "/help" else f"there is no command {line}; /help tells them")


def _turn(session: Any, line: str) -> None:
    """Print the answer as it comes. What goes wrong with one message leaves the conversation as it was."""
    begin, before = time.perf_counter(), len(session.token_ids)
    try:
        with _interruptible() as interrupted:
            pieces = session.say(line)
            for piece in pieces:
                print(piece, end="", flush=True)
                if interrupted.is_set():
                    pieces.close()
                    break
        print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        _tell("(interrupted; the message is taken back)")
        return
    except ValueError as error:
        _tell(f"({' '.join(str(error).split())})")
        return
    if session.stopped_by in ("closed", "length", "context"):
        reasons = {"closed": "stopped", "length": "--max-new-tokens reached", "context": "the context is full; /reset"}
        _tell(f"({reasons[session.stopped_by]})")
    if sys.stdin.isatty():
        count, limit = len(session.token_ids), session.model.config.max_position_embeddings
        _tell(f"({count - before} tokens read and said, {time.perf_counter() - begin:.1f} s; {count} of {limit})")


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Within, the first Ctrl-C sets the event, so that an answer ends between two tokens; the second raises."""
    event = threading.Event()

    def press(*_: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
