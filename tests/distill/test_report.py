"""The report page: complete, self-contained, honest, and never half written."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text

from neural_layers.distill.report import cost_plot, loss_plot, quality_plot, render_report, write_report
from neural_layers.distill.report import page as page_module
from neural_layers.distill.report import write as write_module
from neural_layers.distill.report.line_labels import spread
from neural_layers.distill.report.numbers import digits, duration, percent, times
from neural_layers.distill.report.style import PALETTE
from neural_layers.distill.report.verdict import judge

VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = "<script>alert(\"x\")</script> & 'q' </td>"


def _model(parameters: int, bleu: float, training: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "parameters": parameters, "file_bytes": 4 * parameters + 7, "memory_bytes": 5 * parameters,
        "latency_ms": {"p50": parameters / 1e6, "p95": parameters / 6e5},
        "quality": {"bleu": bleu, "chrf": bleu + 20.5, "ter": 87.3 - bleu, "exact_match": bleu / 200},
        "training": training,
    }  # fmt: skip


def _log(parts: tuple[str, ...], steps: int) -> list[dict[str, Any]]:
    values = {part: 1.0 + i for i, part in enumerate(parts)}
    return [{"step": step, "learning_rate": 1e-3, **values} for step in range(1, steps + 1)]


def _report(teacher: float = 40.0, student: float = 38.9, baseline: float | None = 33.4) -> dict[str, Any]:
    validation = [{"step": step, "bleu": 0.7 * step, "chrf": 50.0, "ter": 50.0} for step in (10, 20, 30)]
    example = {
        "source": "Guten Tag",
        "reference": "good day",
        "teacher": "hello",
        "student": "day",
        "student_chrf": 9.5,
    }
    report: dict[str, Any] = {
        "title": "A sample", "created": "2025-11-21T08:30:00", "command": "neural-layers distill --seed 7",
        "preset": "tiny", "seed": 7, "seconds": 3723.0, "versions": {"python": "3.11.9", "torch": "2.10.0"},
        "hyperparameters": {"optimizer": {"name": "adamw", "betas": [0.9, 0.98]}, "dropout": None},
        "data": {"name": "corpus", "train": 120_345, "valid": 2_011, "test": 1_999},
        "models": {
            "teacher": _model(61_234_567, teacher, {"steps": 54_321, "seconds": 7384.0}),
            "student": _model(14_912_345, student, {"steps": 12_345, "seconds": 61.0}),
        },
        "retention": {"bleu": student / teacher if teacher else None, "chrf": 0.97},
        "validation": {"teacher": [], "student": validation},
        "training_log": {
            "teacher": _log(("loss",), 3),
            "student": _log(("loss", "kl", "hard", "cosine", "mse"), 3),
        },
        "examples": [{**example, "kind": "random"}, {**example, "kind": "worst", "student": "", "student_chrf": 0.0}],
    }  # fmt: skip
    if baseline is not None:
        report["models"]["baseline"] = _model(14_912_345, baseline, {"steps": 12_346, "seconds": 62.0})
        report["validation"]["baseline"] = validation
        report["training_log"]["baseline"] = _log(("loss",), 3)
    return report


class _Page(HTMLParser):
    """The page's text, and its attributes; fails on tags that do not close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, *attr) for attr in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, *attr) for attr in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def source() -> str:
    """The page of the unchanged sample."""
    page: str = render_report(_report())
    return page


def _row(page: _Page, name: str) -> list[str]:
    return next(row for row in page.rows if row[0].startswith(name))


def test_page_is_balanced_and_loads_nothing_from_outside(source: str) -> None:
    page = _Page(source)
    assert source.startswith("<!DOCTYPE html>")
    assert "://" not in source
    assert not re.search(r"@import|url\((?!#)", source)
    links = [
        value or "" for _, name, value in page.attributes if name.split(":")[-1] in ("src", "href", "srcset", "data")
    ]
    assert links
    assert all(link.startswith("#") for link in links)
    tags = {tag for tag, *_ in page.attributes}
    assert tags.isdisjoint({"script", "link", "iframe", "img", "object"})


def test_every_reference_in_the_plots_meets_exactly_one_id(source: str) -> None:
    page = _Page(source)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for _, name, value in page.attributes if name == "href" and value}
    used |= {match for _, _, value in page.attributes for match in re.findall(r"url\(#([^)]*)\)", value or "")}
    assert used
    assert used <= set(ids)


