"""The nouns, the names and the cities.

Columns: English singular | plural | gender | German singular (`Junge/Jungen`: a weak noun with its other cases) |
plural | classes | the feminine of a profession. Each English word has one German word, a profession the masculine one.
"""

from neural_layers.distill.data.corpus.words import Noun, rows

_PEOPLE = """
teacher     | teachers     | m | Lehrer             | Lehrer             | person job       | Lehrerin
doctor      | doctors      | m | Arzt               | Ärzte              | person job medic | Ärztin
dentist     | dentists     | m | Zahnarzt           | Zahnärzte          | person job medic | Zahnärztin
nurse       | nurses       | f | Krankenschwester   | Krankenschwestern  | person medic     | -
patient     | patients     | m | Patient/Patienten  | Patienten          | person ill       | -
student     | students     | m | Student/Studenten  | Studenten          | person job       | Studentin
pupil       | pupils       | m | Schüler            | Schüler            | person           | -
baker       | bakers       | m | Bäcker             | Bäcker             | person job       | Bäckerin
engineer    | engineers    | m | Ingenieur          | Ingenieure         | person job       | Ingenieurin
pharmacist  | pharmacists  | m | Apotheker          | Apotheker          | person job medic | Apothekerin
lawyer      | lawyers      | m | Anwalt             | Anwälte            | person job       | Anwältin
driver      | drivers      | m | Fahrer             | Fahrer             | person           | -
colleague   | colleagues   | m | Kollege/Kollegen   | Kollegen           | person           | -
customer    | customers    | m | Kunde/Kunden       | Kunden             | person           | -
boss        | bosses       | m | Chef               | Chefs              | person           | -
neighbour   | neighbours   | m | Nachbar/Nachbarn   | Nachbarn           | person           | -
friend      | friends      | m | Freund             | Freunde            | person           | -
guest       | guests       | m | Gast               | Gäste              | person           | -
man         | men          | m | Mann               | Männer             | person ill       | -
woman       | women        | f | Frau               | Frauen             | person ill       | -
boy         | boys         | m | Junge/Jungen       | Jungen             | person ill       | -
girl        | girls        | n | Mädchen            | Mädchen            | person ill       | -
child       | children     | n | Kind               | Kinder             | person ill       | -
father      | fathers      | m | Vater              | Väter              | person family    | -
mother      | mothers      | f | Mutter             | Mütter             | person family    | -
brother     | brothers     | m | Bruder             | Brüder             | person family    | -
sister      | sisters      | f | Schwester          | Schwestern         | person family    | -
uncle       | uncles       | m | Onkel              | Onkel              | person family    | -
aunt        | aunts        | f | Tante              | Tanten             | person family    | -
grandmother | grandmothers | f | Großmutter         | Großmütter         | person family    | -
"""

