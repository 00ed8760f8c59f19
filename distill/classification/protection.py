"""Which words of a medical text must stay as and where they are: numbers, doses and units, negations and their scope.

The scope of a negation is NegEx's (Chapman et al., J. Biomed. Inform. 34, 2001): up to five words after it, as far as
the clause goes, or before it where it follows what it denies ("fever: absent").
"""

import re
from dataclasses import dataclass

from neural_layers.distill.classification.tables import shipped_table

_SCOPE = 5
_WORDS = {name: frozenset(words) for name, words in shipped_table("protected.json").items()}
_WORD = re.compile(r"(\s*)(\W*)(.*?)(\W*)", re.DOTALL)


@dataclass(frozen=True)
class Word:
    """A word with what stands around it: `space + before + core + after` is the text again.

    is_fixed: it must stay as it is, between the same neighbours. is_held: it must stay where it is, beside such a one.
    """

    space: str
    before: str
    core: str
    after: str
    is_fixed: bool = False
    is_held: bool = False

    def __str__(self) -> str:
        return self.space + self.before + self.core + self.after


def split_words(text: str) -> tuple[list[Word], str]:
    """The words of a text, marked, and the white space behind the last: together they are the text again."""
    rest = text[len(text.rstrip()) :]
    words = []
    for token in re.findall(r"\s*\S+", text.rstrip() if rest else text):
        found = _WORD.fullmatch(token)
        assert found is not None  # every part may be empty
        words.append(Word(found[1], found[2], found[3], found[4]))
    fixed = _fixed(words)
    padded = [False, *fixed, False]
    marked = [
        Word(w.space, w.before, w.core, w.after, fixed[i], not fixed[i] and (padded[i] or padded[i + 2]))
        for i, w in enumerate(words)
    ]
    return marked, rest


def _fixed(words: list[Word]) -> list[bool]:
    fixed = [False] * len(words)
    _fix_quantities(words, fixed)
    for i, word in enumerate(words):
        core = word.core.lower()
        if core in _WORDS["negations"] or core.endswith(("n't", "n’t")) or core.startswith("non-"):
            fixed[i] = True
            _fix_scope(words, fixed, i, 1)
        elif core in _WORDS["negations_behind"]:
            fixed[i] = True
            _fix_scope(words, fixed, i, -1)
            _fix_scope(words, fixed, i, 1)  # "absence of fever", "negative for"
    return fixed


def _fix_scope(words: list[Word], fixed: list[bool], start: int, way: int) -> None:
    for i in range(start + way, start + way * (_SCOPE + 1), way):
        if not 0 <= i < len(words):
            return
        earlier, later = (words[i - 1], words[i]) if way > 0 else (words[i], words[i + 1])
        # A colon or a bracket does not part a finding from the word that denies it after it.
        ends = ".,;!?" if way < 0 else ".,;:!?)"
        if any(mark in earlier.after for mark in ends) or (way > 0 and "(" in later.before):
            return
        if words[i].core.lower() in _WORDS["clause_starts"]:
            return
        fixed[i] = True


def _fix_quantities(words: list[Word], fixed: list[bool]) -> None:
    """Numbers, the units behind them ("5 mg", "2 times a day") and what compares before them ("at least 5")."""
    cores = [word.core.lower() for word in words]
    is_number = [
        any(c.isdigit() for c in str(word)) or core in _WORDS["number_words"]
        for word, core in zip(words, cores, strict=True)
    ]
    for i, number in enumerate(is_number):
        if not number:
            continue
        fixed[i] = True
        j = i + 1
        while j < len(words) and not words[j - 1].after.strip("%°)"):
            follows = j + 1 < len(words) and (cores[j + 1] in _WORDS["units"] or is_number[j + 1])
            if (
                cores[j] not in _WORDS["units"]
                and cores[j] != ""
                and not (cores[j] in _WORDS["between_number_and_unit"] and follows)
            ):
                break
            fixed[j] = True
            j += 1
        j = i - 1
        while j >= 0 and (cores[j] in _WORDS["before_number"] or cores[j] == "") and not words[j].after:
            fixed[j] = True
            j -= 1
