"""What the report says of the protocol: gate, rollbacks, errors, classes and compressed forms."""

import re
from typing import Any

import pytest
from matplotlib.text import Text

from neural_layers.distill.recipes.table import print_table
from neural_layers.distill.report.analysis_plots import length_plot, reliability_plot
from neural_layers.distill.report.costs import compression_plot
from neural_layers.distill.report.curves import loss_plot, quality_plot, score_plot, validated_scores
from neural_layers.distill.report.rollbacks import kept_and_given_up, rollback_lines
from neural_layers.distill.report.sections import class_section
from neural_layers.distill.report.tables import compression_table, example_table, fault_table, quality_table
from neural_layers.distill.report.verdict import judge
from tests.distill.report_samples import CLASSES, classification_report, translation_report


@pytest.fixture(scope="module")
def translation() -> dict[str, Any]:
    return translation_report()


@pytest.fixture(scope="module")
def classification() -> dict[str, Any]:
    return classification_report()


def _cells(html: str) -> list[list[str]]:
    """The texts of a table's rows."""
    rows = re.findall(r"<tr.*?</tr>", html, re.DOTALL)
    return [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)] for row in rows]


def test_going_back_splits_a_log_into_what_was_kept_and_what_was_given_up() -> None:
    log = [(1, 0.1), (2, 0.2), (3, 0.9), (4, 0.8), (3, 0.3), (4, 0.7), (4, 0.4), (5, 0.5)]
    kept, given_up = kept_and_given_up([(float(step), value) for step, value in log])
    assert [value for _, value in kept] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert [[value for _, value in line] for line in given_up] == [[0.2, 0.9, 0.8], [0.3, 0.7]]
    assert kept_and_given_up([(2.0, 1.0), (2.0, 0.5)]) == ([(2.0, 0.5)], [[(2.0, 1.0)]])
    assert kept_and_given_up([]) == ([], [])


def test_rollbacks_are_marked_at_their_steps_in_every_curve_of_the_student(translation: dict[str, Any]) -> None:
    for axes in (
        quality_plot(translation).axes[0],
        score_plot(translation, "ter").axes[0],
        loss_plot(translation).axes[0],
    ):
        triangles = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "v"]
        assert triangles == [4000, 7000]
        verticals = [line.get_xdata()[0] for line in axes.lines if list(line.get_xdata()) in ([4000] * 2, [7000] * 2)]
        assert verticals == [4000, 7000]
        arrows = [(text.xyann[0], text.xy[0]) for text in axes.texts if text.get_text() == "" and text.arrow_patch]
        assert arrows == [(4000, 3000), (7000, 6000)]
        assert [text.get_text() for text in axes.texts if re.fullmatch(r"R\d", text.get_text())] == ["R1", "R2"]
        assert any(line.get_marker() == "x" and line.get_xdata()[-1] == 4000 for line in axes.lines)
    assert not [line for line in loss_plot(translation).axes[1].lines if line.get_marker() == "v"]
    assert rollback_lines(translation)[0] == (
        "R1: at step 4,000 back to step 3,000, learning rate from then on × 0.5 (BLEU 18.2 after 24.1, a difference "
        "between -7.3 and -4.4 (95 %))."
    )


def test_marks_and_names_do_not_overlap_though_rollbacks_follow_closely(classification: dict[str, Any]) -> None:
    for figure in (quality_plot(classification), loss_plot(classification), compression_plot(classification)):
        figure.draw_without_rendering()
        for axes in figure.axes:
            # Annotation.get_window_extent would add the line that joins the text to its place.
            texts = [text for text in [*axes.texts, axes._left_title] if text.get_text()]
            boxes = [Text.get_window_extent(text) for text in texts]
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
            assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height for box in boxes)


def test_every_validated_score_has_its_curve(translation: dict[str, Any], classification: dict[str, Any]) -> None:
    assert validated_scores(translation) == [
        "bleu", "chrf", "ter", "rouge1", "rouge2", "rougeL", "exact_match", "length_ratio",
    ]  # fmt: skip
    assert validated_scores(classification) == ["accuracy", "macro_f1", "calibration_error", "loss"]
    axes = score_plot(classification, "macro_f1").axes[0]
    assert axes.get_ylabel() == "validation macro-F1, %"
    entries = classification["validation"]["student"]
    student = next(line for line in axes.lines if line.get_linestyle() == "-")
    assert list(student.get_ydata()) == pytest.approx([100 * entry["macro_f1"] for entry in entries])
    assert "teacher 90.0" in [text.get_text() for text in axes.texts]


def test_the_gates_threshold_decides_not_a_constant(translation: dict[str, Any]) -> None:
    strict = {
        **translation,
        "gate": {**translation["gate"], "min_retention": 0.975, "passed": False, "failed": ["bleu"]},
    }
    assert judge(translation).status == "kept"
    verdict = judge(strict)
    assert (verdict.status, verdict.mark) == (
        "lost",
        "Quality not kept (the threshold is 97.5 % of the teacher's BLEU)",
    )
    assert verdict.sentence.startswith("The student keeps only 95.7 % of the teacher's BLEU")
    other = {**translation, "gate": {**translation["gate"], "passed": False, "failed": ["chrf"]}}
    assert judge(other).mark.startswith("Quality not kept: chrF")
    untold = {**strict, "retention": {**translation["retention"], "bleu": None}}
    assert judge(untold).status == "unknown"
    untold["gate"] = {**untold["gate"], "failed": ["bleu", "chrf"]}
    assert judge(untold).mark.startswith("Quality not kept: chrF (")
    named = {**translation, "gate": {**translation["gate"], "metric": "chrf"}}
    assert "of the teacher's chrF" in judge(named).sentence


