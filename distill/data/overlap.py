"""Validation data that training has seen."""

from collections.abc import Iterable, Sequence


def overlap(train: Iterable[str], valid: Sequence[str]) -> str | None:
    """A warning where texts of the validation data also stand in the training data, None where none does.

    Texts are the same where they differ in white space and in upper and lower case alone. The warning names the number
    of them and the first. Pairs are compared whole where they are joined, such as `f"{source}\\t{target}"`.
    """
    known = {_folded(text) for text in train}
    common = [text for text in valid if _folded(text) in known]
    if not common:
        return None
    shown = " ".join(common[0].split())
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    if len(common) == len(valid) and known == {_folded(text) for text in valid}:
        found = f"the validation data is the training data ({len(valid)} texts)"
    else:
        found = f"{len(common)} of {len(valid)} texts of the validation data also stand in the training data"
    return f"{found}, such as {shown!r}; scores on them say nothing about new texts: hold out other texts"


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()
