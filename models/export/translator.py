"""Serving an exported translator with numpy and ONNX Runtime alone.

Letters: B batch, S source length, T target length.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from neural_layers.errors import InputError
from neural_layers.models.export.folder import read_json
from neural_layers.models.export.loop import as_batch, decode
from neural_layers.models.export.sampling import GenerationOptions
from neural_layers.models.export.served import Served
from neural_layers.models.export.session import Encoder, StateSession, adapter_inputs, metadata, open_session
from neural_layers.models.export.stepper import Stepper
from neural_layers.models.export.text import TextPieces


class OnnxTranslator(Served):
    """An encoder-decoder translator in a folder that `export_onnx` wrote.

    path: the folder, with encoder.onnx and decoder.onnx. threads: of one operator; by default as many as there are
    cores. adapter: as of `OnnxModel`.

    generate(…) and stream(…) take the options of `GenerationOptions`; what is left out comes from
    generation_config.json. Greedy tokens are those of the PyTorch model.
    Raises InputError for a folder without the graphs, graphs that were not exported here, and a config.json of another
    model; ImportError without the extra `onnx`.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, adapter: str | Path | None = None) -> None:
        folder = Path(path)
        encoder = open_session(folder / "encoder.onnx", threads)
        described = metadata(encoder, folder / "encoder.onnx")
        super().__init__(folder, described)
        decoder = open_session(self.folder / "decoder.onnx", threads)
        if metadata(decoder, self.folder / "decoder.onnx") != described:
            raise InputError(f"encoder.onnx and decoder.onnx in {self.folder} are of two exports; export again")
        given = adapter_inputs([encoder, decoder], adapter)
        self.encoder, self.decoder = Encoder(encoder, given[0]), StateSession(decoder, given[1])
        config = read_json(self.folder / "config.json")
        self.start_token = self.defaults.get("decoder_start_token_id", config.get("decoder_start_token_id"))
        self.pad_token = config.get("pad_token_id") or 0

    def generate(self, inputs: Any = None, attention_mask: Any = None, *, input_ids: Any = None, **options: Any) -> Any:
        """Translate token ids or text.

        inputs: a text or a list of texts: returned are texts; or ids, one row or several (of different lengths are
        padded on the right): returned are int64 (B, 1 + T) behind the start token, with padding behind the end.
        attention_mask: (B, S), 1 for a token that counts; by default 0 for padding. input_ids: as `inputs`.
        Raises InputError for empty sources, ids outside the vocabulary, and more tokens than the context holds.
        """
        return self._generate(input_ids if inputs is None else inputs, attention_mask, options)

    def stream(self, text: str, **options: Any) -> Iterator[str]:
        """Pieces of the translation, as soon as they are certain."""
        return self._stream([self._encode(text)], options)

    def _batch(
        self, rows: Any, attention_mask: Any, options: GenerationOptions
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if attention_mask is None and hasattr(rows, "ndim"):
            attention_mask = np.atleast_2d(np.asarray(rows)) != self.pad_token
        ids, mask = as_batch(rows, attention_mask, self.pad_token, self.vocab_size, pad_left=False)
        if ids.shape[1] > self.context:
            raise InputError(
                f"a source of {ids.shape[1]} tokens is longer than the context of {self.context}; split it"
            )
        return ids, mask, np.full((len(ids), 1), self.start_token)

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
