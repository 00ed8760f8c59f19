"""The sentence pairs of a run."""

from dataclasses import dataclass
from pathlib import Path

from neural_layers.distill.data.corpus import generate_corpus
from neural_layers.distill.data.pairs import SentencePair, read_pairs
from neural_layers.errors import InputError


@dataclass(frozen=True)
class Splits:
    """Sentence pairs to learn from, to choose by, and to judge by."""

    name: str
    train: list[SentencePair]
    valid: list[SentencePair]
    test: list[SentencePair]


def load_splits(data: Path | None, valid: Path | None, test: Path | None) -> Splits:
    """Read the three files, or generate the embedded corpus where none is given.

    Raises InputError where only some are given, and for files that are missing or bad.
    """
    if data is None and valid is None and test is None:
        corpus = generate_corpus()
        return Splits("embedded corpus", corpus.train, corpus.valid, corpus.test)
    if data is None or valid is None or test is None:
        raise InputError("--data, --valid and --test go together: give all three, or none for the embedded corpus")
    return Splits(str(data), read_pairs(data), read_pairs(valid), read_pairs(test))
