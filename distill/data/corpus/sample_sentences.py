"""Random sentences, with weights that keep every phenomenon frequent."""

from dataclasses import replace

from neural_layers.distill.data.corpus.nouns import nouns_of
from neural_layers.distill.data.corpus.phrases import (
    GAP,
    NP,
    Clause,
    Complex,
    Coordination,
    Place,
    Question,
    Sentence,
    Statement,
)
from neural_layers.distill.data.corpus.sample_clauses import ClauseSampler
from neural_layers.distill.data.corpus.verbs import CLAUSE_VERBS, VERBS, verb

_SENTENCES = (
    ("statement", 42.0),
    ("relative", 9.0),
    ("yes-no", 9.0),
    ("wh", 10.0),
    ("complex", 14.0),
    ("reported", 7.0),
    ("infinitive", 4.0),
    ("coordination", 5.0),
)
_THAT_VERBS = tuple(verb for verb in CLAUSE_VERBS if verb.frame == "that")
_ZU_VERBS = tuple(verb for verb in CLAUSE_VERBS if verb.frame == "zu")
_WHOM_VERBS = tuple(verb for verb in VERBS if verb.frame in ("acc", "dat") and "person" in verb.objects)
# What asks for things only, whom for persons.
_WHAT_VERBS = tuple(verb for verb in VERBS if verb.frame == "acc" and not {"person", "ill"} & set(verb.objects))
_WHICH_VERBS = tuple(
    verb for verb in VERBS if verb.frame in ("acc", "dat") and verb.english not in ("belong to", "drink")
)
_WHERE_VERBS = tuple(
    verb
    for verb in VERBS
    if verb.frame in ("none", "go", "live", "acc") and verb.english not in ("come", "hurt", "depart", "have", "know")
)
_WHO_VERBS = tuple(verb for verb in VERBS if "person" in verb.subjects)
_INFINITIVE_VERBS = tuple(verb for verb in _WHO_VERBS if verb.english not in ("have", "know", "need", "lose", "forget"))
_SAME_TENSE = ("when", "while", "before")


