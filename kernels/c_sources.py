"""The C sources of a checkout, and a digest that tells whether a library was built from them.

setup.py runs this file to build the digest into the library. A library older than its sources would be called with the
arguments of another version.
"""

import hashlib
from pathlib import Path


def sources(folder: Path) -> list[Path]:
    """Every C file below the folder of the kernels, in a fixed order; none in an installed package."""
    return sorted([*folder.glob("*.[ch]"), *folder.glob("*/*.[ch]")])


def digest(folder: Path) -> str:
    """Sixteen hexadecimal digits of what the sources say."""
    contents = hashlib.sha256()
    for path in sources(folder):
        contents.update(path.name.encode() + b"\0" + path.read_bytes())
    return contents.hexdigest()[:16]
