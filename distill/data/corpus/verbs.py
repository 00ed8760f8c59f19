"""The verbs, the auxiliaries and the modals.

Columns: English base | simple past (`-`: looks like the present, not used) | participle (`=`: as the past) | German
infinitive (`an+rufen`: separable) | du …, er … (`-`: regular) | preterite with er (`-`: regular) | perfect with er |
subjects | frame (see `words.Verb`) | objects
"""

from neural_layers.distill.data.corpus.words import Verb, rows

_TRANSITIVE = """
buy | bought | = | kaufen | - | - | hat gekauft | person | acc | thing food mass drink clothes vehicle
sell       | sold       | =         | verkaufen    | - | - | hat verkauft | person | acc | thing food clothes vehicle
see | saw | seen | sehen | siehst sieht | sah | hat gesehen | person animal | acc | person animal thing vehicle
find       | found      | =         | finden       | - | fand | hat gefunden | person | acc | animal thing clothes
look for   | looked for | =         | suchen       | - | - | hat gesucht | person | acc | person animal thing
lose       | lost       | =         | verlieren    | - | verlor | hat verloren | person | acc | thing clothes
forget | forgot | forgotten | vergessen | vergisst vergisst | vergaß | hat vergessen | person | acc | thing told
need       | needed     | =         | brauchen     | - | - | hat gebraucht | person | acc | thing medicine clothes
eat        | ate        | eaten     | essen        | isst isst | aß | hat gegessen | person | acc | food mass
drink      | drank      | drunk     | trinken      | - | trank | hat getrunken | person animal | acc | drink
cook       | cooked     | =         | kochen       | - | - | hat gekocht | person | acc | food
read       | -          | read      | lesen        | liest liest | las | hat gelesen | person | acc | text
write      | wrote      | written   | schreiben    | - | schrieb | hat geschrieben | person | acc | told written
open       | opened     | =         | öffnen       | öffnest öffnet | öffnete | hat geöffnet | person | acc | openable
close      | closed     | =         | schließen    | - | schloss | hat geschlossen | person | acc | openable
repair     | repaired   | =         | reparieren   | - | - | hat repariert | person | acc | vehicle device
wash | washed | = | waschen | wäschst wäscht | wusch | hat gewaschen | person | acc | clothes vehicle
clean      | cleaned    | =         | putzen       | - | - | hat geputzt | person | acc | room clothes
visit      | visited    | =         | besuchen     | - | - | hat besucht | person | acc | person building
know       | knew       | known     | kennen       | - | kannte | hat gekannt | person | acc | person song told
love       | loved      | =         | lieben       | - | - | hat geliebt | person | acc | person animal
hear       | heard      | =         | hören        | - | - | hat gehört | person animal | acc | person song animal
understand | understood | =         | verstehen    | - | verstand | hat verstanden | person | acc | person told
ask        | asked      | =         | fragen       | - | - | hat gefragt | person | acc | person
meet       | met        | =         | treffen      | triffst trifft | traf | hat getroffen | person | acc | person
wear       | wore       | worn      | tragen       | trägst trägt | trug | hat getragen | person | acc | clothes
paint      | painted    | =         | malen        | - | - | hat gemalt | person | acc | picture animal
sing       | sang       | sung      | singen       | - | sang | hat gesungen | person | acc | song
have | had | = | haben | hast hat | hatte | hat gehabt | person | acc | animal vehicle appointment illness fever
take       | took       | taken     | nehmen       | nimmst nimmt | nahm | hat genommen | person | acc | medicine public
examine    | examined   | =         | untersuchen  | - | - | hat untersucht | medic | acc | ill body
treat      | treated    | =         | behandeln    | - | - | hat behandelt | medic | acc | ill illness
prescribe  | prescribed | =         | verschreiben | - | verschrieb | hat verschrieben | medic | acc | medicine
call       | called     | =         | an+rufen     | - | rief | hat angerufen | person | acc | person
invite     | invited    | =         | ein+laden    | lädst lädt | lud | hat eingeladen | person | acc | person
pick up    | picked up  | =         | ab+holen     | - | - | hat abgeholt | person | acc | person thing
turn off   | turned off | =         | aus+schalten | - | - | hat ausgeschaltet | person | acc | device
tidy up    | tidied up  | =         | auf+räumen   | - | - | hat aufgeräumt | person | acc | room
put on     | -          | put on    | an+ziehen    | - | zog | hat angezogen | person | acc | clothes
lay        | laid       | =         | legen        | - | - | hat gelegt | person | lay | thing
"""

_DATIVE = """
help        | helped        | =     | helfen    | hilfst hilft | half | hat geholfen | person | dat | person animal
thank       | thanked       | =     | danken    | - | - | hat gedankt | person | dat | person
answer      | answered      | =     | antworten | - | - | hat geantwortet | person | dat | person
follow      | followed      | =     | folgen    | - | - | ist gefolgt | person animal | dat | person animal
trust       | trusted       | =     | vertrauen | - | - | hat vertraut | person | dat | person
listen to   | listened to   | =     | zu+hören  | - | - | hat zugehört | person | dat | person
belong to   | belonged to   | =     | gehören   | - | - | hat gehört | thing vehicle | dat | person
give        | gave          | given | geben     | gibst gibt | gab | hat gegeben | person | give | thing medicine food
show        | showed        | shown | zeigen    | - | - | hat gezeigt | person | give | thing place limb
send        | sent          | =     | schicken  | - | - | hat geschickt | person | give | thing
bring       | brought       | =     | bringen   | - | brachte | hat gebracht | person | give | thing drink medicine
offer       | offered       | =     | an+bieten | - | bot | hat angeboten | person | give | drink food
explain     | explained     | =     | erklären  | - | - | hat erklärt | person | to | told event
recommend | recommended | = | empfehlen | empfiehlst empfiehlt | empfahl | hat empfohlen | person | to | medicine
wait for    | waited for    | =     | warten    | - | - | hat gewartet | person | auf acc | person public
think of    | thought of    | =     | denken    | - | dachte | hat gedacht | person | an acc | person event
dream of    | dreamed of    | =     | träumen   | - | - | hat geträumt | person | von dat | animal vehicle place
talk to     | talked to     | =     | sprechen  | sprichst spricht | sprach | hat gesprochen | person | mit dat | person
suffer from | suffered from | =     | leiden    | - | litt | hat gelitten | person | an dat | illness
"""