class SentenceSampler(ClauseSampler):
    """An endless source of random sentences, the same ones for the same seed."""

    def sentence(self) -> Sentence:
        """The next sentence."""
        match self.weighted(_SENTENCES):
            case "statement":
                clause = self.clause()
                return Statement(clause, fronted=bool(clause.time) and self.chance(0.5))
            case "relative":
                return Statement(self._with_relative())
            case "yes-no":
                return Question(self.clause(busy=0.6))
            case "wh":
                return self._wh_question()
            case "complex":
                return self._complex()
            case "reported":
                return self._reported()
            case "infinitive":
                return Statement(self._with_infinitive())
        first, second = self.clause(busy=0.3), self.clause(busy=0.3)
        return Coordination(first, self.choice(("and", "but")), second)

    def _complex(self) -> Complex:
        conjunction = self.choice(("because", "although", "if", "when", "while", "before"))
        tense = self.choice(("present", "past")) if conjunction in _SAME_TENSE else ""
        negated = False if conjunction in _SAME_TENSE else None
        tense = tense or ("present" if conjunction == "if" else "")
        subordinate = self.clause(tense=tense, negated=negated, busy=0.4)
        if conjunction == "if":
            tense = self.choice(("present", "future", "modal"))
        elif conjunction in _SAME_TENSE:
            tense = subordinate.tense
        return Complex(self.clause(tense=tense, busy=0.4), conjunction, subordinate, first=self.chance(0.4))

    def _reported(self) -> Complex:
        """He says that …, she asks whether …, we do not know where …."""
        kind = self.choice(("that", "that", "whether", "where", "why", "when"))
        if kind == "that":
            matrix = self.clause(self.choice(_THAT_VERBS), tense=self.choice(("present", "past")), busy=0.0)
        elif kind == "whether" and self.chance(0.6):
            matrix = self.clause(
                verb("ask", "whether"), tense=self.choice(("present", "past")), negated=False, busy=0.0
            )
        else:
            matrix = self.clause(verb("know", "that"), tense="present", negated=kind == "whether" or None, busy=0.0)
        if kind in ("that", "whether"):
            return Complex(matrix, kind, self.clause(busy=0.5))
        return Complex(matrix, kind, self._asked_clause(kind), asked=True)

    def _asked_clause(self, adverb: str) -> Clause:
        """A clause for a question by this adverb, without the part that is asked for."""
        if adverb == "where":
            return replace(self.clause(self.choice(_WHERE_VERBS), negated=False, busy=0.3), place=None)
        clause = self.clause(self.choice(_WHO_VERBS), negated=False, busy=0.3)
        return clause if adverb == "why" else replace(clause, time="", frequency="")

    def _wh_question(self) -> Question:
        kind = self.choice(("who", "whom", "what", "which", "which subject", "where", "when", "why", "how often"))
        if kind == "who":
            return Question(self.clause(self.choice(_WHO_VERBS), subject=NP("who"), busy=0.6), "subject")
        if kind == "whom":
            clause = self.clause(self.choice(_WHOM_VERBS), negated=False, busy=0.5)
            return Question(replace(clause, object=NP("who")), "object")
        if kind == "what":
            clause = self.clause(self.choice(_WHAT_VERBS), negated=False, busy=0.5)
            return Question(replace(clause, object=NP("what")), "object")
        if kind == "which":
            word = self.choice(_WHICH_VERBS)
            clause = self.clause(word, negated=False, busy=0.5)
            return Question(replace(clause, object=self._which(word.objects)), "object")
        if kind == "which subject":
            word = self.choice(_WHO_VERBS)
            subject = self._which(word.subjects)
            return Question(self.clause(word, subject=subject, busy=0.5), "subject")
        return Question(self._asked_clause(kind), kind)

    def _which(self, classes: tuple[str, ...]) -> NP:
        noun = self.choice([noun for noun in nouns_of(classes) if noun.plural])
        return NP(noun.english, "which", plural=self.chance(0.25))

    def _with_infinitive(self) -> Clause:
        """He tries to …; the infinitive has no subject, negation, tense or adverbial of its own."""
        matrix = self.clause(self.choice(_ZU_VERBS), negated=False, busy=0.0)
        inner = self.clause(
            self.choice(_INFINITIVE_VERBS), subject=matrix.subject, tense="present", negated=False, busy=0.0
        )
        return replace(matrix, infinitive=inner)

    def _with_relative(self) -> Clause:
        """A clause whose subject, or whose last object, has a relative clause."""
        if self.chance(0.65):
            clause = self.clause(self.choice(_WHO_VERBS), negated=False, busy=0.3)
            return replace(clause, subject=self._head(("person",)))
        words = [word for word in VERBS if word.frame == "acc" and not word.prefix and word.english != "drink"]
        tense = self.choice(("present", "past"))
        clause = self.clause(self.choice(words), tense=tense, negated=False, busy=0.0)
        while clause.tense == "perfect":
            clause = self.clause(self.choice(words), tense=tense, negated=False, busy=0.0)
        return replace(clause, object=self._head(clause.verb.objects, clause.subject))

    def _head(self, classes: tuple[str, ...], other: NP | None = None) -> NP:
        """A definite noun of these classes with a relative clause; `other` is a noun to keep away from."""
        nouns = [noun for noun in nouns_of(classes) if noun.plural and (other is None or noun.english != other.noun)]
        noun = self.choice(nouns)
        head = NP(noun.english, "the", plural=self.chance(0.25))
        kinds = set(noun.classes)
        taking = [
            word for word in VERBS if kinds & set(word.objects) and word.frame in ("acc", "dat", "auf acc", "mit dat")
        ]
        doing = [word for word in VERBS if kinds & set(word.subjects)]
        if doing and (not taking or self.chance(0.5)):
            clause = self.clause(self.choice(doing), subject=head, busy=0.3)
            return replace(head, relative=replace(clause, subject=GAP))
        if "place" in kinds and self.chance(0.6):
            clause = self.clause(verb(self.choice(("work", "live", "play", "wait"))), negated=False, busy=0.0)
            return replace(head, relative=replace(clause, place=Place("in", GAP)))
        clause = self.clause(self.choice(taking), negated=False, busy=0.3)
        return replace(head, relative=replace(clause, object=GAP))
