"""Medical texts in other words: synonyms, written-out abbreviations, swaps and insertions (EDA, arXiv 1901.11196).

What carries the facts stays: see `protection`.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from neural_layers.distill.classification.protection import Word, split_words
from neural_layers.distill.classification.tables import shipped_table
from neural_layers.errors import InputError


class MedicalTextAugmenter:
    """Makes another wording of a text: a pure function of the seed, the epoch and the number of the example.

    table:             groups of phrases that mean the same, or a JSON file of them; None for the table shipped here
    abbreviations:     what each abbreviation stands for, or a JSON file; None for the table shipped here. They are
                       matched as written: "MI" and not "mi".
    synonym_rate:      the probability of each phrase of the table in the text to be replaced by another of its group
    abbreviation_rate: the probability of each abbreviation to be written out
    swap_rate:         the probability of each word to change places with the next
    insertion_rate:    the probability of each gap to get a synonym of some word of the text

    Numbers, units, negations, doses and what a negation governs stay as they are with the words beside them in place;
    nothing is inserted beside them. With all rates 0 the text comes back unchanged.
    Raises: ValueError for a rate outside [0, 1], and for a table that would change what is protected; InputError for a
    file that cannot be read.
    """

    def __init__(
        self,
        table: Path | Iterable[Sequence[str]] | None = None,
        abbreviations: Path | Mapping[str, str] | None = None,
        *,
        synonym_rate: float = 0.1,
        abbreviation_rate: float = 0.3,
        swap_rate: float = 0.03,
        insertion_rate: float = 0.02,
        seed: int = 0,
    ) -> None:
        self.rates = {
            "synonym_rate": synonym_rate,
            "abbreviation_rate": abbreviation_rate,
            "swap_rate": swap_rate,
            "insertion_rate": insertion_rate,
        }
        for name, rate in self.rates.items():
            if not 0 <= rate <= 1:
                raise ValueError(f"{name}={rate} must lie in [0, 1]: it is a probability")
        self.seed = seed
        self.abbreviations = _abbreviations(abbreviations)
        self.synonyms = _synonyms(table)
        self._lengths = _lengths(self.synonyms)

    def __call__(self, text: str, epoch: int, number: int) -> str:
        """The wording of example `number` in `epoch`."""
        chance = random.Random(f"{self.seed}/{epoch}/{number}")  # of a string: seeded by its SHA-512 everywhere
        words, rest = split_words(text)
        words = self._insert(self._swap(self._replace(words, chance), chance), words, chance)
        return "".join(map(str, words)) + rest

    def _replace(self, words: list[Word], chance: random.Random) -> list[Word]:
        done, i = list[Word](), 0
        while i < len(words):
            length = self._phrase(words, i)
            if length and chance.random() < self.rates["synonym_rate"]:
                found = " ".join(word.core for word in words[i : i + length])
                others = self.synonyms[found.lower()]
                done.append(_joined(words[i : i + length], _cased(chance.choice(others), found)))
                i += length
                continue
            word = words[i]
            written = None if word.is_fixed else self.abbreviations.get(word.core)
            if written is not None and chance.random() < self.rates["abbreviation_rate"]:
                word = replace(word, core=written)
            done.append(word)
            i += 1
        return done

    def _phrase(self, words: list[Word], start: int) -> int:
        """How many words from `start` on are the longest phrase of the table there; 0 for none."""
        for length in self._lengths.get(words[start].core.lower(), ()):
            part = words[start : start + length]
            is_cut = len(part) < length or any(word.after for word in part[:-1])
            if is_cut or any(word.is_fixed for word in part):
                continue
            if not any(word.before for word in part[1:]) and " ".join(w.core.lower() for w in part) in self.synonyms:
                return length
        return 0

    def _swap(self, words: list[Word], chance: random.Random) -> list[Word]:
        words, i = list(words), 0
        while i + 1 < len(words):
            one, two = words[i], words[i + 1]
            is_free = not any(word.is_fixed or word.is_held or not word.core for word in (one, two))
            if is_free and not one.after and not two.before and chance.random() < self.rates["swap_rate"]:
                words[i], words[i + 1] = replace(one, core=two.core), replace(two, core=one.core)
                i += 1  # so that no word travels far
            i += 1
        return words

    def _insert(self, words: list[Word], original: list[Word], chance: random.Random) -> list[Word]:
        known = [w.core.lower() for w in original if not w.is_fixed and w.core.lower() in self.synonyms]
        if not known:
            return words
        done = list[Word]()
        for i, word in enumerate(words):
            done.append(word)
            is_open = i + 1 < len(words) and not (word.is_fixed or words[i + 1].is_fixed)
            if is_open and chance.random() < self.rates["insertion_rate"]:
                done.append(Word(" ", "", chance.choice(self.synonyms[chance.choice(known)]), ""))
        return done


def _lengths(phrases: Iterable[str]) -> dict[str, list[int]]:
    """How many words the phrases have that begin with each word, the longest first."""
    found: dict[str, set[int]] = {}
    for phrase in phrases:
        first, *others = phrase.split()
        found.setdefault(first, set()).add(1 + len(others))
    return {first: sorted(lengths, reverse=True) for first, lengths in found.items()}


def _joined(part: list[Word], core: str) -> Word:
    return replace(part[0], core=core, after=part[-1].after, is_held=any(word.is_held for word in part))


def _cased(text: str, like: str) -> str:
    if len(like) > 1 and like.isupper():
        return text.upper()
    return text[:1].upper() + text[1:] if like[:1].isupper() else text


def _synonyms(table: Path | Iterable[Sequence[str]] | None) -> dict[str, list[str]]:
    """The others of its group for each phrase; a phrase of several groups has those of all."""
    groups = shipped_table("synonyms.json") if table is None else _content(table)
    if not all(isinstance(group, Sequence) and not isinstance(group, str) and len(group) > 1 for group in groups):
        raise ValueError('a table of synonyms is a list of groups of two phrases or more; write [["flu", "influenza"]]')
    found: dict[str, list[str]] = {}
    for group in groups:
        for phrase in group:
            _check(phrase)
            known = found.setdefault(" ".join(phrase.lower().split()), [])
            known += [other for other in group if other != phrase and other not in known]
    return found


def _abbreviations(table: Path | Mapping[str, str] | None) -> dict[str, str]:
    content = shipped_table("abbreviations.json") if table is None else _content(table)
    if not isinstance(content, Mapping):
        raise ValueError('a table of abbreviations is an object; write {"MI": "myocardial infarction"}')
    for short, written in content.items():
        _check(short)
        _check(written)
    return dict(content)


def _check(phrase: object) -> None:
    if not isinstance(phrase, str) or not phrase.strip():
        raise ValueError(f"{phrase!r} in a table is no phrase; write text")
    fixed = [word.core for word in split_words(phrase)[0] if word.is_fixed]
    if fixed:
        raise ValueError(f"{phrase!r} holds {fixed[0]!r}, which augmentation leaves alone; take it out of the table")


def _content(table: object) -> Any:
    if not isinstance(table, Path):
        return table
    try:
        return json.loads(table.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{table}: not a table in JSON ({error}); see distill/classification/tables") from error
