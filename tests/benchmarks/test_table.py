"""The tables: medians, spread and ratios as measured, and nobody silently left out."""

import pytest

from neural_layers.benchmarks.table import headings, markdown_table, number, print_tables, remarks, rows, title
from tests.benchmarks.sample import sample, times

CASE = sample()["cases"][0]


def test_each_size_has_its_contenders_and_the_limit_in_rows() -> None:
    assert headings(CASE) == [*["T", "contender", "fwd ms", "±", "×", "f+b ms", "±", "×", "fwd MB", "×", "f+b MB", "×"]]
    first, second = rows(CASE)
    assert [line[0] for line in first] == ["512", "", "", "", "", ""]
    assert [line[1] for line in second] == [*CASE["rows"][1]["contenders"], "limit"]
    assert {len(line) for block in (first, second) for line in block} == {12}


def test_ratios_are_the_contenders_share_of_our_default() -> None:
    first, second = rows(CASE)
    native, torch, mambapy, transformers, _, limit = first
    assert native[2:] == ["10.0", "10%", "1.0", "50.0", "0%", "1.0", "10.0", "1.0", "20.0", "1.0"]
    assert torch[4] == "10"
    assert mambapy[2:] == ["620", "1 run", "62", "4000", "0%", "80", "100", "10", "260", "13"]
    assert transformers[5:8] == ["", "", ""]
    assert transformers[8:] == ["90.0", "9.0", "", ""]
    assert limit[2:] == ["7.00", "0%", "0.70", "", "", "", "", "", "", ""]
    assert second[4][2:] == ["failed", "", "", "failed", "", "", "", "", "", ""]


def test_everybody_who_is_not_in_a_table_is_named_below_it() -> None:
    assert remarks(CASE) == [
        "limit: the exponentials alone",
        "transformers: no backward: quadratic in T",
        "fragile: not run at T 2048: RuntimeError: no kernel",
        "neural_layers torch: not the default: rounds",
        "neural_layers triton: not timed: needs a GPU",
        "mamba_ssm: absent: runs on cuda only",
    ]


def test_memory_below_what_can_be_measured_gives_a_lower_bound() -> None:
    case = sample()["cases"][0]
    for row in case["rows"]:
        row["contenders"]["neural_layers native"]["memory"] = {"forward": 0.1, "both": 20.0}
    native, torch = rows(case)[0][:2]
    assert native[8:] == ["<1", "", "20.0", "1.0"]
    assert torch[8:10] == ["10.0", ">10"]


def test_columns_of_backward_are_left_out_where_nobody_has_one() -> None:
    case = sample()["cases"][0]
    for row in case["rows"]:
        for entry in row["contenders"].values():
            entry.pop("both", None)
    assert headings(case) == ["T", "contender", "fwd ms", "±", "×", "fwd MB", "×"]


def test_a_size_whose_inputs_cannot_be_made_is_named() -> None:
    case = {**CASE, "failed": {"9999": "MemoryError: too much"}}
    assert "not run at T 9999: MemoryError: too much" in remarks(case)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (0.5, "0.500"), (1.234, "1.23"), (16.14, "16.1"), (104, "104"), (12345.6, "12346")],
)
def test_numbers_show_three_digits(value, text) -> None:
    assert number(value) == text


def test_the_title_names_what_is_the_same_in_all_rows() -> None:
    assert title(CASE, sample()) == "selective_scan: B 1, E 8, float32, 1 thread"
    assert title(CASE, sample(threads=2)).endswith("2 threads")


def test_printed_tables_fit_100_columns(capsys) -> None:
    print_tables(sample())
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    for text in ("mambapy", "62", "1 run", "limit", "fragile: not run at T 2048", "mamba_ssm: absent"):
        assert text in printed


def test_markdown_has_a_row_for_each_contender_of_each_size() -> None:
    lines = markdown_table(CASE).splitlines()
    assert len(lines) == 2 + 2 * 6
    assert {line.count("|") for line in lines} == {13}
    assert lines[2].startswith("| **512** | **neural_layers native** | 10.0 |")


def test_a_contender_of_one_reading_has_no_spread() -> None:
    assert times(1.0, count=1)["count"] == 1
    assert rows(CASE)[0][2][3] == "1 run"
