"""Words of any language, and the scripts that put no spaces between them."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from neural_layers.errors import InputError

# Thai, Lao, Tibetan, Burmese, Khmer, kana, Han with its extensions, halfwidth katakana.
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff"
    "\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
_UNSPACED_SHARE = 0.25
# sacrebleu's tokenizer for a language; its others for Japanese and Korean need packages of their own.
_TOKENIZERS = {"zh": "zh", **dict.fromkeys(("ja", "th", "lo", "bo", "my", "km"), "char")}


class _Spacing(dict[int, str]):
    """For `str.translate`: letters, digits, combining marks stay, unspaced letters stand alone, the rest is space."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        is_word = char.isalnum() or unicodedata.category(char).startswith("M")
        self[code] = " " if not is_word else f" {char} " if _UNSPACED.match(char) else char
        return self[code]


_SPACING = _Spacing()


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation.

    Letters of all scripts count, with their combining marks; in scripts without spaces each character is a word.
    On ASCII these are the words of rouge-score's own tokenizer, which drops all other letters ("Größe" → "gr", "e").
    """
    return text.lower().translate(_SPACING).split()


def word_counts(texts: Iterable[str]) -> Counter[str]:
    """How often each word stands in the texts."""
    return Counter(word for text in texts for word in words(text))


def unspaced_share(texts: Iterable[str]) -> float:
    """The share of the letters that are of scripts without spaces between words."""
    unspaced = letters = 0
    for text in texts:
        here = len(_UNSPACED.findall(text))
        unspaced += here
        letters += here + sum(char.isalpha() for char in _UNSPACED.sub("", text))
    return unspaced / max(letters, 1)


def target_tokenizer(references: Sequence[str], language: str | None) -> str:
    """The name of sacrebleu's tokenizer that cuts these references into words: 13a, or zh or char by `language`.

    language: of the references, by its code (a region after - or _ is ignored)
    Raises InputError where the references are written without spaces, but the language is not given, or is another:
    BLEU and TER would take a sentence for one word.
    """
    code = re.split("[-_]", (language or "").lower())[0]
    if code in _TOKENIZERS:
        return _TOKENIZERS[code]
    share = unspaced_share(references)
    if share > _UNSPACED_SHARE:
        example = next(text for text in references if _UNSPACED.search(text))[:20]
        given = f"the target language {language!r} has them" if language else "the target language is not given"
        raise InputError(
            f"bleu, ter and length_ratio cannot be computed: {share:.0%} of the letters of the references are written "
            f"without spaces between words ({example!r}), and {given}; set --target-language to zh or ja "
            f"(or {', '.join(sorted(set(_TOKENIZERS) - {'zh', 'ja'}))}), which count characters"
        )
    return "13a"