_THINGS = """
dog          | dogs          | m | Hund          | Hunde          | animal              | -
cat          | cats          | f | Katze         | Katzen         | animal              | -
horse        | horses        | n | Pferd         | Pferde         | animal              | -
bird         | birds         | m | Vogel         | Vögel          | animal              | -
cow          | cows          | f | Kuh           | Kühe           | animal              | -
apple        | apples        | m | Apfel         | Äpfel          | food                | -
egg          | eggs          | n | Ei            | Eier           | food                | -
banana       | bananas       | f | Banane        | Bananen        | food                | -
potato       | potatoes      | f | Kartoffel     | Kartoffeln     | food                | -
cake         | cakes         | m | Kuchen        | Kuchen         | food                | -
soup         | soups         | f | Suppe         | Suppen         | food                | -
bread        | -             | n | Brot          | -              | mass                | -
meat         | -             | n | Fleisch       | -              | mass                | -
cheese       | -             | m | Käse          | -              | mass                | -
rice         | -             | m | Reis          | -              | mass                | -
butter       | -             | f | Butter        | -              | mass                | -
milk         | -             | f | Milch         | -              | drink               | -
water        | -             | n | Wasser        | -              | drink               | -
coffee       | -             | m | Kaffee        | -              | drink               | -
tea          | -             | m | Tee           | -              | drink               | -
book         | books         | n | Buch          | Bücher         | thing text          | -
letter       | letters       | m | Brief         | Briefe         | thing text openable written | -
newspaper    | newspapers    | f | Zeitung       | Zeitungen      | thing text          | -
story        | stories       | f | Geschichte    | Geschichten    | text told           | -
question     | questions     | f | Frage         | Fragen         | told                | -
word         | words         | n | Wort          | Wörter         | told                | -
song         | songs         | n | Lied          | Lieder         | song                | -
picture      | pictures      | n | Bild          | Bilder         | thing               | -
table        | tables        | m | Tisch         | Tische         | thing surface       | -
chair        | chairs        | m | Stuhl         | Stühle         | thing surface       | -
box          | boxes         | f | Kiste         | Kisten         | thing openable      | -
bottle       | bottles       | f | Flasche       | Flaschen       | thing openable      | -
key          | keys          | m | Schlüssel     | Schlüssel      | thing               | -
bag          | bags          | f | Tasche        | Taschen        | thing openable      | -
cup          | cups          | f | Tasse         | Tassen         | thing               | -
knife        | knives        | n | Messer        | Messer         | thing               | -
pencil       | pencils       | m | Bleistift     | Bleistifte     | thing               | -
flower       | flowers       | f | Blume         | Blumen         | thing               | -
gift         | gifts         | n | Geschenk      | Geschenke      | thing openable      | -
door         | doors         | f | Tür           | Türen          | openable            | -
window       | windows       | n | Fenster       | Fenster        | openable            | -
lamp         | lamps         | f | Lampe         | Lampen         | thing device        | -
computer     | computers     | m | Computer      | Computer       | thing device        | -
clock        | clocks        | f | Uhr           | Uhren          | thing device        | -
car          | cars          | n | Auto          | Autos          | vehicle             | -
bicycle      | bicycles      | n | Fahrrad       | Fahrräder      | vehicle             | -
bus          | buses         | m | Bus           | Busse          | vehicle public      | -
train        | trains        | m | Zug           | Züge           | vehicle public      | -
shirt        | shirts        | n | Hemd          | Hemden         | clothes             | -
coat         | coats         | m | Mantel        | Mäntel         | clothes             | -
hat          | hats          | m | Hut           | Hüte           | clothes             | -
shoe         | shoes         | m | Schuh         | Schuhe         | clothes             | -
jacket       | jackets       | f | Jacke         | Jacken         | clothes             | -
dress        | dresses       | n | Kleid         | Kleider        | clothes             | -
school       | schools       | f | Schule        | Schulen        | place               | -
house        | houses        | n | Haus          | Häuser         | place building      | -
garden       | gardens       | m | Garten        | Gärten         | place               | -
city         | cities        | f | Stadt         | Städte         | place               | -
village      | villages      | n | Dorf          | Dörfer         | place               | -
kitchen      | kitchens      | f | Küche         | Küchen         | place room          | -
room         | rooms         | n | Zimmer        | Zimmer         | place room          | -
office       | offices       | n | Büro          | Büros          | place room          | -
hospital     | hospitals     | n | Krankenhaus   | Krankenhäuser  | place building      | -
pharmacy     | pharmacies    | f | Apotheke      | Apotheken      | place building      | -
hotel        | hotels        | n | Hotel         | Hotels         | place building      | -
church       | churches      | f | Kirche        | Kirchen        | place building      | -
museum       | museums       | n | Museum        | Museen         | place building      | -
park         | parks         | m | Park          | Parks          | place               | -
forest       | forests       | m | Wald          | Wälder         | place               | -
shop         | shops         | m | Laden         | Läden          | place building      | -
tablet       | tablets       | f | Tablette      | Tabletten      | medicine            | -
medicine     | medicines     | n | Medikament    | Medikamente    | medicine            | -
ointment     | ointments     | f | Salbe         | Salben         | medicine            | -
fever        | -             | n | Fieber        | -              | fever               | -
infection    | infections    | f | Infektion     | Infektionen    | illness             | -
allergy      | allergies     | f | Allergie      | Allergien      | illness             | -
wound        | wounds        | f | Wunde         | Wunden         | illness body        | -
arm          | arms          | m | Arm           | Arme           | body limb           | -
leg          | legs          | n | Bein          | Beine          | body limb           | -
knee         | knees         | n | Knie          | Knie           | body limb           | -
foot         | feet          | m | Fuß           | Füße           | body limb           | -
hand         | hands         | f | Hand          | Hände          | body limb           | -
eye          | eyes          | n | Auge          | Augen          | body limb           | -
tooth        | teeth         | m | Zahn          | Zähne          | body limb           | -
appointment  | appointments  | m | Termin        | Termine        | appointment         | -
examination  | examinations  | f | Untersuchung  | Untersuchungen | event               | -
operation    | operations    | f | Operation     | Operationen    | event               | -
treatment    | treatments    | f | Behandlung    | Behandlungen   | event               | -
"""


def _noun(cells: list[str]) -> Noun:
    english, plural, gender, german, german_plural, classes, feminine = cells
    nominative, _, oblique = german.partition("/")
    return Noun(
        english, plural, gender, nominative, oblique or nominative, german_plural, tuple(classes.split()), feminine
    )


NOUNS = {noun.english: noun for noun in map(_noun, rows(_PEOPLE + _THINGS, 7))}
# Names are alike in both languages; none ends in s, so that the genitive is always the name and s.
NAMES = {"Anna": "f", "Maria": "f", "Julia": "f", "Laura": "f", "Peter": "m", "Paul": "m", "Martin": "m", "David": "m"}
CITIES = {"Berlin": "Berlin", "Hamburg": "Hamburg", "Vienna": "Wien", "Munich": "München", "Cologne": "Köln"}


def nouns_of(classes: tuple[str, ...]) -> tuple[Noun, ...]:
    """The nouns of any of these classes, in the order of the table."""
    return tuple(noun for noun in NOUNS.values() if set(classes) & set(noun.classes))
