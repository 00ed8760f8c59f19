"""German inflection: articles, adjective endings, nouns, verbs and noun phrases in a case (nom, acc or dat)."""

from neural_layers.distill.data.corpus.nouns import CITIES, NAMES, NOUNS
from neural_layers.distill.data.corpus.phrases import NP, Clause
from neural_layers.distill.data.corpus.small_words import (
    ADJECTIVES,
    CONTRACTIONS,
    COUNTS,
    DER_WORDS,
    INTERROGATIVES,
    MODALS,
    POSSESSIVES,
    PREPOSITIONS,
    PRONOUNS,
    QUANTITIES,
)
from neural_layers.distill.data.corpus.verbs import HAVE, WILL, verb
from neural_layers.distill.data.corpus.words import Noun, Verb

# Case, then masculine, feminine, neuter, plural.
ARTICLES = {"nom": "der die das die", "acc": "den die das die", "dat": "dem der dem den"}
DER_ENDINGS = {"nom": "er e es e", "acc": "en e es e", "dat": "em er em en"}
EIN_ENDINGS = {"nom": "- e - e", "acc": "en e - e", "dat": "em er em en"}
WEAK = {"nom": "e e e en", "acc": "en e e en", "dat": "en en en en"}
MIXED = {"nom": "er e es en", "acc": "en e es en", "dat": "en en en en"}
# The strong endings are those of der (without a genitive).
STRONG = DER_ENDINGS

_FIRST_PERSON = {"sein": "bin", "wissen": "weiß"}
_PLURAL = {"sein": "sind"}


def cell(table: dict[str, str], case: str, gender: str, plural: bool) -> str:
    """The entry of an ending table for a case, a gender and a number."""
    ending = table[case].split()[3 if plural else "mfn".index(gender)]
    return "" if ending == "-" else ending


def determiner(word: str, case: str, gender: str, plural: bool, kein: bool = False) -> tuple[str, dict[str, str]]:
    """The German determiner and the table of the adjective endings after it.

    Arguments: `word` as in `NP.determiner`; `kein` negates "a" and the bare noun.
    Raises: KeyError for an unknown determiner.
    """
    if word == "the":
        return cell(ARTICLES, case, gender, plural), WEAK
    if word in DER_WORDS:
        return DER_WORDS[word] + cell(DER_ENDINGS, case, gender, plural), WEAK
    if kein:
        return "kein" + cell(EIN_ENDINGS, case, gender, plural), MIXED
    if word == "a":
        return "ein" + cell(EIN_ENDINGS, case, gender, plural), MIXED
    if word in POSSESSIVES:
        return POSSESSIVES[word] + cell(EIN_ENDINGS, case, gender, plural), MIXED
    if word in QUANTITIES:
        return QUANTITIES[word][:-1] + cell(DER_ENDINGS, case, gender, plural), STRONG
    if word in NAMES:
        return word + "s", STRONG
    return (COUNTS[word] if word else ""), STRONG


def noun_form(noun: Noun, case: str, plural: bool) -> str:
    """The noun in a case and a number; the dative plural adds n except after n and s."""
    if not plural:
        return noun.german if case == "nom" else noun.oblique
    return noun.german_plural + ("n" if case == "dat" and noun.german_plural[-1] not in "ns" else "")


def core(phrase: NP, case: str, *, kein: bool = False, bare: bool = False, feminine: bool = False) -> str:
    """A noun phrase without its relative clause.

    Arguments: `kein` negates it, `bare` leaves the article out (Er ist Lehrer), `feminine` takes the woman's word.
    """
    if phrase.is_pronoun:
        pronoun = PRONOUNS[phrase.noun]
        return {"nom": pronoun.nominative, "acc": pronoun.accusative, "dat": pronoun.dative}[case]
    if phrase.noun in INTERROGATIVES:
        return INTERROGATIVES[phrase.noun][case]
    if phrase.noun in NAMES or phrase.noun in CITIES:
        return CITIES.get(phrase.noun, phrase.noun)
    noun = NOUNS[phrase.noun]
    form, gender = (noun.feminine, "f") if feminine else (noun_form(noun, case, phrase.plural), noun.gender)
    article, endings = determiner(phrase.determiner, case, gender, phrase.plural, kein)
    words = [] if bare or not article else [article]
    if phrase.adjective:
        stem = ADJECTIVES[phrase.adjective].inflected
        words.append(stem + cell(endings, case, gender, phrase.plural))
    return " ".join([*words, form])


def relative_pronoun(head: NP, case: str) -> str:
    """The relative pronoun for a head noun; it is the article but for the dative plural, denen."""
    if case == "dat" and head.plural:
        return "denen"
    return cell(ARTICLES, case, NOUNS[head.noun].gender, head.plural)


def preposition(english: str, phrase: NP) -> tuple[str, str]:
    """The German preposition and its case; before a city, to is nach."""
    return ("nach", "dat") if english == "to" and phrase.noun in CITIES else PREPOSITIONS[english]


def prepositional(german: str, case: str, phrase: NP) -> str:
    """A preposition with its noun phrase, contracted with a definite article (in dem: im)."""
    text = core(phrase, case)
    first, _, rest = text.partition(" ")
    if phrase.determiner == "the" and (german, first) in CONTRACTIONS:
        return f"{CONTRACTIONS[german, first]} {rest}"
    return f"{german} {text}"


def finite(word: Verb, tense: str, person: int, plural: bool) -> str:
    """The finite form without its prefix, `tense` present or past (Präteritum, not with du)."""
    if tense == "past":
        assert person != 2, "the corpus has no preterite with du"
        singular = word.preterite or _stem(word) + ("ete" if _stem(word)[-1] in "td" else "te")
        return singular + ("" if not plural else "n" if singular.endswith("e") else "en")
    if plural:
        return _PLURAL.get(word.stem, word.stem)
    if person == 1:
        stem = word.stem[:-3] + "l" if word.stem.endswith("eln") else _stem(word)
        return _FIRST_PERSON.get(word.stem, stem + "e")
    if person == 2:
        return word.second or _stem(word) + (
            "est" if _stem(word)[-1] in "td" else "t" if _stem(word)[-1] in "sßzx" else "st"
        )
    return word.third or _stem(word) + ("et" if _stem(word)[-1] in "td" else "t")


def _stem(word: Verb) -> str:
    return word.stem[:-2] if word.stem.endswith("en") else word.stem[:-1]


def verb_forms(clause: Clause) -> tuple[str, str, str]:
    """The finite verb, the separable prefix that stands apart from it, and the infinitive or participle after all.

    I call: (rufe, an, ""); I have called: (habe, "", angerufen); I must call: (muss, "", anrufen).
    """
    word, person, plural = clause.verb, clause.subject.person, clause.subject.is_plural
    infinitive = word.prefix + word.stem
    if clause.modal:
        return _modal(clause, person, plural), "", infinitive
    if clause.tense == "perfect":
        auxiliary = HAVE if word.auxiliary == "haben" else verb("be")
        return finite(auxiliary, "present", person, plural), "", word.participle
    if clause.tense == "future":
        return finite(WILL, "present", person, plural), "", infinitive
    return finite(word, clause.tense, person, plural), word.prefix, ""


def _modal(clause: Clause, person: int, plural: bool) -> str:
    modal = MODALS[clause.modal]
    if clause.tense == "past":
        assert person != 2, "the corpus has no preterite with du"
        return modal.past_singular + ("n" if plural else "")
    singular, second, several = modal.negated if clause.negated else (modal.singular, modal.second, modal.plural)
    return several if plural else second if person == 2 else singular
