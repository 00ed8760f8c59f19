"""What a run was made with, for its `config.json`."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import transformers

from neural_layers import __version__


def versions() -> dict[str, str]:
    """The versions of Python, torch, transformers and this library, and the platform."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "neural_layers": __version__,
        "platform": sys.platform,
    }


def git_revision() -> str | None:
    """The commit of the checkout that this package runs from, None where it is installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
