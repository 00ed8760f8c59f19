"""Where translations go wrong, on sentences of which that is known."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
pytest.importorskip("rouge_score", reason="rouge-score is not installed")

from sacrebleu.metrics import CHRF

from neural_layers.distill.validation import TranslationScorer
from neural_layers.distill.validation.analysis import analyse, by_length, has_loop, is_copy, worst
from neural_layers.distill.validation.measures import mean_measure
from neural_layers.distill.validation.words import word_counts

SOURCES = ["a dog", "the man sees", "x y", "the old man sees a rare zebra", "Anna", "go go go"]
REFERENCES = ["ein Hund", "der Mann sieht", "x z", "der alte Mann sieht ein Zebra", "Anna", "los los los"]
STUDENT = ["a dog", "der Mann Mann Mann", "", "der alte Mann", "Anna", "los los los"]


@pytest.fixture(scope="module")
def analysis() -> dict:
    scorer = TranslationScorer(REFERENCES)
    texts = {"student": STUDENT, "teacher": REFERENCES}
    chrf = {name: scorer.measures(found)["chrf"] for name, found in texts.items()}
    seen = Counter({"the": 9, "man": 9, "sees": 9, "old": 9, "a": 9, "dog": 2, "x": 9, "y": 9, "rare": 1, "go": 9})
    return analyse(SOURCES, REFERENCES, texts, chrf, seen, rare_at_most=2)


def test_copies_loops_and_empty_translations_are_shares_of_all(analysis) -> None:
    # "Anna" is what the reference says too, and "los los los" as well.
    assert analysis["copies"] == {"student": pytest.approx(1 / 6, abs=1e-6), "teacher": 0.0}
    assert analysis["repetitions"] == {"student": pytest.approx(1 / 6, abs=1e-6), "teacher": 0.0}
    assert analysis["empty"] == {"student": pytest.approx(1 / 6, abs=1e-6), "teacher": 0.0}
    json.dumps(analysis, allow_nan=False)


def test_scores_by_length_are_chrf_of_those_sentences(analysis) -> None:
    rows = analysis["by_length"]
    assert [(row["from"], row["to"], row["sentences"]) for row in rows] == [(1, 2, 3), (3, 3, 2), (4, 7, 1)]
    for row, inside in zip(rows, ([0, 2, 4], [1, 5], [3]), strict=True):
        own, right = [STUDENT[i] for i in inside], [REFERENCES[i] for i in inside]
        assert row["student"] == pytest.approx(CHRF().corpus_score(own, [right]).score, abs=1e-4)
        assert row["teacher"] == 100


def test_scores_by_the_rarest_word_of_the_source(analysis) -> None:
    assert [(row["label"], row["sentences"]) for row in analysis["rare"]] == [
        ("a word that training has not", 2),
        ("a word that training has at most 2 times", 1),
        ("frequent words only", 3),
    ]
    expected = CHRF().corpus_score([STUDENT[3], "Anna"], [[REFERENCES[3], "Anna"]]).score
    assert analysis["rare"][0]["student"] == pytest.approx(expected, abs=1e-4)


def test_without_counts_rare_words_are_left_out() -> None:
    chrf = TranslationScorer(REFERENCES).measures(REFERENCES)["chrf"]
    found = analyse(SOURCES, REFERENCES, {"student": REFERENCES}, {"student": chrf})
    assert set(found) == {"by_length", "copies", "repetitions", "empty"}


@given(st.lists(st.integers(0, 12), min_size=1, max_size=40))
@settings(max_examples=100, derandomize=True, deadline=None, database=None)
def test_every_sentence_is_in_one_row_of_lengths(lengths: list[int]) -> None:
    rows = by_length(["w " * length for length in lengths], {"student": mean_measure("chrf", np.ones(len(lengths)))})
    assert 1 <= len(rows) <= 3
    assert sum(row["sentences"] for row in rows) == len(lengths)
    assert (rows[0]["from"], rows[-1]["to"]) == (min(lengths), max(lengths))
    for row, after in itertools.pairwise(rows):
        assert row["from"] <= row["to"] < after["from"]
    for row in rows:
        assert row["sentences"] == sum(row["from"] <= length <= row["to"] for length in lengths) > 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the the the", True),
        ("The, the; THE!", True),
        ("so sehr, sehr gut", False),
        ("a b a b a b", True),
        ("he said a b c a b c a b c and left", True),
        ("a b a b a", False),
        ("a b c a b c", False),
        ("a a b b a a b b", False),
        ("1 2 3 4 5 6 7 8 " * 3, True),
        ("1 2 3 4 5 6 7 8 9 " * 3, False),
        ("", False),
    ],
)
def test_a_loop_is_the_same_words_three_times_in_a_row(text: str, expected: bool) -> None:
    assert has_loop(text) is expected


def test_a_copy_is_the_source_where_the_reference_is_not() -> None:
    assert is_copy("The dog.", "Der Hund.", "the dog")
    assert not is_copy("Anna 5", "Anna 5", "Anna 5")
    assert not is_copy("...", "a", "...")
    assert not is_copy("The dog.", "Der Hund.", "the dog sees")


def test_the_worst_sentences_stand_side_by_side() -> None:
    scorer = TranslationScorer(REFERENCES)
    texts = {"student": STUDENT, "teacher": REFERENCES}
    chrf = {name: scorer.measures(found)["chrf"] for name, found in texts.items()}
    rows = worst(SOURCES, REFERENCES, texts, chrf, 3, by="student")
    assert rows[0] == {
        "source": "x y",
        "reference": "x z",
        "student": "",
        "teacher": "x z",
        "student_chrf": 0.0,
        "teacher_chrf": 100.0,
    }
    assert [row["source"] for row in rows] == ["x y", "a dog", "the man sees"]
    assert worst(SOURCES, REFERENCES, texts, chrf, 99, by="teacher")[0]["teacher_chrf"] == 100.0


def test_words_are_counted_without_their_case() -> None:
    assert word_counts(["The dog", "the: 家家"]) == Counter({"the": 2, "家": 2, "dog": 1})
