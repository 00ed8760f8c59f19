"""Rewording of medical texts: what carries the facts stays, and the same seed gives the same words."""

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neural_layers.distill.classification.augmentation import MedicalTextAugmenter
from neural_layers.distill.classification.protection import split_words
from neural_layers.distill.classification.tables import shipped_table
from neural_layers.errors import InputError

QUIET = {"deadline": None, "derandomize": True, "database": None}
WILD = MedicalTextAugmenter(synonym_rate=1, abbreviation_rate=1, swap_rate=0.9, insertion_rate=0.9)
STILL = MedicalTextAugmenter(synonym_rate=0, abbreviation_rate=0, swap_rate=0, insertion_rate=0)
_SENTENCES = """patient fever, headache denies no not without 5 mg 2x daily twice a day aspirin chest pain. (MRI) kidney
disease heart attack at least 38.5 °C but rash absent; BP 120/80 mmHg pt MI TREATMENT Doctors common in one of ten"""
WORDS = _SENTENCES.split()
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=25).map(" ".join)


def fixed(text: str) -> list[str]:
    return [word.core for word in split_words(text)[0] if word.is_fixed]


def runs(text: str) -> list[str]:
    """The stretches of protected words, as they stand in the text."""
    found, current = [], ""
    for word in split_words(text)[0]:
        if word.is_fixed:
            current += word.space + word.before + word.core + word.after
        elif current:
            found.append(current.strip())
            current = ""
    return [*found, current.strip()] if current else found


@settings(max_examples=150, **QUIET)
@given(TEXTS, st.integers(0, 50), st.integers(0, 50))
def test_protected_words_keep_their_order_and_neighbours(text, epoch, number) -> None:
    reworded, place = WILD(text, epoch, number), 0
    for run in runs(text):
        found = re.compile(rf"(?<!\S){re.escape(run)}(?!\S)").search(reworded, place)
        assert found, (run, text, reworded)
        place = found.end()


@settings(max_examples=60, **QUIET)
@given(TEXTS, st.integers(0, 9))
def test_a_word_beside_a_protected_one_stays_beside_it(text, epoch) -> None:
    # Swaps and insertions alone: the words themselves can then be compared.
    moved = MedicalTextAugmenter(synonym_rate=0, abbreviation_rate=0, swap_rate=1, insertion_rate=1)

    def pairs(words):
        cores = [(w.core, w.is_fixed) for w in words]
        return [(a, b) for (a, f), (b, g) in itertools.pairwise(cores) if f or g]

    reworded = [word.core for word in split_words(moved(text, epoch, 0))[0]]
    neighbours = list(itertools.pairwise(reworded))
    assert all(pair in neighbours for pair in pairs(split_words(text)[0]))


@settings(max_examples=60, **QUIET)
@given(st.text(max_size=60), st.integers(), st.integers())
def test_without_rates_every_text_comes_back_unchanged(text, epoch, number) -> None:
    assert STILL(text, epoch, number) == text


@settings(max_examples=40, **QUIET)
@given(TEXTS, st.integers(0, 5), st.integers(0, 5))
def test_the_wording_is_a_function_of_seed_epoch_and_number(text, epoch, number) -> None:
    again = MedicalTextAugmenter(synonym_rate=1, abbreviation_rate=1, swap_rate=0.9, insertion_rate=0.9)
    WILD("something else entirely, to draw random numbers", 3, 3)
    assert again(text, epoch, number) == WILD(text, epoch, number)


