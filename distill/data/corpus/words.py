"""The records that the word tables hold, and the reader of those tables.

A table is a text with one word a line and its columns between `|`; `-` marks an empty column.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Noun:
    """A noun: its forms in both languages and what it can stand for.

    plural, german_plural: "" for a mass noun
    gender:                m, f or n
    oblique:               the accusative and dative singular; a weak noun has -n there (der Junge, den Jungen)
    classes:               the kinds of thing that verbs and adjectives ask for
    feminine:              the word for a woman of that profession, or ""
    """

    english: str
    plural: str
    gender: str
    german: str
    oblique: str
    german_plural: str
    classes: tuple[str, ...]
    feminine: str


@dataclass(frozen=True)
class Verb:
    """A verb: its forms in both languages and the objects that it takes.

    past:         "" where the simple past looks like the present (read), so that it is never used
    prefix, stem: the separable prefix or "", and the infinitive without it (an, rufen)
    second, third: the present with du and er; preterite: with er
    participle:   with prefix (angerufen); auxiliary: haben or sein
    frame:        `none`, `acc`, `dat`, `give` (she gives him a book), `to` (she explains the word to him), `go` (with a
                  goal), `live` (with a place), `lay` (an object and a goal), `that` or `whether` (a clause), `zu` (an
                  infinitive), or `auf acc`: a fixed preposition and its case
    """

    english: str
    third_english: str
    past: str
    perfect: str
    prefix: str
    stem: str
    second: str
    third: str
    preterite: str
    participle: str
    auxiliary: str
    subjects: tuple[str, ...]
    frame: str
    objects: tuple[str, ...]


@dataclass(frozen=True)
class Adjective:
    """An adjective: `inflected` is the form that takes endings (teuer, teur-), the comparatives follow "than"/"als"."""

    english: str
    german: str
    inflected: str
    comparative: str
    german_comparative: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Adverb:
    """An adverbial of fixed form; `uses` names the tenses or frames that it may stand with."""

    english: str
    german: str
    uses: tuple[str, ...]


def rows(table: str, columns: int) -> list[list[str]]:
    """The rows of a word table as lists of cells, `-` read as ""; raises ValueError for a row of another length."""
    found = []
    for line in filter(None, map(str.strip, table.splitlines())):
        cells = ["" if cell.strip() == "-" else cell.strip() for cell in line.split("|")]
        if len(cells) != columns:
            raise ValueError(f"word table row {line!r} has {len(cells)} columns, not {columns}")
        found.append(cells)
    return found
