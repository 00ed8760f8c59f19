"""Validation data that training has seen."""

from neural_layers.distill.data.overlap import overlap


def test_texts_in_both_are_counted_whatever_their_case_and_spaces() -> None:
    train = ["The dog\tDer Hund", "A  house\tein Haus", "STRASSE", "x"]
    found = overlap(train, ["a house ein\nHaus", "the cat", "straße"])
    assert found is not None
    assert found.startswith("2 of 3 texts of the validation data also stand in the training data, such as 'a house ein")


def test_other_texts_give_no_warning() -> None:
    assert overlap(["a dog", "a house"], ["a", "dog"]) is None
    assert overlap([], ["a"]) is None
    assert overlap(["a"], []) is None


def test_validating_on_the_training_data_is_told() -> None:
    texts = ["a dog " * 30, "a house"]
    found = overlap(iter(texts), texts[::-1])
    assert found is not None
    assert found.startswith("the validation data is the training data (2 texts), such as 'a house'; ")
    # A part of the training data, or more than it, is not the same as it.
    assert overlap([*texts, "x"], texts).startswith("2 of 2 texts")
    assert "a dog a dog" in overlap(texts, [texts[0], "x"])
    assert "..." in overlap(texts, [texts[0], "x"])
