"""An exported folder: written beside and moved into place, complete or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neural_layers.errors import InputError

# Of a tokenizer, as transformers names them.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
# protobuf refuses messages of 2 GiB; weights this large go to a file of their own.
LARGEST = 2_000_000_000


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises InputError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no {path.name} in {path.parent}; take the whole folder of the export") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); export the model again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}, not an object; export the model again")
    return found


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`; its files move into `folder` when the block ends, and vanish where it fails.

    Weights move first and models after them, so that no model ever stands beside weights that are not its own: each
    export's weights have their own name.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; an export needs a folder")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        yield stage
        _move(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def _move(stage: Path, folder: Path) -> None:
    rank = {".data": 0, ".onnx": 1}
    files = sorted(stage.iterdir(), key=lambda path: rank.get(path.suffix, 2))
    for path in files:
        os.chmod(path, 0o644)
        os.replace(path, folder / path.name)
    kept = {path.name for path in files}
    for old in folder.glob("*.onnx.data"):
        if old.name not in kept:
            old.unlink()


def write_model(proto: Any, path: Path, described: dict[str, Any], *, external: bool | None = None) -> None:
    """Write a model with what `metadata` is to find in it.

    external: whether weights go to a file of their own; by default where they are too large for one.
    """
    import onnx

    entry = proto.metadata_props.add()
    entry.key, entry.value = "neural_layers", json.dumps(described)
    if external is None:
        external = sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > LARGEST
    if not external:
        onnx.save_model(proto, str(path))
        return
    name = f"{path.stem}-{path.parent.name.removeprefix('.export-')}.onnx.data"
    onnx.save_model(proto, str(path), save_as_external_data=True, location=name, size_threshold=1024)


def travel_along(model: Any, stage: Path, tokenizer: Any) -> None:
    """Write config.json, generation_config.json and the tokenizer's files.

    tokenizer: one of transformers', a folder, or None for the files in the folder that the model was loaded from.
    Raises InputError for a tokenizer that is missing, cannot be read, or has more tokens than the model.
    """
    model.config.to_json_file(str(stage / "config.json"), use_diff=False)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.to_json_file(str(stage / "generation_config.json"))
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(stage))
    else:
        _copy_tokenizer(model, stage, tokenizer)
    _check_tokenizer(stage / "tokenizer.json", model.config.vocab_size)


def _copy_tokenizer(model: Any, stage: Path, tokenizer: Any) -> None:
    source = Path(tokenizer if tokenizer is not None else getattr(model, "name_or_path", "") or "")
    if tokenizer is not None and not (source / "tokenizer.json").is_file():
        raise InputError(f"there is no tokenizer.json in {source}; save a fast tokenizer there")
    if source != Path():
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, stage / name)


def _check_tokenizer(path: Path, vocab_size: int) -> None:
    """Raise InputError where a tokenizer has tokens that the model does not know."""
    if not path.is_file():
        return
    from tokenizers import Tokenizer

    try:
        known = Tokenizer.from_file(str(path)).get_vocab_size()
    except Exception as error:  # what a broken file raises is a bare Exception
        raise InputError(f"the tokenizer cannot be read: {error}; give another with tokenizer=…") from error
    if known > vocab_size:
        raise InputError(f"the tokenizer has {known} tokens and the model {vocab_size}; give the model's own tokenizer")
