"""What the served language model and the served translator share.

Letters: B batch, T length.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from neural_layers.errors import InputError
from neural_layers.models.export.folder import read_json
from neural_layers.models.export.sampling import GenerationOptions
from neural_layers.models.export.session import check_config
from neural_layers.models.export.text import TextPieces, load_tokenizer


class Served(ABC):
    """A folder that `export_onnx` wrote: its tokenizer, its generation defaults, and `generate` around a loop of steps.

    folder: where it is. described: the metadata of its graph. Raises InputError for a config.json of another model.
    """

    def __init__(self, folder: Path, described: dict[str, Any]) -> None:
        check_config(described, folder)
        self.folder = folder
        self.vocab_size, self.context = described["config"]["vocab_size"], described["context"]
        defaults = folder / "generation_config.json"
        self.defaults = read_json(defaults) if defaults.is_file() else {}

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's `tokenizers.Tokenizer`; raises InputError where there is none."""
        return load_tokenizer(self.folder)

    @abstractmethod
    def _batch(
        self, rows: Any, attention_mask: Any, options: GenerationOptions
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids and mask of the rows, padded to one length, and the tokens (B, T) that new ones are put behind."""

    @abstractmethod
    def _tokens(
        self, ids: np.ndarray, mask: np.ndarray, options: GenerationOptions, texts: list[TextPieces]
    ) -> Iterator[np.ndarray]:
        """The new tokens (B,), step by step."""

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def _generate(self, inputs: Any, attention_mask: Any, options: dict[str, Any]) -> Any:
        if inputs is None:
            raise InputError("generate needs a prompt: text, or token ids")
        if isinstance(inputs, str):
            (text,) = self._generate([inputs], attention_mask, options)
            return text
        is_text = len(inputs) > 0 and isinstance(inputs[0], str)
        chosen = GenerationOptions.resolve(self.defaults, options)
        rows = [self._encode(text) for text in inputs] if is_text else inputs
        ids, mask, before = self._batch(rows, attention_mask, chosen)
        texts = [TextPieces(self.tokenizer, chosen.stops) for _ in ids] if is_text or chosen.stops else []
        made = list(self._tokens(ids, mask, chosen, texts))
        return [text.take() for text in texts] if is_text else np.concatenate([before, np.stack(made, axis=1)], axis=1)

    def _stream(self, rows: Any, options: dict[str, Any]) -> Iterator[str]:
        chosen = GenerationOptions.resolve(self.defaults, options)
        ids, mask, _ = self._batch(rows, None, chosen)
        if len(ids) != 1:
            raise InputError(f"stream takes one prompt, not {len(ids)}; call it for each")
        pieces = TextPieces(self.tokenizer, chosen.stops)
        return (piece for _ in self._tokens(ids, mask, chosen, [pieces]) if (piece := pieces.take()))
