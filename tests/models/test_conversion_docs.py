"""The snippets of docs/conversion.md run, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "conversion.md"


def test_the_snippet_runs() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict = {}
    exec(compile(snippet, PAGE.name, "exec"), names)
    assert names["hybrid"].config.mixers == ["attention", "mamba2"]


def test_links_and_pictures_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text())
    assert all("://" in link or (PAGE.parent / link).exists() for link in links)
