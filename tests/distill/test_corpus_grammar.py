"""Hand-written translations, at least one for each phenomenon of the grammar."""

from dataclasses import replace

import pytest

from neural_layers.distill.data.corpus import translate
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
from neural_layers.distill.data.corpus.verbs import BE, verb

HE, SHE, ME, YOU, WE, THEY = map(NP, ("he", "she", "I", "you", "we", "they"))
TEACHER, DOCTOR, CHILD, BOOK, SCHOOL = map(NP, ("teacher", "doctor", "child", "book", "school"))
A_BOOK, ANNA, TABLET = NP("book", "a"), NP("Anna"), NP("tablet", "a")


def say(subject: NP, word: str, *things: NP, **parts: object) -> Statement:
    """A statement: `things` are the object and the recipient, `fronted` goes to the statement."""
    fronted = bool(parts.pop("fronted", False))
    return Statement(clause(subject, word, *things, **parts), fronted)


def clause(subject: NP, word: str, *things: NP, frame: str | None = None, **parts: object) -> Clause:
    return Clause(subject, verb(word, frame), **dict(zip(("object", "recipient"), things, strict=False)), **parts)


def ask(asks: str, subject: NP, word: str, *things: NP, **parts: object) -> Question:
    return Question(clause(subject, word, *things, **parts), asks)


BUYS = clause(TEACHER, "buy", A_BOOK)
SLEEPS = clause(CHILD, "sleep")
TRY = clause(HE, "try")

