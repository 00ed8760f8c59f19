"""The error of text that cannot be used."""

from neural_layers.errors import InputError


class TextError(InputError):
    """Text that cannot be read or used. The message is one line: what, where (file and line) and the remedy."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
