"""English: noun phrases, verb groups and the order of a clause."""

from dataclasses import replace

from neural_layers.distill.data.corpus.nouns import CITIES, NAMES, NOUNS
from neural_layers.distill.data.corpus.phrases import (
    GAP,
    NP,
    Clause,
    Complex,
    Coordination,
    Question,
    Sentence,
    Statement,
)
from neural_layers.distill.data.corpus.small_words import (
    ADJECTIVES,
    ENGLISH_INTERROGATIVES,
    ENGLISH_PLURAL_DETERMINERS,
    MODALS,
    PRONOUNS,
    QUESTION_ADVERBS,
)
from neural_layers.distill.data.corpus.verbs import BE
from neural_layers.distill.data.corpus.words import Verb


def english(sentence: Sentence) -> str:
    """The English of a sentence, with capital and full stop or question mark; raises KeyError for an unknown word."""
    match sentence:
        case Statement(clause, fronted):
            text = f"{clause.time} {_statement(replace(clause, time=''))}" if fronted else _statement(clause)
        case Question(clause, asks):
            text = _question(clause, asks)
        case Complex(main, conjunction, subordinate, first, _):
            part = f"{conjunction} {_statement(subordinate)}"
            text = f"{part}, {_statement(main)}" if first else f"{_statement(main)} {part}"
        case Coordination(first_clause, conjunction, second):
            text = f"{_statement(first_clause)}, {conjunction} {_statement(second)}"
    return text[0].upper() + text[1:] + ("?" if isinstance(sentence, Question) else ".")


def noun_phrase(phrase: NP, subject: bool = False) -> str:
    """The words of a noun phrase, `subject` choosing between he and him."""
    if phrase.is_pronoun:
        pronoun = PRONOUNS[phrase.noun]
        return pronoun.english if subject else pronoun.english_object
    if phrase.noun in ENGLISH_INTERROGATIVES:
        return ENGLISH_INTERROGATIVES[phrase.noun][0 if subject else 1]
    if phrase.noun in NAMES or phrase.noun in CITIES:
        return phrase.noun
    noun = NOUNS[phrase.noun]
    words = [word for word in (phrase.adjective, noun.plural if phrase.plural else noun.english) if word]
    if determiner := _determiner(phrase, words[0]):
        words.insert(0, determiner)
    if phrase.relative is not None:
        words.append(_relative(phrase, phrase.relative))
    return " ".join(words)


def _determiner(phrase: NP, following: str) -> str:
    if phrase.determiner == "a":
        return "an" if following[0] in "aeiou" else "a"
    if phrase.determiner in NAMES:
        return phrase.determiner + "'s"
    return ENGLISH_PLURAL_DETERMINERS.get(phrase.determiner, phrase.determiner) if phrase.plural else phrase.determiner


def _relative(head: NP, clause: Clause) -> str:
    person = "person" in NOUNS[head.noun].classes
    head = replace(head, relative=None)
    if clause.subject == GAP:
        clause = replace(clause, subject=head)
        return " ".join(["who" if person else "that", *_after_subject(clause)])
    if clause.object == GAP:
        return " ".join(["whom" if person else "that", _statement(replace(clause, object=None))])
    assert clause.place is not None
    return f"{clause.place.preposition} which {_statement(replace(clause, place=None))}"


def _statement(clause: Clause) -> str:
    return " ".join([noun_phrase(clause.subject, subject=True), *_after_subject(clause)])


def _after_subject(clause: Clause) -> list[str]:
    operator, rest = _verb_group(clause, with_do=clause.negated)
    negation = ["not"] if clause.negated else []
    words = ["cannot"] if clause.negated and operator == "can" else [*filter(None, [operator]), *negation]
    return [*words, *filter(None, [clause.frequency, rest]), *_complements(clause)]


def _question(clause: Clause, asks: str) -> str:
    if asks == "subject":
        return _statement(clause)
    opening = [asks] if asks else []
    if asks == "object":
        assert clause.object is not None
        opening, clause = [noun_phrase(clause.object)], replace(clause, object=None)
    elif asks and asks not in QUESTION_ADVERBS:
        raise KeyError(f"cannot ask for {asks!r}; ask for subject, object or one of {', '.join(QUESTION_ADVERBS)}")
    operator, rest = _verb_group(clause, with_do=True)
    subject, negation = noun_phrase(clause.subject, subject=True), "not" if clause.negated else ""
    words = [operator, subject, negation, clause.frequency, rest]
    return " ".join([*opening, *filter(None, words), *_complements(clause)])


def _complements(clause: Clause) -> list[str]:
    words = []
    thing = noun_phrase(clause.object) if clause.object else ""
    if clause.recipient:
        to = noun_phrase(clause.recipient)
        words += [thing, f"to {to}"] if clause.verb.frame == "to" else [to, thing]
    else:
        words.append(thing)
    words.append(_predicate(clause))
    if clause.infinitive is not None:
        words += ["to", clause.infinitive.verb.english, *_complements(clause.infinitive)]
    if clause.place:
        words.append(f"{clause.place.preposition} {noun_phrase(clause.place.phrase)}")
    return [word for word in (*words, clause.manner, clause.time) if word]


def _predicate(clause: Clause) -> str:
    if isinstance(clause.predicate, NP):
        return noun_phrase(clause.predicate)
    if clause.standard is None:
        return clause.predicate
    standard = noun_phrase(clause.standard)
    if clause.equal:
        return f"as {clause.predicate} as {standard}"
    return f"{ADJECTIVES[clause.predicate].comparative} than {standard}"


def _verb_group(clause: Clause, with_do: bool) -> tuple[str, str]:
    """The operator, which a question puts before the subject ("" for none), and the rest of the verb."""
    verb, base = clause.verb, clause.verb.english
    third = clause.subject.person == 3 and not clause.subject.is_plural
    if clause.modal:
        modal = MODALS[clause.modal]
        finite = modal.past if clause.tense == "past" else modal.third if third else modal.english
        if not modal.english.endswith(" to"):
            return finite, base
        return (_do(clause.tense, third), f"{modal.english} {base}") if with_do else ("", f"{finite} {base}")
    if clause.tense == "perfect":
        return ("has" if third else "have"), verb.perfect
    if clause.tense == "future":
        return "will", base
    if verb is BE:
        return _be(clause), ""
    return (_do(clause.tense, third), base) if with_do else ("", _simple(verb, clause.tense, third))


def _do(tense: str, third: bool) -> str:
    return "did" if tense == "past" else "does" if third else "do"


def _simple(verb: Verb, tense: str, third: bool) -> str:
    if tense == "past":
        assert verb.past, f"the simple past of {verb.english!r} looks like its present"
        return verb.past
    return verb.third_english if third else verb.english


def _be(clause: Clause) -> str:
    plural_form = clause.subject.is_plural or clause.subject.person == 2
    if clause.tense == "past":
        return "were" if plural_form else "was"
    return "are" if plural_form else "am" if clause.subject.person == 1 else "is"
