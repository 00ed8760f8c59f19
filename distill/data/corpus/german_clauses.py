"""German word order: verb-second, verb-first and verb-final clauses.

Between the finite verb and the end stand, in this order: subject, pronoun object, definite dative object, time,
definite accusative object, frequency, nicht, indefinite object, manner, prepositional object, place, predicate.
"""

import re
from dataclasses import replace

from neural_layers.distill.data.corpus.german import core, preposition, prepositional, relative_pronoun, verb_forms
from neural_layers.distill.data.corpus.nouns import NAMES, NOUNS
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
from neural_layers.distill.data.corpus.small_words import (
    ADJECTIVES,
    COORDINATORS,
    FREQUENCIES,
    MANNERS,
    QUESTION_ADVERBS,
    SUBORDINATORS,
    TIMES,
)


def german(sentence: Sentence) -> str:
    """The German of a sentence, with capital, commas and full stop or question mark; raises KeyError as `english`."""
    match sentence:
        case Statement(clause, fronted):
            front = TIMES[clause.time].german if fronted else ""
            text = f"{front} {_verb_first(replace(clause, time=''))}" if fronted else _verb_second(clause)
        case Question(clause, asks):
            text = _question(clause, asks)
        case Complex(main, conjunction, subordinate, first, asked):
            word = (_question_adverb if asked else _conjunction)(conjunction, subordinate)
            part = f"{word} {_verb_final(subordinate)}"
            text = f"{part}, {_verb_first(main)}" if first else f"{_verb_second(main)}, {part}"
        case Coordination(first_clause, conjunction, second):
            text = f"{_verb_second(first_clause)}{COORDINATORS[conjunction]} {_verb_second(second)}"
    text = re.sub(r",+(?=,|$)", "", text)
    return text[0].upper() + text[1:] + ("?" if isinstance(sentence, Question) else ".")


def noun_phrase(phrase: NP, case: str, kein: bool = False) -> str:
    """A noun phrase in a case, its relative clause between commas."""
    text = core(phrase, case, kein=kein)
    return text if phrase.relative is None else f"{text}, {_relative(phrase, phrase.relative)},"


def _conjunction(english: str, clause: Clause) -> str:
    return "als" if english == "when" and clause.tense == "past" else SUBORDINATORS[english]


def _question_adverb(english: str, clause: Clause) -> str:
    return "wohin" if english == "where" and clause.verb.frame == "go" else QUESTION_ADVERBS[english]


def _verb_second(clause: Clause) -> str:
    return f"{noun_phrase(clause.subject, 'nom')} {_finite_and_rest(clause, [])}"


def _verb_first(clause: Clause) -> str:
    return _finite_and_rest(clause, [noun_phrase(clause.subject, "nom")])


def _finite_and_rest(clause: Clause, subject: list[str]) -> str:
    verb, prefix, last = verb_forms(clause)
    return _join([verb, *subject, *_middle(clause), prefix, last]) + _infinitive(clause)


def _verb_final(clause: Clause) -> str:
    return f"{noun_phrase(clause.subject, 'nom')} {_final_rest(clause)}"


def _final_rest(clause: Clause) -> str:
    verb, prefix, last = verb_forms(clause)
    return _join([*_middle(clause), last, prefix + verb]) + _infinitive(clause)


def _infinitive(clause: Clause) -> str:
    if clause.infinitive is None:
        return ""
    verb = clause.infinitive.verb
    # anzurufen is one word, zu kaufen two.
    infinitive = f"{verb.prefix}zu{verb.stem}" if verb.prefix else f"zu {verb.stem}"
    return ", " + _join([*_middle(clause.infinitive), infinitive])


def _question(clause: Clause, asks: str) -> str:
    if asks == "subject":
        return _verb_second(clause)
    if asks == "object":
        assert clause.object is not None
        case = "dat" if clause.verb.frame == "dat" else "acc"
        return f"{noun_phrase(clause.object, case)} {_verb_first(replace(clause, object=None))}"
    return _join([_question_adverb(asks, clause) if asks else "", _verb_first(clause)])


def _relative(head: NP, clause: Clause) -> str:
    head = replace(head, relative=None)
    if clause.subject == GAP:
        return f"{relative_pronoun(head, 'nom')} {_final_rest(replace(clause, subject=head))}"
    if clause.object == GAP:
        fixed, _, case = clause.verb.frame.rpartition(" ")
        pronoun = relative_pronoun(head, case if case in ("acc", "dat") else "acc")
        return _join([fixed, pronoun, _verb_final(replace(clause, object=None))])
    assert clause.place is not None
    german_preposition, case = preposition(clause.place.preposition, head)
    return f"{german_preposition} {relative_pronoun(head, case)} {_verb_final(replace(clause, place=None))}"


def _middle(clause: Clause) -> list[str]:
    """What stands between the finite verb (and the subject) and the end, in German order."""
    thing, frame = clause.object, clause.verb.frame
    pronoun = early = late = indefinite = fixed = ""
    kein = clause.negated and _negated_by_kein(clause)
    if thing is not None and " " in frame:
        german_preposition, case = frame.split()
        fixed = prepositional(german_preposition, case, thing)
    elif thing is not None:
        text = noun_phrase(thing, "dat" if frame == "dat" else "acc", kein)
        if thing.is_pronoun:
            pronoun = text
        elif not thing.is_definite:
            indefinite = text
        elif frame == "dat":
            early = text
        else:
            late = text
    if clause.recipient is not None:
        early = noun_phrase(clause.recipient, "dat")
    return [
        pronoun,
        early,
        TIMES[clause.time].german if clause.time else "",
        late,
        FREQUENCIES[clause.frequency].german if clause.frequency else "",
        "nicht" if clause.negated and not kein else "",
        indefinite,
        MANNERS[clause.manner].german if clause.manner else "",
        fixed,
        _place(clause.place) if clause.place else "",
        _predicate(clause, kein),
    ]


def _negated_by_kein(clause: Clause) -> bool:
    if isinstance(clause.predicate, NP):
        return clause.predicate.takes_kein
    return clause.object is not None and " " not in clause.verb.frame and clause.object.takes_kein


def _place(place: Place) -> str:
    german_preposition, case = preposition(place.preposition, place.phrase)
    return prepositional(german_preposition, case, place.phrase)


def _predicate(clause: Clause, kein: bool) -> str:
    predicate = clause.predicate
    if isinstance(predicate, NP):
        noun = NOUNS[predicate.noun]
        feminine = bool(noun.feminine) and not predicate.plural and _is_female(clause.subject)
        # A profession without an adjective has no article: Er ist Lehrer.
        bare = "job" in noun.classes and predicate.determiner == "a" and not predicate.adjective and not kein
        return core(predicate, "nom", kein=kein, bare=bare, feminine=feminine)
    if not predicate:
        return ""
    adjective = ADJECTIVES[predicate]
    if clause.standard is None:
        return adjective.german
    standard = noun_phrase(clause.standard, "nom")
    return f"so {adjective.german} wie {standard}" if clause.equal else f"{adjective.german_comparative} als {standard}"


def _is_female(subject: NP) -> bool:
    if subject.noun in NAMES:
        return NAMES[subject.noun] == "f"
    return subject.noun == "she" or (subject.noun in NOUNS and NOUNS[subject.noun].gender == "f")


def _join(words: list[str]) -> str:
    return " ".join(filter(None, words))
