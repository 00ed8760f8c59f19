"""docs/benchmarks.md: what the recorded results give, and nothing by hand."""

import copy
import json
import re

import pytest

from neural_layers.benchmarks import docs
from neural_layers.benchmarks.plots import plot_case, png
from neural_layers.benchmarks.record import RESULTS, plot_name, read_result, stem, write_result
from neural_layers.benchmarks.table import title
from neural_layers.errors import InputError
from tests.benchmarks.sample import sample


def test_the_page_equals_what_the_recorded_results_give() -> None:
    assert docs.PAGE.read_text(encoding="utf-8") == docs.page(), "make bench-docs writes it"


def test_every_picture_of_the_page_is_there() -> None:
    for link in re.findall(r"!\[[^]]*\]\(([^)]*)\)", docs.PAGE.read_text(encoding="utf-8")):
        assert (docs.PAGE.parent / link).is_file(), link


def test_every_recorded_result_can_be_read_and_names_its_date_and_commit() -> None:
    for path in RESULTS.glob("*/*.json"):
        result = read_result(path)
        assert path.stem == stem(result)
        assert result["environment"]["date"]
        assert result["environment"]["commit"]


def test_a_page_holds_tables_pictures_calls_and_the_environment(tmp_path) -> None:
    results, folder = tmp_path / "results", tmp_path / "docs"
    for threads in (1, 2):
        write_result(results / "some-cpu", sample(threads=threads))
    page = docs.page(results, folder)
    assert "## some-cpu" in page
    assert "Some CPU, 2 cores; avx2, fma" in page
    assert "2026-01-02; commit abcdef123456; load 0.1; C kernels: avx2" in page
    assert page.index("### selective_scan\n") < page.index("### selective_scan, 2 threads")
    for picture in ("selective_scan.png", "selective_scan-2-threads.png"):
        assert f"](../results/some-cpu/{picture})" in page
        assert (results / "some-cpu" / picture).is_file()
    assert "- mambapy: `pscan`" in page
    assert "- mamba_ssm: absent: runs on cuda only" in page
    assert docs.page(results, folder) == page


def test_ops_stand_in_the_tables_order_and_a_quick_result_says_so(tmp_path) -> None:
    for op in ("rms_norm", "selective_scan"):
        write_result(tmp_path / "a", {**sample(op), "effort": "quick"})
    page = docs.page(tmp_path, tmp_path)
    assert page.index("### selective_scan") < page.index("### rms_norm")
    assert page.count("few repeats (`--quick`)") == 2


def test_without_results_the_page_is_its_introduction(tmp_path) -> None:
    assert docs.page(tmp_path / "none", tmp_path) == docs.INTRODUCTION


def test_the_same_result_gives_the_same_picture() -> None:
    result = sample()
    first, second = (png(plot_case(result["cases"][0], title(result["cases"][0], result))) for _ in range(2))
    assert first == second
    assert first.startswith(b"\x89PNG")


def test_a_case_of_one_size_has_no_picture(tmp_path) -> None:
    result = sample()
    result["cases"][0]["rows"] = result["cases"][0]["rows"][:1]
    assert [path.name for path in write_result(tmp_path / "machine", result)] == ["selective_scan.json"]
    assert "![" not in docs.page(tmp_path, tmp_path)


def test_lines_of_a_picture_are_named_and_memory_is_of_one_kind() -> None:
    figure = plot_case(sample()["cases"][0], "title")
    labels = [[line.get_label() for line in axes.get_lines()] for axes in figure.axes]
    assert "limit: the exponentials alone" in labels[0]
    assert "transformers" in labels[0]
    # Its memory is that of the forward alone, which must not stand beside forward + backward.
    assert "transformers" not in labels[2]
    assert "mambapy" in labels[2]


def test_a_result_of_another_format_is_refused(tmp_path) -> None:
    path = tmp_path / "x.json"
    for content, message in (("{}", "no benchmark results"), ("nonsense", "no benchmark results")):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            read_result(path)
    changed = copy.deepcopy(sample())
    changed["format"] = 99
    path.write_text(json.dumps(changed))
    with pytest.raises(InputError, match="has format 99"):
        read_result(path)


def test_pictures_are_named_by_case_and_threads() -> None:
    result = sample(threads=2)
    assert plot_name(result["cases"][0], result) == "selective_scan-2-threads.png"
    assert stem(result) == "selective_scan-2-threads"
