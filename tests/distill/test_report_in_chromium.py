"""The report in a browser, at the width of a desk and of a phone: nothing overlaps, nothing is cut off."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from neural_layers.distill.report import render_report
from tests.distill.report_samples import classification_report, translation_report

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--dump-dom",
    "--virtual-time-budget=10000",
]  # fmt: skip
SIZES = ((1280, 900), (390, 844))
SCRIPT = (Path(__file__).parent / "overlaps.js").read_text(encoding="utf-8")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed to look at the page in")


def look(page: str, folder: Path) -> list[dict[str, Any]]:
    """What `overlaps.js` finds in a page at each of `SIZES`.

    The page stands in frames of these sizes, because windows cannot be as narrow as a phone.
    """
    frames = "".join(
        f'<iframe width="{width}" height="{height}" style="border: 0" srcdoc="{html.escape(page)}"></iframe>'
        for width, height in SIZES
    )
    outer = f"""<!DOCTYPE html><meta charset="utf-8"><pre id="found"></pre>{frames}<script>{SCRIPT}
onload = () => {{
  let said;
  try {{ said = Array.from(window.frames, findings); }} catch (problem) {{ said = String(problem); }}
  document.getElementById("found").textContent = JSON.stringify(said);
}}</script>"""
    file = folder / "page.html"
    file.write_text(outer, encoding="utf-8")
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1800", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, f"Chromium gave no page: {done.stderr[-2000:]}"
    answers: list[dict[str, Any]] = json.loads(html.unescape(found[1]) or '"the script did not run"')
    assert isinstance(answers, list), answers
    assert [answer["width"] for answer in answers] == [width for width, _ in SIZES]
    return answers


@pytest.mark.parametrize("make", [translation_report, classification_report])
def test_nothing_overlaps_or_is_cut_off_at_two_window_sizes(make: Any, tmp_path: Path) -> None:
    for answer in look(render_report(make()), tmp_path):
        assert answer["boxes"] > 300
        assert answer["found"] == []


def test_planted_faults_are_found(tmp_path: Path) -> None:
    plot = '<svg viewBox="0 0 100 50" style="width: 300px">{}</svg>'
    text = '<g id="one-text_{}"><path d="M {} 10 h 20 v 10 h -20 z"></path></g>'
    clean = plot.format(text.format(1, 5) + text.format(2, 40)) + '<div class="scroll" style="overflow-x: auto">'
    clean += '<p style="width: 3000px">wide, and it may be</p></div><p>one</p><p>two</p>'
    assert [answer["found"] for answer in look(f"<body>{clean}</body>", tmp_path)] == [[], []]
    faults = {
        'overlap: "three" and "four"': '<p>three</p><p style="margin-top: -2.2em">four</p>',
        'overlap: "one-text_3" and "one-text_4"': plot.format(text.format(3, 5) + text.format(4, 20)),
        "outside its plot: one-text_5": plot.format(text.format(5, 90)),
        'spills: SPAN "abcdefghijklm"': '<span style="display: block; width: 2em">abcdefghijklm</span>',
        "the page is 1401 wide": '<p style="width: 1393px">five</p>',
        'too wide: P "five"': "",
    }
    for answer in look(f"<body>{clean}{''.join(faults.values())}</body>", tmp_path):
        assert set(faults) <= set(answer["found"])
