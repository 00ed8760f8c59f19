"""Calibration data of `neural-layers export` out of a file."""

from pathlib import Path
from typing import Any

import torch

from neural_layers.errors import InputError

ROWS, LONGEST, BATCH = 64, 256, 8


def read_calibration(model: Any, tokenizer_folder: Path, path: Path) -> list[dict[str, torch.Tensor]]:
    """At most 64 rows of at most 256 tokens, in batches of 8: of a text or, for a translator, of source TAB target.

    Raises InputError for a file that is missing, empty or cannot be read, and for a folder without tokenizer.
    """
    from neural_layers.models.loading import check_vocabulary, load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    check_vocabulary(tokenizer, model.config.vocab_size, tokenizer_folder)
    if model.config.is_encoder_decoder:
        return _pairs(model, tokenizer, path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--calibration {path} cannot be read as UTF-8 text: {error}") from None
    # A token has at least a byte; more text than this is not needed, and takes long to cut into tokens.
    ids = tokenizer(text[: 64 * ROWS * LONGEST], verbose=False)["input_ids"]
    length = min(LONGEST, model.config.max_position_embeddings, len(ids))
    if not length:
        raise InputError(f"--calibration {path} holds no tokens; give a text such as the model is to read")
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)[:ROWS]
    return [{"input_ids": part} for part in rows.split(BATCH)]


def _pairs(model: Any, tokenizer: Any, path: Path) -> list[dict[str, torch.Tensor]]:
    from neural_layers.distill.data.batches import TranslationCollator, TranslationDataset
    from neural_layers.distill.data.pairs import read_pairs

    dataset = TranslationDataset(read_pairs(path)[:ROWS], tokenizer, model.config.max_position_embeddings)
    rows, collate = [dataset[i] for i in range(len(dataset))], TranslationCollator(tokenizer)
    return [collate(rows[at : at + BATCH]) for at in range(0, len(rows), BATCH)]
