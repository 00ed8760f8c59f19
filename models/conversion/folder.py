"""What goes with a model's weights: tokenizer and generation defaults, and how it compares with transformers."""

import shutil
from pathlib import Path
from typing import Any

import torch

from neural_layers.errors import InputError
from neural_layers.models.conversion.architectures import hybrid_config
from neural_layers.models.conversion.checkpoint import first_line, read_config
from neural_layers.models.conversion.loading import from_transformers

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
CHECKED_ROWS, CHECKED_LENGTH = 2, 64


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy the files of the tokenizer and the generation defaults as they are; return their names."""
    found = [name for name in COMPANIONS if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


@torch.no_grad()
def logit_difference(folder: Path, seed: int = 0) -> tuple[float, float]:
    """The largest difference between our logits and those of transformers for the model in `folder`, on random tokens
    in float32, and the largest logit.

    Raises InputError for a hybrid model, which transformers has not, and for what `from_transformers` raises it.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    if config.model_type == "neural_hybrid":
        raise InputError(f"{folder} holds a hybrid model, and transformers has none to compare it with")
    limit = hybrid_config(config, torch.float32).max_position_embeddings
    shape = (CHECKED_ROWS, min(CHECKED_LENGTH, limit))
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    ours = from_transformers(folder, dtype=torch.float32)(ids).logits
    # Whatever a broken folder raises there, it was read here: what remains is told as it is.
    try:
        peer: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except Exception as error:
        raise InputError(f"transformers cannot load {folder}: {first_line(error)}") from error
    theirs = peer.eval()(ids, use_cache=False).logits
    return float((ours - theirs).abs().max()), float(theirs.abs().max())
