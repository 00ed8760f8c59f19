"""Where translations go wrong: by length, by rare words, copies, loops, empty ones, the worst."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neural_layers.distill.validation.measures import Measure
from neural_layers.distill.validation.words import words

_LONGEST_LOOP, _LOOPS = 8, 3


def analyse(
    sources: Sequence[str],
    references: Sequence[str],
    translations: Mapping[str, Sequence[str]],
    chrf: Mapping[str, Measure],
    seen: Mapping[str, int] | None = None,
    rare_at_most: int = 3,
) -> dict[str, Any]:
    """The part `analysis` of a validation and of the report, for JSON.

    translations, chrf: by the name of the model: what it made of the sources, and the measure chrF of it
    seen:               how often each word stands in the sources of the training data (`words.word_counts`); None where
                        that is not known, which leaves out `rare`
    rare_at_most:       words seen so often or less are rare
    """
    analysis: dict[str, Any] = {"by_length": by_length(sources, chrf)}
    if seen is not None:
        analysis["rare"] = by_rare_words(sources, chrf, seen, rare_at_most)
    pairs = {name: list(zip(sources, references, texts, strict=True)) for name, texts in translations.items()}
    analysis["copies"] = {name: _share([is_copy(*row) for row in rows]) for name, rows in pairs.items()}
    analysis["repetitions"] = {
        name: _share([has_loop(text) and not has_loop(reference) for _, reference, text in rows])
        for name, rows in pairs.items()
    }
    analysis["empty"] = {name: _share([not text.strip() for *_, text in rows]) for name, rows in pairs.items()}
    return analysis


def by_length(sources: Sequence[str], chrf: Mapping[str, Measure], parts: int = 3) -> list[dict[str, Any]]:
    """chrF of the shorter, the middle and the longer sources, which are about equally many.

    A row has the words of a source `from` … `to` (both in it), the number of `sentences`, and the score of each model.
    Sources of one length are in one row, so that there may be fewer rows.
    """
    lengths = np.array([len(words(source)) for source in sources])
    ordered = np.sort(lengths)
    ends = sorted({int(ordered[-(-len(ordered) * part // parts) - 1]) for part in range(1, parts + 1)})
    rows, begin = [], int(ordered[0])
    for end in ends:
        inside = (lengths >= begin) & (lengths <= end)
        rows.append({"from": begin, "to": end, **_row(chrf, inside)})
        begin = end + 1
    return rows


def by_rare_words(
    sources: Sequence[str], chrf: Mapping[str, Measure], seen: Mapping[str, int], rare_at_most: int
) -> list[dict[str, Any]]:
    """chrF of the sources by their rarest word: never seen in training, seen at most so often, or more often.

    A row has a `label`, the number of `sentences`, and the score of each model; rows without sentences are left out.
    """
    rarest = np.array([min((seen.get(word, 0) for word in words(source)), default=0) for source in sources])
    groups = {
        "a word that training has not": rarest == 0,
        f"a word that training has at most {rare_at_most} times": (rarest > 0) & (rarest <= rare_at_most),
        "frequent words only": rarest > rare_at_most,
    }
    return [{"label": label, **_row(chrf, inside)} for label, inside in groups.items() if inside.any()]


def worst(
    sources: Sequence[str],
    references: Sequence[str],
    translations: Mapping[str, Sequence[str]],
    chrf: Mapping[str, Measure],
    count: int,
    by: str,
) -> list[dict[str, Any]]:
    """The `count` sentences with the least chrF of the model `by`, side by side.

    A row has `source`, `reference`, and for each model its translation under its name and its score as `<name>_chrf`.
    """
    each = {name: measure.per_example() for name, measure in chrf.items()}
    rows = np.argsort(each[by], kind="stable")[:count].tolist()
    return [
        {
            "source": sources[i],
            "reference": references[i],
            **{name: texts[i] for name, texts in translations.items()},
            **{f"{name}_chrf": round(float(scores[i]), 2) for name, scores in each.items()},
        }
        for i in rows
    ]


def is_copy(source: str, reference: str, translation: str) -> bool:
    """Whether the source was repeated instead of translated; names and numbers, where that is right, do not count."""
    copied = words(translation)
    return bool(copied) and copied == words(source) and copied != words(reference)


def has_loop(text: str) -> bool:
    """Whether a row of one to eight words comes three times in direct succession."""
    found = words(text)
    for size in range(1, _LONGEST_LOOP + 1):
        run = 0
        for i in range(size, len(found)):
            run = run + 1 if found[i] == found[i - size] else 0
            if run == (_LOOPS - 1) * size:
                return True
    return False


def _row(chrf: Mapping[str, Measure], inside: np.ndarray) -> dict[str, Any]:
    scores = {name: float(measure.score(measure.statistics[inside].sum(axis=0))) for name, measure in chrf.items()}
    return {"sentences": int(inside.sum()), **{name: round(score, 4) for name, score in scores.items()}}


def _share(flags: Sequence[bool]) -> float:
    return round(sum(flags) / len(flags), 6)
