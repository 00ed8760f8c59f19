"""Serving an exported translator with numpy and ONNX Runtime alone.

Letters: B batch, S source length, T target length.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from neural_layers.errors import InputError
from neural_layers.models.export.folder import read_json
from neural_layers.models.export.loop import as_batch, decode
from neural_layers.models.export.sampling import GenerationOptions
from neural_layers.models.export.session import Encoder, StateSession, check_config, metadata, open_session
from neural_layers.models.export.stepper import Stepper
from neural_layers.models.export.text import TextPieces, load_tokenizer


class OnnxTranslator:
    """An encoder-decoder translator in a folder that `export_onnx` wrote.

    path: the folder, with encoder.onnx and decoder.onnx. threads: of one operator; by default as many as there are
    cores.

    generate(…) and stream(…) take the options of `GenerationOptions`; what is left out comes from
    generation_config.json. Greedy tokens are those of the PyTorch model.
    Raises InputError for a folder without the graphs, graphs that were not exported here, and a config.json of another
    model; ImportError without the extra `onnx`.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        self.folder = Path(path)
        encoder = open_session(self.folder / "encoder.onnx", threads)
        described = metadata(encoder, self.folder / "encoder.onnx")
        check_config(described, self.folder)
        decoder = open_session(self.folder / "decoder.onnx", threads)
        if metadata(decoder, self.folder / "decoder.onnx") != described:
            raise InputError(f"encoder.onnx and decoder.onnx in {self.folder} are of two exports; export again")
        self.encoder, self.decoder = Encoder(encoder), StateSession(decoder)
        self.vocab_size, self.context = described["config"]["vocab_size"], described["context"]
        defaults = self.folder / "generation_config.json"
        self.defaults = read_json(defaults) if defaults.is_file() else {}
        config = read_json(self.folder / "config.json")
        self.start_token = self.defaults.get("decoder_start_token_id", config.get("decoder_start_token_id"))
        self.pad_token = config.get("pad_token_id") or 0

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's `tokenizers.Tokenizer`; raises InputError where there is none."""
        return load_tokenizer(self.folder)

    def generate(self, inputs: Any = None, attention_mask: Any = None, *, input_ids: Any = None, **options: Any) -> Any:
        """Translate token ids or text.

        inputs: a text or a list of texts: returned are texts; or ids, one row or several (of different lengths are
        padded on the right): returned are int64 (B, 1 + T) behind the start token, with padding behind the end.
        attention_mask: (B, S), 1 for a token that counts; by default 0 for padding. input_ids: as `inputs`.
        Raises InputError for empty sources, ids outside the vocabulary, and more tokens than the context holds.
        """
        inputs = input_ids if inputs is None else inputs
        if inputs is None:
            raise InputError("generate needs a prompt: text, or token ids")
        if isinstance(inputs, str):
            (text,) = self.generate([inputs], **options)
            return text
        is_text = len(inputs) > 0 and isinstance(inputs[0], str)
        chosen = GenerationOptions.resolve(self.defaults, options)
        ids, mask = self._sources([self.tokenizer.encode(t).ids for t in inputs] if is_text else inputs, attention_mask)
        texts = [TextPieces(self.tokenizer, chosen.stops) for _ in ids] if is_text or chosen.stops else []
        made = list(self._tokens(ids, mask, chosen, texts))
        if is_text:
            return [text.take() for text in texts]
        return np.concatenate([np.full((len(ids), 1), self.start_token), np.stack(made, axis=1)], axis=1)

    def stream(self, text: str, **options: Any) -> Iterator[str]:
        """Pieces of the translation, as soon as they are certain."""
        chosen = GenerationOptions.resolve(self.defaults, options)
        ids, mask = self._sources([self.tokenizer.encode(text).ids], None)
        pieces = TextPieces(self.tokenizer, chosen.stops)
        return (piece for _ in self._tokens(ids, mask, chosen, [pieces]) if (piece := pieces.take()))

    def _sources(self, inputs: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
        if attention_mask is None and hasattr(inputs, "ndim"):
            attention_mask = np.atleast_2d(np.asarray(inputs)) != self.pad_token
        ids, mask = as_batch(inputs, attention_mask, self.pad_token, self.vocab_size, pad_left=False)
        if ids.shape[1] > self.context:
            raise InputError(
                f"a source of {ids.shape[1]} tokens is longer than the context of {self.context}; split it"
            )
        return ids, mask

    def _tokens(
        self, ids: np.ndarray, mask: np.ndarray, options: GenerationOptions, texts: list[TextPieces]
    ) -> Iterator[np.ndarray]:
        budget = options.budget(1)
        if 1 + budget > self.context:
            raise InputError(f"{budget} new tokens are more than the context of {self.context}; lower max_new_tokens")
        context, state = self.encoder.run(ids, mask), self.decoder.start(len(ids))
        step = Stepper(self.decoder, state, **context)
        start = np.full((len(ids), 1), self.start_token, np.int64)
        yield from decode(step, step(start), start, options, budget, texts)