def test_markup_in_data_is_escaped_everywhere() -> None:
    report = _report()
    report.update(title=HOSTILE, command=HOSTILE, preset=HOSTILE, created=HOSTILE)
    report["versions"] = {HOSTILE: HOSTILE}
    report["hyperparameters"] = {HOSTILE: {"inner": HOSTILE, "list": [HOSTILE]}}
    report["data"]["name"] = HOSTILE
    for example in report["examples"]:
        example.update(dict.fromkeys(("kind", "source", "reference", "teacher", "student"), HOSTILE))
    source = render_report(report)
    assert "<script" not in source
    page = _Page(source)
    assert "".join(page.text).count(HOSTILE) >= 15
    assert _row(page, HOSTILE)[1:5] == [HOSTILE] * 4


def test_tables_show_every_number_with_its_unit(source: str) -> None:
    page = _Page(source)
    header = next(row for row in page.rows if row[0] == "model")
    assert dict(zip(header, _row(page, "teacher"), strict=True)) == {
        "model": "teacher", "parameters": "61,234,567", "file size, MB": "245", "memory, MB": "306",
        "latency p50, ms per sentence": "61.2", "latency p95, ms per sentence": "102", "training steps": "54,321",
        "training time, h:mm:ss": "2:03:04",
    }  # fmt: skip
    assert _row(page, "student") == ["student", "14,912,345", "59.6", "74.6", "14.9", "24.9", "12,345", "0:01:01"]
    assert _row(page, "baseline")[0] == "baselinethe same student trained without the teacher"
    assert page.rows[:5] == [
        ["score", "teacher", "student", "baseline", "kept, %"],
        ["BLEU", "40.0", "38.9", "33.4", "97.2"],
        ["chrF", "60.5", "59.4", "53.9", "97.0"],
        ["TER (lower is better)", "47.3", "48.4", "53.9", "–"],
        ["exact match, %", "20.0", "19.4", "16.7", "–"],
    ]


def test_a_given_teacher_and_a_missing_baseline_read_so() -> None:
    report = _report(baseline=None)
    report["models"]["teacher"]["training"] = None
    page = _Page(render_report(report))
    assert _row(page, "teacher")[-2:] == ["given", "given"]
    assert "baseline" not in "".join(page.text).lower()


def test_examples_show_the_worst_first_and_mark_an_empty_translation(source: str) -> None:
    page = _Page(source)
    picked = [row for row in page.rows if row[0] in ("worst", "random")]
    assert picked[0] == ["worst", "Guten Tag", "good day", "hello", "(empty)", "0.0"]
    assert picked[1] == ["random", "Guten Tag", "good day", "hello", "day", "9.5"]


def test_the_making_is_told_in_full(source: str) -> None:
    page = _Page(source)
    text = "".join(page.text)
    for expected in ("neural-layers distill --seed 7", "120,345 / 2,011 / 1,999", "3,723 s (1:02:03 h:mm:ss)"):
        assert expected in text
    rows = [row for row in page.rows if len(row) == 2]
    assert ["versions", "python 3.11.9, torch 2.10.0"] in rows
    assert ["optimizer.name", "adamw"] in rows
    assert ["optimizer.betas", "[0.9, 0.98]"] in rows
    assert ["dropout", "null"] in rows
    order = [text.index(part) for part in ("The student keeps", "Teacher and student", "Cost", "Training", "Examples")]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("teacher", "student", "status", "sentence"),
    [
        (40.0, 38.9, "kept", "The student keeps 97.2 % of the teacher's BLEU with 4.1 times fewer parameters."),
        (40.0, 36.0, "kept", "The student keeps 90.0 % of the teacher's BLEU with 4.1 times fewer parameters."),
        (40.0, 35.99, "lost", "The student keeps only 89.9 % of the teacher's BLEU with 4.1 times fewer parameters."),
        (40.0, 24.8, "lost", "The student keeps only 62.0 % of the teacher's BLEU with 4.1 times fewer parameters."),
        (40.0, 40.0, "kept", "The student matches the teacher's BLEU with 4.1 times fewer parameters."),
        (
            40.0, 42.0, "better",
            "The student is better than the teacher (42.0 against 40.0 BLEU, 105.0 %) with 4.1 times fewer parameters.",
        ),
        (
            0.0, 3.2, "unknown",
            "The teacher's BLEU is 0, so no share of it can be kept; "
            "the student reaches 3.2 BLEU with 4.1 times fewer parameters.",
        ),
    ],
)  # fmt: skip
def test_verdict_says_what_happened(teacher: float, student: float, status: str, sentence: str) -> None:
    verdict = judge(_report(teacher, student))
    assert (verdict.status, verdict.sentence) == (status, sentence)


