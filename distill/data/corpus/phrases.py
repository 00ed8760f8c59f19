"""The structures that are said in both languages: noun phrases, clauses and sentences.

They hold English keys only; `english.py` and `german.py` turn each into words.
"""

from dataclasses import dataclass

from neural_layers.distill.data.corpus.nouns import NAMES
from neural_layers.distill.data.corpus.small_words import PRONOUNS
from neural_layers.distill.data.corpus.words import Verb


@dataclass(frozen=True)
class NP:
    """A noun phrase: a noun with its parts, a pronoun (`NP("he")`), a name or a city (`NP("Anna")`).

    noun:       the English singular
    determiner: "the", "a", "" (bare), "my", …, "this", "every", "all", "which", "two", …, "many", or a name ("Anna")
    adjective:  its English word or ""
    plural:     whether the noun stands in the plural
    relative:   a clause in which one part is `GAP`, or None
    """

    noun: str
    determiner: str = "the"
    adjective: str = ""
    plural: bool = False
    relative: "Clause | None" = None

    @property
    def is_pronoun(self) -> bool:
        return self.noun in PRONOUNS

    @property
    def is_definite(self) -> bool:
        """Whether it stands before adverbials of frequency and `nicht` in German."""
        return self.is_pronoun or self.noun in NAMES or self.determiner in _DEFINITE

    @property
    def takes_kein(self) -> bool:
        """Whether German negates it by `kein` where it is an object: the indefinite article or none."""
        return not self.is_definite and self.determiner in ("a", "")

    @property
    def is_plural(self) -> bool:
        return PRONOUNS[self.noun].plural if self.is_pronoun else self.plural

    @property
    def person(self) -> int:
        return PRONOUNS[self.noun].person if self.is_pronoun else 3


_DEFINITE = frozenset(("the", "my", "your", "his", "her", "our", "their", "this", "every", "all", *NAMES))
GAP = NP("", "")
"""The part of a relative clause that the relative pronoun stands for."""


@dataclass(frozen=True)
class Place:
    """A preposition and its noun phrase, or a city as `NP("Vienna")`."""

    preposition: str
    phrase: NP


@dataclass(frozen=True)
class Clause:
    """A verb with its parts.

    verb:        `verbs.verb("buy")`; `be` goes with `predicate`
    tense:       present, past (German Präteritum), perfect or future; with a modal present or past
    object:      the accusative, the dative or the prepositional object, as the verb's frame says
    recipient:   the dative object of `give` and `to` verbs
    predicate:   after `be`: an adjective or a `NP`; standard: what it is compared with (older than …); `equal`: as … as
    place:       where, with whom or for whom; also the goal of a movement
    infinitive:  for verbs that take one (try to …): a clause of which only the parts without subject are said
    """

    subject: NP
    verb: Verb
    object: NP | None = None
    recipient: NP | None = None
    predicate: "str | NP" = ""
    standard: NP | None = None
    equal: bool = False
    tense: str = "present"
    modal: str = ""
    negated: bool = False
    time: str = ""
    frequency: str = ""
    manner: str = ""
    place: Place | None = None
    infinitive: "Clause | None" = None


@dataclass(frozen=True)
class Statement:
    """A main clause; `fronted` puts its adverbial of time first."""

    clause: Clause
    fronted: bool = False


@dataclass(frozen=True)
class Question:
    """A question: yes or no where `asks` is "", else for one of `subject`, `object` or a question adverb.

    A part that is asked for is `NP("who")`, `NP("what")` or a noun phrase with the determiner "which".
    """

    clause: Clause
    asks: str = ""


@dataclass(frozen=True)
class Complex:
    """A main clause with a subordinate one.

    conjunction: a subordinator (because, that, …), or a question adverb where `asked` (I know when: wann, not wenn)
    first:       whether the subordinate clause comes first
    """

    main: Clause
    conjunction: str
    subordinate: Clause
    first: bool = False
    asked: bool = False


@dataclass(frozen=True)
class Coordination:
    """Two main clauses joined by and, but or or."""

    first: Clause
    conjunction: str
    second: Clause


Sentence = Statement | Question | Complex | Coordination
