"""The embedded corpus: English and German sentences from a small grammar, split without overlap."""

import re
from typing import NamedTuple

from neural_layers.distill.data.corpus.english import english
from neural_layers.distill.data.corpus.german_clauses import german
from neural_layers.distill.data.corpus.phrases import Sentence
from neural_layers.distill.data.corpus.sample_sentences import SentenceSampler
from neural_layers.distill.data.pairs import SentencePair

_WORD = re.compile(r"[^\W\d_]+")
# Beyond it the grammar has no new sentence to offer, or the training split is too small to hold the others' words.
_TRIES_PER_PAIR = 200


class CorpusSizes(NamedTuple):
    """The number of pairs in each split."""

    train: int = 12_000
    valid: int = 400
    test: int = 400


class Corpus(NamedTuple):
    """The splits; no sentence of either language stands in two of them, or twice in one."""

    train: list[SentencePair]
    valid: list[SentencePair]
    test: list[SentencePair]


def translate(sentence: Sentence) -> SentencePair:
    """The pair that a structure stands for.

    Arguments: `sentence`, a `Statement`, `Question`, `Complex` or `Coordination` of `phrases.py`.
    Raises: KeyError for a word that is in no table.
    """
    return SentencePair(english(sentence), german(sentence))


def generate_corpus(sizes: CorpusSizes | tuple[int, int, int] = CorpusSizes(), seed: int = 0) -> Corpus:  # noqa: B008
    """Random sentence pairs from the grammar, the same for the same arguments on every platform.

    Each English sentence has one right German one. Every word of `valid` and `test` occurs in `train`, in that form.

    Arguments:
        sizes: the number of pairs in train, valid and test; those of valid and test may be 0
        seed:  another seed gives other sentences
    Raises:
        ValueError: a negative size, an empty train, or sizes that the grammar cannot fill (a train that is too small
            has not the words of valid and test)
    """
    sizes = CorpusSizes(*sizes)
    if sizes.train < 1 or min(sizes) < 0:
        raise ValueError(f"sizes={tuple(sizes)} must have at least 1 pair in train and no negative number")
    sampler = SentenceSampler(seed)
    used: tuple[set[str], set[str]] = (set(), set())
    train = _draw(sampler, sizes.train, used, None)
    known = words_of(train)
    valid = _draw(sampler, sizes.valid, used, known)
    return Corpus(train, valid, _draw(sampler, sizes.test, used, known))


def words_of(pairs: list[SentencePair]) -> set[tuple[int, str]]:
    """The words of pairs as (0 for source or 1 for target, word), in the form and the case in which they stand."""
    return {(side, word) for pair in pairs for side, text in enumerate(pair) for word in _WORD.findall(text)}


def _draw(
    sampler: SentenceSampler,
    count: int,
    used: tuple[set[str], set[str]],
    known: set[tuple[int, str]] | None,
) -> list[SentencePair]:
    """New pairs, of known words only; `used` holds the sentences of both languages that are taken."""
    pairs: list[SentencePair] = []
    for _ in range(_TRIES_PER_PAIR * count):
        if len(pairs) == count:
            break
        pair = translate(sampler.sentence())
        fresh = pair.source not in used[0] and pair.target not in used[1]
        if fresh and (known is None or words_of([pair]) <= known):
            pairs.append(pair)
            used[0].add(pair.source)
            used[1].add(pair.target)
    if len(pairs) < count:
        raise ValueError(f"found only {len(pairs)} of {count} new pairs; ask for fewer, or for a larger train split")
    return pairs