def test_epochs_numbers_and_seeds_give_other_wordings() -> None:
    text = "the doctor saw fever and headache and swelling of the kidney and of the skin in this child with diabetes"
    other = MedicalTextAugmenter(synonym_rate=1, abbreviation_rate=1, swap_rate=0.9, insertion_rate=0.9, seed=1)
    assert len({WILD(text, 0, 0), WILD(text, 1, 0), WILD(text, 0, 1), other(text, 0, 0)}) == 4


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("She takes aspirin 5 mg 2x daily now", ["5", "mg", "2x", "daily"]),
        ("take two tablets three times a day with food", ["two", "tablets", "three", "times", "a", "day"]),
        ("fever of at least 38.5 °C today", ["at", "least", "38.5", "C"]),
        ("The patient denies chest pain, but has fever", ["denies", "chest", "pain"]),
        ("no evidence of any old heart attack was ever seen", ["no", "evidence", "of", "any", "old", "heart"]),
        ("It isn't fever. Rash", ["isn't", "fever"]),
        ("he has fever (without rash) and pain", ["without", "rash"]),
        ("all is well. Murmur: absent", ["Murmur", "absent"]),
        ("one in ten people get it", ["one", "in", "ten"]),
        ("a child with fever", []),
    ],
)
def test_numbers_doses_and_negated_findings_are_protected(text, kept) -> None:
    assert fixed(text) == kept


def test_synonyms_and_abbreviations_follow_the_tables_and_the_case() -> None:
    words = MedicalTextAugmenter(
        [["heart attack", "myocardial infarction"]],
        {"MRI": "magnetic resonance imaging"},
        synonym_rate=1,
        abbreviation_rate=1,
        swap_rate=0,
        insertion_rate=0,
    )
    assert words("Heart attack! HEART ATTACK (heart attack), MRI and mri", 0, 0) == (
        "Myocardial infarction! MYOCARDIAL INFARCTION (myocardial infarction), magnetic resonance imaging and mri"
    )
    assert words("heart, attack", 0, 0) == "heart, attack"
    assert words("no heart attack", 0, 0) == "no heart attack"


def test_insertions_are_synonyms_of_words_in_the_text() -> None:
    words = MedicalTextAugmenter([["flu", "influenza"]], {}, synonym_rate=0, swap_rate=0, insertion_rate=1)
    assert words("the flu came", 0, 0) == "the influenza flu influenza came"
    assert words("the cold came", 0, 0) == "the cold came"


def test_tables_come_from_files_and_are_checked(tmp_path) -> None:
    table, short = tmp_path / "synonyms.json", tmp_path / "abbreviations.json"
    table.write_text(json.dumps([["flu", "grippe"]]))
    short.write_text(json.dumps({"Pat.": "patient"}))
    words = MedicalTextAugmenter(table, short, synonym_rate=1, swap_rate=0, insertion_rate=0)
    assert words("flu", 0, 0) == "grippe"
    with pytest.raises(InputError, match="missing.json"):
        MedicalTextAugmenter(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="'no', which augmentation leaves alone"):
        MedicalTextAugmenter([["painless", "no pain"]])
    with pytest.raises(ValueError, match="two phrases or more"):
        MedicalTextAugmenter([["alone"]])
    with pytest.raises(ValueError, match="swap_rate=1.5"):
        MedicalTextAugmenter(swap_rate=1.5)


def test_the_shipped_tables_are_large_enough_and_name_nothing_twice() -> None:
    groups, short = shipped_table("synonyms.json"), shipped_table("abbreviations.json")
    assert len(groups) >= 80
    assert len(short) >= 60
    phrases = [phrase for group in groups for phrase in group]
    assert len(set(phrases)) == len(phrases)
    assert MedicalTextAugmenter().synonyms["fever"] == ["pyrexia", "raised temperature"]


def test_without_protection_the_facts_would_change(monkeypatch) -> None:
    # The planted fault that the properties above are there to find.
    text = "patient denies fever and takes aspirin 5 mg twice a day, no heart attack, for headache and rash"
    kept = runs(text)
    monkeypatch.setattr("neural_layers.distill.classification.protection._fixed", lambda words: [False] * len(words))
    lost = [any(run not in WILD(text, epoch, 0) for run in kept) for epoch in range(5)]
    assert all(lost)
