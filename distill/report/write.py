"""Writing the report so that a reader never meets half of one."""

import json
import os
from pathlib import Path
from typing import Any

from neural_layers.distill.report.page import render_report


def write_report(folder: Path, report: dict[str, Any]) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into a folder, which is made where it is missing, and return their paths.

    Both texts are complete before the first file is touched, and each is written beside its place and then renamed:
    an existing report survives whatever fails. Raises ValueError for NaN or infinity, TypeError for what JSON cannot
    hold, KeyError for a missing entry.
    """
    texts = {
        folder / "report.json": json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        folder / "report.html": render_report(report),
    }
    folder.mkdir(parents=True, exist_ok=True)
    beside = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in texts}
    try:
        for path, content in texts.items():
            beside[path].write_text(content, encoding="utf-8")
        for path, temporary in beside.items():
            os.replace(temporary, path)
    finally:
        for temporary in beside.values():
            temporary.unlink(missing_ok=True)
    json_path, html_path = texts
    return json_path, html_path
