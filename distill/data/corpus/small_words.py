"""Adjectives, adverbials, pronouns, determiners, prepositions, modal verbs and conjunctions."""

from dataclasses import dataclass

from neural_layers.distill.data.corpus.words import Adjective, Adverb, rows

# English | German (`teuer/teur`: the form before endings) | comparatives | the nouns it goes with
_ADJECTIVES = """
old         | alt         | older            | älter          | person animal thing clothes vehicle place device
young       | jung        | younger          | jünger         | person animal
new | neu | newer | neuer | thing clothes vehicle place device medicine openable text
good | gut | better | besser | person animal food mass drink thing clothes vehicle song told
bad         | schlecht    | worse            | schlechter     | food mass thing clothes vehicle song told
big         | groß        | bigger           | größer         | animal food thing place vehicle openable body
small       | klein       | smaller          | kleiner        | person animal food thing place vehicle openable body
beautiful   | schön       | more beautiful   | schöner        | animal thing clothes place song told
red         | rot         | redder           | röter          | food thing clothes vehicle
blue        | blau        | bluer            | blauer         | thing clothes vehicle
green       | grün        | greener          | grüner         | thing clothes vehicle
white       | weiß        | whiter           | weißer         | thing clothes vehicle animal medicine
black       | schwarz     | blacker          | schwärzer      | thing clothes vehicle animal
cold        | kalt        | colder           | kälter         | drink body room food
warm        | warm        | warmer           | wärmer         | drink body room clothes food
hot         | heiß        | hotter           | heißer         | drink food
fresh       | frisch      | fresher          | frischer       | food mass drink
sweet       | süß         | sweeter          | süßer          | food drink
cheap       | billig      | cheaper          | billiger       | food mass drink thing clothes vehicle medicine
expensive   | teuer/teur  | more expensive   | teurer         | food mass drink thing clothes vehicle medicine
clean       | sauber      | cleaner          | sauberer       | thing clothes vehicle place
dirty       | schmutzig   | dirtier          | schmutziger    | thing clothes vehicle place body
long        | lang        | longer           | länger         | text told song clothes event
short       | kurz        | shorter          | kürzer         | text told song clothes event
heavy       | schwer      | heavier          | schwerer       | thing vehicle
dark        | dunkel/dunkl | darker          | dunkler        | place openable clothes
strong      | stark       | stronger         | stärker        | person animal medicine
weak        | schwach     | weaker           | schwächer      | person animal
sick        | krank       | sicker           | kränker        | person animal
healthy     | gesund      | healthier        | gesünder       | person animal food
tired       | müde/müd    | more tired       | müder          | person animal
happy       | glücklich   | happier          | glücklicher    | person
sad         | traurig     | sadder           | trauriger      | person told song
friendly    | freundlich  | friendlier       | freundlicher   | person animal
poor        | arm         | poorer           | ärmer          | person
rich        | reich       | richer           | reicher        | person
clever      | klug        | cleverer         | klüger         | person animal
hungry      | hungrig     | hungrier         | hungriger      | person animal
important   | wichtig     | more important   | wichtiger      | text told appointment event medicine
interesting | interessant | more interesting | interessanter  | text told place
dangerous   | gefährlich  | more dangerous   | gefährlicher   | illness event animal
high        | hoch/hoh    | higher           | höher          | fever
difficult   | schwierig   | more difficult   | schwieriger    | told event
"""

_TIMES = """
yesterday      | gestern       | past
last week      | letzte Woche  | past
last year      | letztes Jahr  | past
today          | heute         | present past future modal
this morning   | heute Morgen  | past
now            | jetzt         | present modal
tomorrow       | morgen        | future modal
next week      | nächste Woche | future modal
every day      | jeden Tag     | present
in the evening | am Abend      | present past future modal
on Monday      | am Montag     | past future modal
on Friday      | am Freitag    | past future modal
"""

_FREQUENCIES = """
often     | oft       | present past perfect
always    | immer     | present past perfect
never     | nie       | present past perfect
rarely    | selten    | present past perfect
sometimes | manchmal  | present past
"""

_MANNERS = """
quickly    | schnell         | none go
slowly     | langsam         | none go
alone      | allein          | none go live
by bus     | mit dem Bus     | go
by train   | mit dem Zug     | go
by car     | mit dem Auto    | go
"""


def _adjective(cells: list[str]) -> Adjective:
    english, german, comparative, german_comparative, classes = cells
    predicate, _, inflected = german.partition("/")
    return Adjective(
        english, predicate, inflected or predicate, comparative, german_comparative, tuple(classes.split())
    )


def _adverbs(table: str) -> dict[str, Adverb]:
    return {english: Adverb(english, german, tuple(uses.split())) for english, german, uses in rows(table, 3)}


