"""The README's snippets run, its files exist, and what it says of `make` is true of the Makefile."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
# A snippet that needs what its reader has made before is marked `python no-run`.
PAGES = [
    "README.md",
    "docs/classifiers.md",
    "docs/conversion.md",
    "docs/distillation.md",
    "docs/language_models.md",
    "docs/search.md",
    "docs/wrappers.md",
]
SNIPPETS = [s for page in PAGES for s in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_runs(snippet, capsys) -> None:
    exec(compile(snippet, "README.md", "exec"), {})
    if "explain" in snippet:
        printed = capsys.readouterr().out
        assert "flash_attention: backend" in printed
        assert "all laws hold" in printed


def test_readme_has_snippets() -> None:
    assert len(SNIPPETS) == 9


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "docs/results.md"])
def test_links_and_pictures_exist(page) -> None:
    path = ROOT / page
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing


def test_make_targets_named_in_the_docs_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"\bmake ([a-z]+)", README + (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in named)


def test_ci_runs_only_what_the_readme_says() -> None:
    commands = re.findall(r"^make .*", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    assert commands == ["make lint", "make test"]
