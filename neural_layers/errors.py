"""Errors that a person can mend, and how they are told."""

import importlib


class InputError(ValueError):
    """Bad input of a person. The message is one line that says what is wrong and what would be right; the command line
    prints it and exits with 2."""


def require(*modules: str, extra: str) -> None:
    """Import optional dependencies, or raise ImportError that names the extra which installs the missing one."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(f"{module} is missing; pip install 'neural-layers[{extra}]'") from error
