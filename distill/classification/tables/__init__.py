"""The tables of words that augmentation goes by, as JSON that can be copied and edited."""

import json
from importlib import resources
from typing import Any


def shipped_table(name: str) -> Any:
    """The content of a JSON file of this package."""
    return json.loads((resources.files(__name__) / name).read_text(encoding="utf-8"))