@pytest.mark.usefixtures("without_plots")
def test_page_shows_the_verdict_with_its_mark_and_remarks() -> None:
    report = _report(40.0, 24.8)
    text = [part.replace("\xa0", " ") for part in _Page(render_report(report)).text]
    verdict = judge(report)
    assert {verdict.sentence, verdict.mark, *verdict.remarks} <= set(text)


def test_verdict_marks_tell_kept_from_lost_without_colour() -> None:
    marks = {judge(_report(40.0, student)).mark.split(" (")[0] for student in (42.0, 38.0, 20.0)}
    assert marks == {"Quality kept and exceeded", "Quality kept", "Quality not kept"}


@pytest.mark.parametrize(
    ("parameters", "phrase"),
    [(14_900_000, "with about as many"), (29_824_690, "with 2.0 times as many parameters"), (0, "teacher's BLEU.")],
)
def test_verdict_does_not_praise_a_student_that_is_no_smaller(parameters: int, phrase: str) -> None:
    report = _report()
    report["models"]["teacher"]["parameters"], report["models"]["student"]["parameters"] = 14_912_345, parameters
    assert phrase in judge(report).sentence


@pytest.mark.parametrize(
    ("baseline", "remark"), [(33.4, "gains 5.5 BLEU"), (39.9, "costs 1.0 BLEU"), (38.92, "did not help")]
)
def test_verdict_compares_with_the_baseline(baseline: float, remark: str) -> None:
    assert remark in judge(_report(baseline=baseline)).remarks[-1]


def test_verdict_names_a_weak_teacher() -> None:
    assert any("weak" in remark for remark in judge(_report(4.0, 3.9)).remarks)
    assert not any("weak" in remark for remark in judge(_report()).remarks)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("points", [0, 1])
def test_a_run_without_logs_or_with_one_point_of_zeros_renders(points: int) -> None:
    report = _report(0.0, 0.0, baseline=None if points else 0.0)
    report["retention"] = {"bleu": None, "chrf": None}
    for model in report["models"].values():
        model.update(parameters=0, file_bytes=0, memory_bytes=0, latency_ms={"p50": 0.0, "p95": 0.0})
        model["quality"] = dict.fromkeys(("bleu", "chrf", "ter", "exact_match"), 0.0)
    zeros = {"step": 0, "bleu": 0.0, "chrf": 0.0, "ter": 0.0}
    losses = {"step": 0, "loss": 0.0, "learning_rate": 0.0, "kl": 0.0, "hard": 0.0}
    report["validation"] = {name: [zeros] * points for name in ("teacher", "student", "baseline")}
    report["training_log"] = {name: [losses] * points for name in ("teacher", "student", "baseline")}
    report.update(examples=[], hyperparameters={}, versions={})
    page = _Page(render_report(report))
    assert "No examples were kept." in page.text
    notices = [text.get_text() for plot in (quality_plot, loss_plot) for ax in plot(report).axes for text in ax.texts]
    assert notices.count("no training was logged") == (0 if points else 1)
    assert notices.count("no validation was logged") == (0 if points else 1)


def test_plots_have_labelled_axes() -> None:
    labels = {
        plot.__name__: [(axes.get_xlabel(), axes.get_ylabel()) for axes in plot(_report()).axes]
        for plot in (quality_plot, loss_plot, cost_plot)
    }
    assert labels == {
        "quality_plot": [("training step", "validation BLEU")],
        "loss_plot": [("training step", "training loss")] * 2,
        "cost_plot": [("file size, MB", ""), ("latency per sentence, ms", "")],
    }
    bars = [[label.get_text() for label in axes.get_yticklabels()] for axes in cost_plot(_report()).axes]
    assert bars == [["teacher", "student"]] * 2


def test_plots_draw_the_logged_values() -> None:
    report = _report()
    lines = {line.get_linestyle(): line for line in quality_plot(report).axes[0].lines}
    assert list(lines["-"].get_xdata()) == [10, 20, 30]
    assert list(lines["-"].get_ydata()) == pytest.approx([7.0, 14.0, 21.0])
    texts = [text.get_text() for text in quality_plot(report).axes[0].texts]
    assert sorted(texts) == ["baseline 21.0", "student 21.0", "teacher 40.0"]
    report["validation"]["teacher"] = [{"step": 5, "bleu": 41.5, "chrf": 0.0, "ter": 0.0}]
    assert "teacher 41.5" in [text.get_text() for text in quality_plot(report).axes[0].texts]
    upper, lower = loss_plot(report).axes
    parts = ["loss 1.00", "KL 2.00", "hard 3.00", "cosine 4.00", "MSE 5.00"]
    assert [text.get_text() for text in sorted(upper.texts, key=lambda text: text.xy[1])] == parts
    assert sorted(text.get_text() for text in lower.texts) == ["baseline 1.00", "teacher 1.00"]