ARTICLES = [
    (say(TEACHER, "buy", A_BOOK), "The teacher buys a book.", "Der Lehrer kauft ein Buch."),
    (say(NP("woman"), "see", NP("man")), "The woman sees the man.", "Die Frau sieht den Mann."),
    (say(NP("boy"), "help", NP("boy", "my")), "The boy helps my boy.", "Der Junge hilft meinem Jungen."),
    (say(CHILD, "thank", NP("nurse")), "The child thanks the nurse.", "Das Kind dankt der Krankenschwester."),
    (say(DOCTOR, "treat", NP("patient")), "The doctor treats the patient.", "Der Arzt behandelt den Patienten."),
    (
        say(HE, "give", A_BOOK, NP("child", plural=True)),
        "He gives the children a book.",
        "Er gibt den Kindern ein Buch.",
    ),
    (say(SHE, "explain", NP("word"), HE), "She explains the word to him.", "Sie erklärt ihm das Wort."),
    (say(WE, "see", THEY), "We see them.", "Wir sehen sie."),
    (say(THEY, "trust", SHE), "They trust her.", "Sie vertrauen ihr."),
    (say(SHE, "sell", NP("car", "her")), "She sells her car.", "Sie verkauft ihr Auto."),
    (say(WE, "love", NP("dog", "our")), "We love our dog.", "Wir lieben unseren Hund."),
    (say(ME, "see", NP("house", "Anna", "old")), "I see Anna's old house.", "Ich sehe Annas altes Haus."),
]
ADJECTIVES = [
    (
        say(NP("man", "the", "old"), "buy", NP("apple", "a", "red")),
        "The old man buys a red apple.",
        "Der alte Mann kauft einen roten Apfel.",
    ),
    (
        say(NP("child", "a", "small"), "help", NP("horse", "the", "small")),
        "A small child helps the small horse.",
        "Ein kleines Kind hilft dem kleinen Pferd.",
    ),
    (
        say(HE, "drink", NP("water", "", "cold")),
        "He drinks cold water.",
        "Er trinkt kaltes Wasser.",
    ),
    (
        say(ME, "buy", NP("hat", "a", "expensive")),
        "I buy an expensive hat.",
        "Ich kaufe einen teuren Hut.",
    ),
    (say(HE, "have", NP("fever", "", "high")), "He has high fever.", "Er hat hohes Fieber."),
    (
        say(THEY, "talk to", NP("friend", "three", "old", plural=True)),
        "They talk to three old friends.",
        "Sie sprechen mit drei alten Freunden.",
    ),
    (
        say(NP("girl", "all", "young", plural=True), "love", NP("flower", "many", "red", plural=True)),
        "All young girls love many red flowers.",
        "Alle jungen Mädchen lieben viele rote Blumen.",
    ),
    (
        say(NP("woman", "every"), "read", NP("letter", "this", "short")),
        "Every woman reads this short letter.",
        "Jede Frau liest diesen kurzen Brief.",
    ),
    (
        say(NP("house"), "be", predicate="old", standard=NP("church")),
        "The house is older than the church.",
        "Das Haus ist älter als die Kirche.",
    ),
    (
        say(ANNA, "be", predicate="clever", standard=NP("brother", "her"), equal=True),
        "Anna is as clever as her brother.",
        "Anna ist so klug wie ihr Bruder.",
    ),
    (say(ANNA, "be", predicate=NP("doctor", "a")), "Anna is a doctor.", "Anna ist Ärztin."),
    (say(HE, "be", predicate=NP("teacher", "a", "good")), "He is a good teacher.", "Er ist ein guter Lehrer."),
    (say(SHE, "be", predicate=NP("lawyer", "a"), negated=True), "She is not a lawyer.", "Sie ist keine Anwältin."),
]
VERBS = [
    (say(YOU, "work", place=Place("in", NP("Vienna"))), "You work in Vienna.", "Du arbeitest in Wien."),
    (say(YOU, "take", TABLET), "You take a tablet.", "Du nimmst eine Tablette."),
    (say(ME, "treat", HE), "I treat him.", "Ich behandle ihn."),
    (say(THEY, "wait for", NP("bus"), tense="past"), "They waited for the bus.", "Sie warteten auf den Bus."),
    (say(WE, "find", NP("key"), tense="past"), "We found the key.", "Wir fanden den Schlüssel."),
    (
        say(TEACHER, "buy", A_BOOK, tense="past", time="yesterday", fronted=True),
        "Yesterday the teacher bought a book.",
        "Gestern kaufte der Lehrer ein Buch.",
    ),
    (
        say(HE, "buy", BOOK, tense="past", time="last week"),
        "He bought the book last week.",
        "Er kaufte letzte Woche das Buch.",
    ),
    (say(SHE, "write", NP("letter"), tense="perfect"), "She has written the letter.", "Sie hat den Brief geschrieben."),
    (
        say(ME, "travel", tense="perfect", place=Place("to", NP("Munich"))),
        "I have travelled to Munich.",
        "Ich bin nach München gefahren.",
    ),
    (
        say(WE, "go", tense="future", time="tomorrow", place=Place("to", SCHOOL)),
        "We will go to the school tomorrow.",
        "Wir werden morgen zur Schule gehen.",
    ),
    (say(HE, "call", DOCTOR), "He calls the doctor.", "Er ruft den Arzt an."),
    (say(HE, "call", DOCTOR, modal="must"), "He must call the doctor.", "Er muss den Arzt anrufen."),
    (say(SHE, "get up", tense="perfect"), "She has got up.", "Sie ist aufgestanden."),
    (say(NP("knee", "my"), "hurt", frequency="often"), "My knee often hurts.", "Mein Knie tut oft weh."),
    (say(YOU, "swim", modal="want to"), "You want to swim.", "Du willst schwimmen."),
    (say(HE, "work", modal="have to", tense="past"), "He had to work.", "Er musste arbeiten."),
    (Statement(replace(TRY, infinitive=SLEEPS)), "He tries to sleep.", "Er versucht, zu schlafen."),
    (
        Statement(replace(TRY, infinitive=clause(HE, "call", SHE))),
        "He tries to call her.",
        "Er versucht, sie anzurufen.",
    ),
]
NEGATION = [
    (say(HE, "buy", A_BOOK, negated=True), "He does not buy a book.", "Er kauft kein Buch."),
    (say(HE, "buy", BOOK, negated=True), "He does not buy the book.", "Er kauft das Buch nicht."),
    (say(ME, "drink", NP("milk", ""), negated=True), "I do not drink milk.", "Ich trinke keine Milch."),
    (
        say(WE, "wait for", HE, tense="past", negated=True),
        "We did not wait for him.",
        "Wir warteten nicht auf ihn.",
    ),
    (
        say(YOU, "take", TABLET, modal="must", negated=True),
        "You must not take a tablet.",
        "Du darfst keine Tablette nehmen.",
    ),
    (say(HE, "work", modal="have to", negated=True), "He does not have to work.", "Er muss nicht arbeiten."),
    (say(SHE, "come", modal="can", negated=True), "She cannot come.", "Sie kann nicht kommen."),
]
PLACES = [
    (
        say(CHILD, "play", place=Place("in", NP("garden", "the", "big"))),
        "The child plays in the big garden.",
        "Das Kind spielt im großen Garten.",
    ),
    (
        say(CHILD, "run", place=Place("into", NP("house"))),
        "The child runs into the house.",
        "Das Kind läuft ins Haus.",
    ),
    (
        say(ME, "go", manner="by bus", place=Place("to", DOCTOR)),
        "I go to the doctor by bus.",
        "Ich gehe mit dem Bus zum Arzt.",
    ),
    (
        say(HE, "lay", BOOK, place=Place("onto", NP("table"))),
        "He lays the book onto the table.",
        "Er legt das Buch auf den Tisch.",
    ),
    (
        say(SHE, "cook", NP("egg", "a"), place=Place("for", NP("guest"))),
        "She cooks an egg for the guest.",
        "Sie kocht ein Ei für den Gast.",
    ),
    (
        say(HE, "suffer from", NP("allergy", "his"), place=None),
        "He suffers from his allergy.",
        "Er leidet an seiner Allergie.",
    ),
]
QUESTIONS = [
    (Question(replace(BUYS, tense="past")), "Did the teacher buy a book?", "Kaufte der Lehrer ein Buch?"),
    (ask("", YOU, "be", predicate="tired"), "Are you tired?", "Bist du müde?"),
    (ask("subject", NP("who"), "call", SHE), "Who calls her?", "Wer ruft sie an?"),
    (ask("object", HE, "help", NP("who")), "Whom does he help?", "Wem hilft er?"),
    (ask("object", HE, "see", NP("who"), tense="perfect"), "Whom has he seen?", "Wen hat er gesehen?"),
    (ask("object", YOU, "eat", NP("what")), "What do you eat?", "Was isst du?"),
    (
        ask("object", THEY, "buy", NP("car", "which"), modal="want to"),
        "Which car do they want to buy?",
        "Welches Auto wollen sie kaufen?",
    ),
    (ask("where", SHE, "go"), "Where does she go?", "Wohin geht sie?"),
    (ask("where", SHE, "live"), "Where does she live?", "Wo wohnt sie?"),
]
TIRED = clause(HE, "be", predicate="tired")
SUBORDINATE = [
    (
        Complex(TIRED, "because", replace(BUYS, tense="perfect")),
        "He is tired because the teacher has bought a book.",
        "Er ist müde, weil der Lehrer ein Buch gekauft hat.",
    ),
    (
        Complex(clause(SHE, "say"), "that", clause(HE, "call", DOCTOR)),
        "She says that he calls the doctor.",
        "Sie sagt, dass er den Arzt anruft.",
    ),
    (
        Complex(clause(HE, "sleep"), "if", TIRED, first=True),
        "If he is tired, he sleeps.",
        "Wenn er müde ist, schläft er.",
    ),
    (
        Complex(replace(SLEEPS, tense="past"), "when", replace(BUYS, tense="past")),
        "The child slept when the teacher bought a book.",
        "Das Kind schlief, als der Lehrer ein Buch kaufte.",
    ),
    (
        Complex(clause(ME, "know", frame="that", negated=True), "whether", SLEEPS),
        "I do not know whether the child sleeps.",
        "Ich weiß nicht, ob das Kind schläft.",
    ),
    (
        Complex(clause(ME, "know", frame="that"), "when", clause(HE, "arrive"), asked=True),
        "I know when he arrives.",
        "Ich weiß, wann er ankommt.",
    ),
    (
        Coordination(SLEEPS, "but", TIRED),
        "The child sleeps, but he is tired.",
        "Das Kind schläft, aber er ist müde.",
    ),
]
RELATIVE = [
    (
        say(replace(TEACHER, relative=clause(GAP, "buy", A_BOOK)), "laugh"),
        "The teacher who buys a book laughs.",
        "Der Lehrer, der ein Buch kauft, lacht.",
    ),
    (
        say(HE, "read", replace(BOOK, relative=clause(SHE, "buy", GAP, tense="past"))),
        "He reads the book that she bought.",
        "Er liest das Buch, das sie kaufte.",
    ),
    (
        say(NP("man", plural=True, relative=clause(WE, "help", GAP)), "cry"),
        "The men whom we help cry.",
        "Die Männer, denen wir helfen, weinen.",
    ),
    (
        say(HE, "sell", NP("house", relative=clause(SHE, "live", place=Place("in", GAP)))),
        "He sells the house in which she lives.",
        "Er verkauft das Haus, in dem sie wohnt.",
    ),
]
EXPECTED = [
    *ARTICLES,
    *ADJECTIVES,
    *VERBS,
    *NEGATION,
    *PLACES,
    *QUESTIONS,
    *SUBORDINATE,
    *RELATIVE,
]


@pytest.mark.parametrize(("sentence", "english", "german"), EXPECTED, ids=[english for _, english, _ in EXPECTED])
def test_a_structure_is_said_rightly_in_both_languages(sentence: Sentence, english: str, german: str) -> None:
    assert translate(sentence) == (english, german)


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(KeyError, match="unicorn"):
        translate(Statement(Clause(NP("unicorn"), BE, predicate="old")))
    with pytest.raises(KeyError, match="cannot ask for 'whose'"):
        translate(ask("whose", HE, "sleep"))
    with pytest.raises(KeyError, match="fly"):
        verb("fly")
