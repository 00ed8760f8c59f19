"""Random noun phrases, adverbials and places that go together."""

import random
from collections.abc import Sequence
from typing import TypeVar

from neural_layers.distill.data.corpus.nouns import CITIES, NAMES, NOUNS, nouns_of
from neural_layers.distill.data.corpus.phrases import NP, Place
from neural_layers.distill.data.corpus.small_words import ADJECTIVES, COUNTS, POSSESSIVES, PRONOUNS, QUANTITIES
from neural_layers.distill.data.corpus.words import Noun

Item = TypeVar("Item")

_PRONOUNS, _NAMES, _CITIES = tuple(PRONOUNS), tuple(NAMES), tuple(CITIES)
_FITTING = {
    noun.english: tuple(a.english for a in ADJECTIVES.values() if set(a.classes) & set(noun.classes))
    for noun in NOUNS.values()
}
_FIRST_PERSON = ("I", "we")
# Adjuncts of place and company: the preposition and the nouns after it; the first are drawn more often.
_ADJUNCTS = (
    ("in", ("place",)),
    ("in", ("place",)),
    ("in", ("city",)),
    ("behind", ("building",)),
    ("in front of", ("building",)),
    ("next to", ("surface", "building")),
    ("with", ("person", "animal")),
    ("without", ("person",)),
    ("after", ("event",)),
    ("before", ("event",)),
)


class Draws:
    """Choices from `random.Random.random` alone, whose values are the same on every platform and Python version."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._random.random() < probability

    def choice(self, items: Sequence[Item]) -> Item:
        """One of the items, all alike."""
        return items[int(self._random.random() * len(items))]

    def weighted(self, weights: Sequence[tuple[Item, float]]) -> Item:
        """One of the items with probability in proportion to its weight."""
        point = self._random.random() * sum(weight for _, weight in weights)
        for item, weight in weights:
            point -= weight
            if point < 0:
                return item
        return weights[-1][0]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """The items in random order (Fisher and Yates)."""
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = int(self._random.random() * (last + 1))
            result[last], result[other] = result[other], result[last]
        return result


class PhraseSampler(Draws):
    """Random phrases; `negated` leaves out the determiners that would make a negation ambiguous."""

    def subject(self, classes: tuple[str, ...], negated: bool, simple: bool = False) -> NP:
        """A subject of these classes, `simple` for one without quantity."""
        if "limb" in classes:
            return self._of(self.choice(nouns_of(classes)), self.choice(tuple(POSSESSIVES)), self.chance(0.3), 0.1)
        if "person" in classes:
            if self.chance(0.36):
                return NP(self.choice(_PRONOUNS))
            if self.chance(0.18):
                return NP(self.choice(_NAMES))
            classes = classes if self.chance(0.2) else ("person",)
        noun = self.choice(nouns_of(classes))
        if negated or simple or self.chance(0.8):
            return self._definite(noun)
        return self._quantity(noun, (("a", 5), ("every", 2), ("all", 2), ("some", 2), ("many", 2), ("count", 3)))

    def object(self, classes: tuple[str, ...], negated: bool, subject: NP) -> NP:
        """An object of these classes, which is not the subject again."""
        if "person" in classes and self.chance(0.35):
            return self._person(subject)
        noun = self.choice([noun for noun in nouns_of(classes) if noun.english != subject.noun])
        if noun.english == "fever":
            return self._of(noun, "", False, 0.4)
        if noun.plural == "":
            return self._of(noun, self.weighted((("", 5), ("the", 3), ("my", 0.4), ("our", 0.4))), False, 0.35)
        if self.chance(0.5):
            return self._definite(noun)
        if negated:
            return self._quantity(noun, (("a", 4), ("", 1)))
        return self._quantity(noun, (("a", 8), ("", 1), ("some", 1), ("many", 1), ("count", 2)))

    def recipient(self, subject: NP) -> NP:
        """A person who is given something."""
        return self._person(subject) if self.chance(0.35) else self.definite(("person",), subject)

    def definite(self, classes: tuple[str, ...], subject: NP) -> NP:
        """A definite noun phrase of these classes, not the subject again."""
        return self._definite(self.choice([noun for noun in nouns_of(classes) if noun.english != subject.noun]))

    def adjunct(self, subject: NP) -> Place:
        """A prepositional phrase for a verb that needs none."""
        preposition, classes = self.choice(_ADJUNCTS)
        if classes == ("city",):
            return Place(preposition, NP(self.choice(_CITIES)))
        return Place(preposition, self.definite(classes, subject))

    def home(self) -> Place:
        """Where somebody lives or stays."""
        if self.chance(0.4):
            return Place("in", NP(self.choice(_CITIES)))
        return Place("in", self._of(self.choice(nouns_of(("place",))), self.choice(("the", "the", "a")), False, 0.3))

    def goal(self, verb: str, subject: NP) -> Place:
        """Where somebody goes, or comes from."""
        preposition = "from" if verb == "come" else self.choice(("to", "to", "into"))
        if preposition != "into" and self.chance(0.35):
            return Place(preposition, NP(self.choice(_CITIES)))
        classes = ("place", "medic") if preposition == "to" else ("place",)
        return Place(preposition, self.definite(classes, subject))

    def _person(self, subject: NP) -> NP:
        """A pronoun or a name for another person than the subject."""
        if self.chance(0.3):
            return NP(self.choice([name for name in _NAMES if name != subject.noun]))
        taken = (subject.noun, *_FIRST_PERSON) if subject.noun in _FIRST_PERSON else (subject.noun,)
        return NP(self.choice([pronoun for pronoun in _PRONOUNS if pronoun not in taken]))

    def _definite(self, noun: Noun) -> NP:
        determiner = self.weighted((("the", 6), ("possessive", 2.2), ("this", 0.8), ("name", 0.5)))
        if determiner == "possessive":
            determiner = self.choice(tuple(POSSESSIVES))
        elif determiner == "name":
            determiner = self.choice(_NAMES)
        single = determiner != "the" and "family" in noun.classes
        plural = bool(noun.plural) and not single and determiner not in NAMES and self.chance(0.25)
        return self._of(noun, determiner, plural, 0.3)

    def _quantity(self, noun: Noun, weights: Sequence[tuple[str, float]]) -> NP:
        determiner = self.weighted(weights)
        if determiner == "count":
            determiner = self.choice(tuple(COUNTS))
        plural = determiner in COUNTS or determiner in QUANTITIES or determiner in ("all", "")
        return self._of(noun, determiner, plural, 0.4)

    def _of(self, noun: Noun, determiner: str, plural: bool, with_adjective: float) -> NP:
        fitting = _FITTING[noun.english]
        adjective = self.choice(fitting) if fitting and self.chance(with_adjective) else ""
        return NP(noun.english, determiner, adjective, plural)

    def adjective_for(self, phrase: NP) -> str:
        """An adjective that can be said of this noun phrase; pronouns and names are persons."""
        return self.choice(_FITTING[phrase.noun if phrase.noun in NOUNS else "man"])