def test_the_gate_is_told_in_words(translation: dict[str, Any], classification: dict[str, Any]) -> None:
    remarks = judge(translation).remarks
    assert "The gate passed the student, which was to keep 90 % of the teacher's quality." in remarks
    assert "The training ran to its end: 2 rollbacks were made; the best validation was at step 9,000." in remarks
    verdict = judge(classification)
    assert verdict.sentence == (
        "The student keeps only 87.1 % of the teacher's accuracy with 4.6 times fewer parameters."
    )
    text = " ".join(verdict.remarks)
    assert (
        "The gate failed the student, which was to keep 90 % of the teacher's quality; it fell short in accuracy."
        in text
    )
    assert "The gate stopped the training: 3 rollbacks were made, as many as it allows" in text
    assert "reaches 74.0 % accuracy: the distillation gains 7.0 points of accuracy." in text


def test_quality_table_shows_what_is_kept_with_its_interval(classification: dict[str, Any]) -> None:
    rows = _cells(quality_table(classification))
    assert rows[0] == ["score", "teacher", "student", "baseline", "kept, %", "kept: 95 % interval"]
    assert rows[1] == ["accuracy, %", "93.0", "81.0", "74.0", "87.1", "85.0 – 89.0"]
    assert rows[3] == ["calibration error, % (lower is better)", "3.8", "6.8", "8.6", "56.0", "–"]


def test_compressed_forms_stand_with_what_they_keep(translation: dict[str, Any]) -> None:
    rows = {row[0].split("as")[0]: row[1:] for row in _cells(compression_table(translation))[1:]}
    assert rows["student"] == [
        "passed", "31.7", "96.0", "100.0", "12.5", "12.4", "7.78", "14.8", "20.2", "28.9",
    ]  # fmt: skip
    nf4 = next(row for name, row in rows.items() if name.startswith("nf4"))
    assert nf4[:4] == ["failed", "28.8", "87.4", "91.0"]
    unmade = next(row for name, row in rows.items() if name.startswith("onnx-int4"))
    assert unmade == ["failed", *["–"] * 9]
    upper, lower = compression_plot(translation).axes
    for axes in (upper, lower):
        faces = {line.get_marker(): line.get_markerfacecolor() for line in axes.lines if line.get_linestyle() == "None"}
        assert len(faces) == 6
        assert [marker for marker, face in faces.items() if face == "none"] == ["D"]
        assert {"nf4 (failed)", "onnx-int8", "asked for 29.8"} <= {text.get_text() for text in axes.texts}
    sizes = {line.get_marker(): line.get_xdata()[0] for line in upper.lines if line.get_linestyle() == "None"}
    assert sizes["^"] == pytest.approx(translation["models"]["teacher"]["file_bytes"] / 1e6)


def test_errors_are_broken_down(translation: dict[str, Any]) -> None:
    axes = length_plot(translation["analysis"]["by_length"]).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()][::4] == ["1–10\n310", "41 +\n70"]
    assert [list(line.get_ydata()) for line in axes.lines] == [
        [60.0, 57.0, 54.0, 51.0, 48.0],
        [58.5, 54.5, 50.5, 46.5, 42.5],
    ]
    gap = [{**translation["analysis"]["by_length"][0], "sentences": 0, "teacher": None, "student": None}]
    assert not length_plot(gap).axes[0].lines
    assert _cells(fault_table(translation["analysis"]))[1:] == [
        ["copies of the source", "0.1", "0.3"], ["repetitions", "0.4", "2.1"], ["empty translations", "0.0", "0.1"],
    ]  # fmt: skip


def test_classes_and_confusions_are_complete(classification: dict[str, Any]) -> None:
    page = class_section(classification)
    matrices = page.split('<div class="matrices">')[1].split("<h3>")[0]
    cells = [row[1:] for row in _cells(matrices) if len(row) == 11 and row[0]]
    expected = [
        row for name in ("teacher", "student", "baseline") for row in classification["classes"]["confusion"][name]
    ]
    assert [[int(cell) for cell in row] for row in cells] == expected
    assert matrices.count('class="right"') == 3 * len(CLASSES)
    per_class = next(row for row in _cells(page) if row[0] == "considerations" and len(row) == 11)
    assert per_class == ["considerations", "12", "91.0", "79.0", "–", "91.0", "79.0", "–", "91.0", "79.0", "–"]
    wrong = [row for row in _cells(example_table(classification)) if row[0] == "worst"]
    assert [row[4] for row in wrong] == ["complications (wrong)", "considerations (wrong)"]
    assert wrong[0][5] == "93.0"


def test_reliability_is_drawn_where_there_are_texts(classification: dict[str, Any]) -> None:
    upper, lower = reliability_plot(classification["classes"]["reliability"]).axes
    lines = {line.get_marker(): line for line in upper.lines}
    assert list(lines["o"].get_xdata()) == pytest.approx([15.5 + 10 * i for i in range(9)])
    heights = [bar.get_height() for bar in lower.patches if not bar.get_hatch()]
    assert sum(heights) == pytest.approx(100)
    assert {bar.get_hatch() for bar in lower.patches} == {None, "///", "..."}


def test_the_table_of_the_command_line_knows_every_kind(
    translation: dict[str, Any], classification: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    print_table(classification)
    said = " ".join(capsys.readouterr().out.split())
    for expected in (
        "accuracy, %",
        "macro-F1, %",
        "81.0",
        "the student keeps 87.1 % of the teacher's accuracy",
        "failed",
    ):
        assert expected in said
    print_table(translation)
    said = " ".join(capsys.readouterr().out.split())
    for expected in ("BLEU", "chrF", "onnx-int8", "nf4 │ failed", "95.7 % of the teacher's BLEU", "2 rollbacks"):
        assert expected in said
