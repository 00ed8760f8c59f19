"""What a teacher cache was made of, as hashes: another teacher or other data need another cache."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of a model's weights with their names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            _add(digest, name, value)
    return digest.hexdigest()


def data_hash(examples: Any, collate: Callable[[list[Any]], dict[str, Tensor]]) -> str:
    """SHA-256 of every example as the models see it: what `collate` makes of it alone, tokenizer and lengths included.

    Padding plays no part, so that the batch size does not either.
    """
    digest = hashlib.sha256()
    for batch in batches(examples, collate, 1):
        for name, value in sorted(batch.items()):
            if name != "index" and isinstance(value, Tensor):
                _add(digest, name, value)
    return digest.hexdigest()


def batches(
    examples: Any, collate: Callable[[list[Any]], dict[str, Tensor]], batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """All examples in their order, with "index" (B,) in each batch."""
    for start in range(0, len(examples), batch_size):
        numbers = range(start, min(start + batch_size, len(examples)))
        yield {**collate([examples[i] for i in numbers]), "index": torch.tensor(numbers)}


def _add(digest: Any, name: str, value: Tensor) -> None:
    value = value.detach().cpu().contiguous()
    digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
    digest.update(value.reshape(-1).view(torch.uint8).numpy())