ADJECTIVES = {adjective.english: adjective for adjective in map(_adjective, rows(_ADJECTIVES, 5))}
TIMES, FREQUENCIES, MANNERS = _adverbs(_TIMES), _adverbs(_FREQUENCIES), _adverbs(_MANNERS)


@dataclass(frozen=True)
class Pronoun:
    """A personal pronoun; `it` is left out because its German gender is not in the English, `you` is always du."""

    english: str
    english_object: str
    nominative: str
    accusative: str
    dative: str
    person: int
    plural: bool


PRONOUNS = {
    "I": Pronoun("I", "me", "ich", "mich", "mir", 1, False),
    "you": Pronoun("you", "you", "du", "dich", "dir", 2, False),
    "he": Pronoun("he", "him", "er", "ihn", "ihm", 3, False),
    "she": Pronoun("she", "her", "sie", "sie", "ihr", 3, False),
    "we": Pronoun("we", "us", "wir", "uns", "uns", 1, True),
    "they": Pronoun("they", "them", "sie", "sie", "ihnen", 3, True),
}

POSSESSIVES = {"my": "mein", "your": "dein", "his": "sein", "her": "ihr", "our": "unser", "their": "ihr"}
# Those that take the endings of der; the plural word where English has one.
DER_WORDS = {"this": "dies", "every": "jed", "all": "all", "which": "welch"}
ENGLISH_PLURAL_DETERMINERS = {"this": "these"}
# Plural only, followed by the strong endings; the number words take no ending of their own.
COUNTS = {"two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs", "ten": "zehn"}
QUANTITIES = {"many": "viele", "some": "einige"}

# English preposition: the German one and its case. `in`, `on` and the like take the dative at rest, the accusative
# (into, onto) for a goal; `to` is nach before a city.
PREPOSITIONS = {
    "in": ("in", "dat"),
    "behind": ("hinter", "dat"),
    "in front of": ("vor", "dat"),
    "next to": ("neben", "dat"),
    "on": ("auf", "dat"),
    "onto": ("auf", "acc"),
    "into": ("in", "acc"),
    "to": ("zu", "dat"),
    "from": ("aus", "dat"),
    "with": ("mit", "dat"),
    "without": ("ohne", "acc"),
    "for": ("für", "acc"),
    "after": ("nach", "dat"),
    "before": ("vor", "dat"),
}

CONTRACTIONS = {
    ("in", "dem"): "im",
    ("in", "das"): "ins",
    ("an", "dem"): "am",
    ("an", "das"): "ans",
    ("von", "dem"): "vom",
    ("zu", "dem"): "zum",
    ("zu", "der"): "zur",
}


@dataclass(frozen=True)
class Modal:
    """A modal verb in one tense.

    english:          the finite form; where it takes -s with he (want to), `third` is that form
    negated:          the English negation; `do` puts do-support before `base`
    singular:         German with ich and er; second: with du; plural: with wir and sie
    negated_singular, ...: German in a negated clause (must not is nicht dürfen), as (singular, second, plural)
    """

    english: str
    third: str
    past: str
    singular: str
    second: str
    plural: str
    past_singular: str
    negated: tuple[str, str, str]


_MAY = ("darf", "darfst", "dürfen")
MODALS = {
    "can": Modal("can", "can", "could", "kann", "kannst", "können", "konnte", ("kann", "kannst", "können")),
    "must": Modal("must", "must", "", "muss", "musst", "müssen", "", _MAY),
    "may": Modal("may", "may", "", *_MAY, "", _MAY),
    "should": Modal("should", "should", "", "sollte", "solltest", "sollten", "", ("sollte", "solltest", "sollten")),
    "have to": Modal("have to", "has to", "had to", "muss", "musst", "müssen", "musste", ("muss", "musst", "müssen")),
    "want to": Modal(
        "want to", "wants to", "wanted to", "will", "willst", "wollen", "wollte", ("will", "willst", "wollen")
    ),
}

# English conjunction: the German one; `when` is als in the past.
SUBORDINATORS = {
    "because": "weil",
    "although": "obwohl",
    "if": "wenn",
    "when": "wenn",
    "while": "während",
    "before": "bevor",
    "that": "dass",
    "whether": "ob",
}
COORDINATORS = {"and": " und", "but": ", aber", "or": " oder"}
# `where` is wohin with a verb of movement.
QUESTION_ADVERBS = {"where": "wo", "when": "wann", "why": "warum", "how often": "wie oft"}
# The English subject and object form, and the German one in each case.
ENGLISH_INTERROGATIVES = {"who": ("who", "whom"), "what": ("what", "what")}
INTERROGATIVES = {"who": {"nom": "wer", "acc": "wen", "dat": "wem"}, "what": {"nom": "was", "acc": "was"}}
