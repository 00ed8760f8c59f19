"""Writing the report so that a reader never meets half of one."""

import json
from pathlib import Path
from typing import Any

from neural_layers.distill.files import replacing, save_json
from neural_layers.distill.report.page import render_report


def write_report(folder: Path, report: dict[str, Any]) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into a folder, which is made where it is missing, and return their paths.

    Both texts are complete before the first file is touched, and each is written beside its place and then renamed:
    an existing report survives whatever fails. Raises ValueError for NaN or infinity, TypeError for what JSON cannot
    hold, KeyError for a missing entry.
    """
    json_path, html_path = folder / "report.json", folder / "report.html"
    page = render_report(report)
    folder.mkdir(parents=True, exist_ok=True)
    json.dumps(report, allow_nan=False)
    with replacing(html_path) as beside:
        beside.write_text(page, encoding="utf-8")
    save_json(json_path, report)  # last: a run with this file is finished
    return json_path, html_path