_INTRANSITIVE = """
sleep | slept | = | schlafen | schläfst schläft | schlief | hat geschlafen | person animal | none | -
work        | worked      | =             | arbeiten     | - | - | hat gearbeitet | person | none | -
laugh       | laughed     | =             | lachen       | - | - | hat gelacht | person | none | -
cry         | cried       | =             | weinen       | - | - | hat geweint | person | none | -
dance       | danced      | =             | tanzen       | - | - | hat getanzt | person | none | -
play        | played      | =             | spielen      | - | - | hat gespielt | person animal | none | -
wait        | waited      | =             | warten       | - | - | hat gewartet | person | none | -
swim        | swam        | swum          | schwimmen    | - | schwamm | ist geschwommen | person animal | none | -
get up      | got up      | =             | auf+stehen   | - | stand | ist aufgestanden | person | none | -
fall asleep|fell asleep|fallen asleep|ein+schlafen|schläfst schläft|schlief|ist eingeschlafen|person|none|-
arrive      | arrived     | =             | an+kommen    | - | kam | ist angekommen | person public | none | -
depart      | departed    | =             | ab+fahren    | fährst fährt | fuhr | ist abgefahren | public | none | -
hurt        | -           | hurt          | weh+tun      | tust tut | tat | hat wehgetan | limb | none | -
live        | lived       | =             | wohnen       | - | - | hat gewohnt | person | live | -
stay        | stayed      | =             | bleiben      | - | blieb | ist geblieben | person | live | -
go          | went        | gone          | gehen        | - | ging | ist gegangen | person | go | -
come        | came        | come          | kommen       | - | kam | ist gekommen | person | go | -
run         | ran         | run           | laufen       | läufst läuft | lief | ist gelaufen | person animal | go | -
travel      | travelled   | =             | fahren       | fährst fährt | fuhr | ist gefahren | person | go | -
"""

_WITH_CLAUSE = """
say     | said     | =     | sagen       | -             | -         | hat gesagt | person | that | -
believe | believed | =     | glauben     | -             | -         | hat geglaubt | person | that | -
hope    | hoped    | =     | hoffen      | -             | -         | hat gehofft | person | that | -
know    | knew     | known | wissen      | weißt weiß    | wusste    | hat gewusst | person | that | -
ask     | asked    | =     | fragen      | -             | -         | hat gefragt | person | whether | -
try     | tried    | =     | versuchen   | -             | -         | hat versucht | person | zu | -
promise | promised | =     | versprechen | versprichst verspricht | versprach | hat versprochen | person | zu | -
plan    | planned  | =     | planen      | -             | -         | hat geplant | person | zu | -
"""

# be has persons of its own in English, so that `english.py` spells its finite forms out.
_AUXILIARY = """
be   | was | been | sein   | bist ist   | war   | ist gewesen | person | none | -
will | -   | =    | werden | wirst wird | wurde | ist geworden | person | none | -
"""


def _third_person(english: str) -> str:
    """The form with he: washes, tidies up, has."""
    word, space, particle = english.partition(" ")
    if word in ("have", "be", "will"):
        return {"have": "has", "be": "is", "will": "will"}[word]
    if word.endswith("y") and word[-2] not in "aeou":
        return word[:-1] + "ies" + space + particle
    return word + ("es" if word.endswith(("s", "sh", "ch", "x", "o")) else "s") + space + particle


def _verb(cells: list[str]) -> Verb:
    english, past, perfect, german, present, preterite, perfekt, subjects, frame, objects = cells
    prefix, _, stem = german.rpartition("+")
    second, _, third = present.partition(" ")
    auxiliary, _, participle = perfekt.partition(" ")
    return Verb(
        english=english,
        third_english=_third_person(english),
        past=past,
        perfect=past if perfect == "=" else perfect,
        prefix=prefix,
        stem=stem,
        second=second,
        third=third,
        preterite=preterite,
        participle=participle,
        auxiliary={"hat": "haben", "ist": "sein"}[auxiliary],
        subjects=tuple(subjects.split()),
        frame=frame,
        objects=tuple(objects.split()),
    )


VERBS = tuple(map(_verb, rows(_TRANSITIVE + _DATIVE + _INTRANSITIVE, 10)))
CLAUSE_VERBS = tuple(map(_verb, rows(_WITH_CLAUSE, 10)))
BE, WILL = map(_verb, rows(_AUXILIARY, 10))
HAVE = next(verb for verb in VERBS if verb.english == "have")


def verb(english: str, frame: str | None = None) -> Verb:
    """The first verb with this English base form (and this frame); raises KeyError where there is none."""
    for candidate in (BE, *VERBS, *CLAUSE_VERBS):
        if candidate.english == english and frame in (None, candidate.frame):
            return candidate
    raise KeyError(f"no verb {english!r} with frame {frame!r}")