def test_losses_of_a_teacher_that_was_given_take_no_panel() -> None:
    report = _report()
    report["training_log"]["teacher"] = []
    assert loss_plot(report).axes[1].get_title(loc="left") == "baseline: loss"
    del report["training_log"]["baseline"]
    assert len(loss_plot(report).axes) == 1


def test_a_long_log_is_thinned_to_means_and_keeps_its_last_step() -> None:
    report = _report()
    report["training_log"]["student"] = [{"step": i, "loss": float(i % 2), "learning_rate": 0.0} for i in range(5001)]
    (line,) = loss_plot(report).axes[0].lines
    assert len(line.get_xdata()) <= 200
    assert line.get_xdata()[-1] == 5000
    assert line.get_ydata()[:-1] == pytest.approx([0.5] * (len(line.get_ydata()) - 1), abs=0.05)


@pytest.mark.parametrize("ends", [[40.0, 40.0, 40.0], [0.0, 0.1, 39.9], [39.0, 40.0, 39.5]])
def test_labels_at_line_ends_do_not_overlap(ends: list[float]) -> None:
    report = _report(teacher=ends[0])
    for name, bleu in zip(("student", "baseline"), ends[1:], strict=True):
        report["validation"][name] = [{"step": 10, "bleu": bleu, "chrf": 0.0, "ter": 0.0}]
    figure = quality_plot(report)
    figure.draw_without_rendering()
    # Annotation.get_window_extent would add the line that joins the text to its end.
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]
    assert len(boxes) == 3
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height for box in boxes)


def test_spread_keeps_gaps_and_stays_inside() -> None:
    assert spread([0.2, 0.8], 0.1) == [0.2, 0.8]
    assert spread([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])
    assert spread([1.0, 1.0, 1.0], 0.25) == pytest.approx([0.5, 0.75, 1.0])
    assert spread([0.3, 0.3, 0.3], 5.0) == pytest.approx([0.0, 0.5, 1.0])
    assert spread([], 0.1) == []


def test_numbers_read_sensibly() -> None:
    assert [digits(v) for v in (0, 0.01234, 1.2345, 12345.6, 3e-7)] == ["0", "0.0123", "1.23", "12,346", "3.00e-07"]
    assert [duration(v) for v in (0, 59.6, 3661, 360_000)] == ["0:00:00", "0:01:00", "1:01:01", "100:00:00"]
    assert [times(4.106), times(99.96), percent(0.9727)] == ["4.1", "100", "97.3"]


@pytest.mark.parametrize("page", [0, 1], ids=["light", "dark"])
def test_every_text_colour_is_legible(page: int) -> None:
    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert len({pair[0] for pair in PALETTE.values()}) == len(PALETTE)
    for ground in ("paper", "panel"):
        for name in PALETTE.keys() - {"paper", "panel", "line"}:
            darker, lighter = sorted(luminance(PALETTE[one][page]) for one in (ground, name))
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, f"{name} on {ground}"  # WCAG 2.2, 1.4.3


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without plots, where they are not what is looked at: drawing takes seconds."""
    for section in ("cost_section", "training_section"):
        monkeypatch.setattr(page_module, section, lambda report: "")


@pytest.mark.usefixtures("without_plots")
def test_report_is_written_as_given(tmp_path: Path) -> None:
    report = _report()
    paths = write_report(tmp_path / "new" / "folder", copy.deepcopy(report))
    assert [path.name for path in paths] == ["report.json", "report.html"]
    assert json.loads(paths[0].read_text(encoding="utf-8")) == report
    assert paths[1].read_text(encoding="utf-8") == render_report(report)
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["report.html", "report.json"]


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize("failure", ["rendering", "a number that is no number", "writing", "renaming"])
def test_an_existing_report_survives_a_failure(failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in write_report(tmp_path, _report())}
    report = _report(student=20.0)
    if failure == "rendering":
        del report["models"]["student"]["quality"]
    elif failure == "a number that is no number":
        report["models"]["student"]["quality"]["ter"] = float("nan")
    elif failure == "writing":
        monkeypatch.setattr(write_module, "render_report", lambda report: "\ud800 cannot be encoded")
    else:
        monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises((KeyError, ValueError, OSError)):
        write_report(tmp_path, report)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_json_is_the_last_that_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that has it counts as finished, and so must have its page."""

    def killed(path: Path, content: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(write_module, "save_json", killed)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path, _report())
    assert {path.name for path in tmp_path.iterdir()} == {"report.html"}
