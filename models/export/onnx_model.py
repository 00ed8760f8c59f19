"""Serving an exported language model with numpy and ONNX Runtime alone.

Letters: B batch, T length, V vocabulary.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from neural_layers.errors import InputError
from neural_layers.models.export.loop import as_batch, decode
from neural_layers.models.export.sampling import GenerationOptions
from neural_layers.models.export.served import Served
from neural_layers.models.export.session import OnnxState, StateSession, adapter_inputs, metadata, open_session
from neural_layers.models.export.stepper import Stepper
from neural_layers.models.export.text import TextPieces

# Tokens of a prompt that are read at a time: attention builds a bias of (T, S).
PREFILL = 512


class OnnxModel(Served):
    """A language model in a folder that `export_onnx` wrote.

    path: the folder. threads: of one operator; by default as many as there are cores. adapter: a folder of PEFT's
    files, in place of the adapter of an export with lora="inputs"; of the same layers and ranks.

    generate(…) and stream(…) take the options of `GenerationOptions`, which bear the names of transformers' `generate`;
    what is left out comes from generation_config.json. Greedy tokens are those of the PyTorch model.
    Raises InputError for a folder without model.onnx, a model that was not exported here, and a config.json of another
    model or adapter; ImportError without the extra `onnx`.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, adapter: str | Path | None = None) -> None:
        file = Path(path) / "model.onnx"
        session = open_session(file, threads)
        described = metadata(session, file)
        if described["kind"] != "causal_lm":
            raise InputError(f"{file} is a {described['kind']}; use OnnxTranslator")
        super().__init__(Path(path), described)
        self.session = StateSession(session, adapter_inputs([session], adapter)[0])

    def forward(
        self, input_ids: Any, attention_mask: Any = None, state: OnnxState | None = None, keep: int | None = None
    ) -> tuple[np.ndarray, OnnxState]:
        """Logits (B, keep, V) of the last `keep` tokens (by default of all), and the state to go on from.

        input_ids: (B, T), or rows of different lengths, which are padded on the left. attention_mask: (B, T), 1 for a
        token that counts. state: of an earlier call; None at the beginning. It is not changed.
        Raises InputError for ids outside the vocabulary, a state of another model or batch, and more tokens than the
        context.
        """
        ids, kept = as_batch(input_ids, attention_mask, 0, self.vocab_size)
        state = self.session.start(len(ids)) if state is None else state
        self.session.check(state, len(ids))
        self._check_length(len(state) + ids.shape[1])
        keep = ids.shape[1] if keep is None else keep
        if not 1 <= keep <= ids.shape[1]:
            raise InputError(f"keep={keep} must be from 1 to the {ids.shape[1]} tokens of input_ids")
        return self.session.run(ids, kept, state, keep)

    def generate(self, inputs: Any = None, attention_mask: Any = None, *, input_ids: Any = None, **options: Any) -> Any:
        """Continue token ids or text.

        inputs: text or a list of texts: the continuation of each is returned as text; or ids, one row or several:
        returned are int64 (B, T + new), the prompt included, with padding behind the end of a row.
        attention_mask: (B, T), 1 for a token that counts. input_ids: as `inputs`.
        Raises InputError for empty prompts, ids outside the vocabulary, and more tokens than the context holds.
        """
        return self._generate(input_ids if inputs is None else inputs, attention_mask, options)

    def stream(self, prompt: Any, **options: Any) -> Iterator[str]:
        """Pieces of the text that follows a prompt (text, or one row of ids), as soon as they are certain."""
        return self._stream(self._encode(prompt) if isinstance(prompt, str) else prompt, options)

    def _batch(
        self, rows: Any, attention_mask: Any, options: GenerationOptions
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids, kept = as_batch(rows, attention_mask, options.padding, self.vocab_size)
        return ids, kept, ids

    def _tokens(
        self, ids: np.ndarray, kept: np.ndarray, options: GenerationOptions, texts: list[TextPieces]
    ) -> Iterator[np.ndarray]:
        budget = options.budget(ids.shape[1])
        self._check_length(ids.shape[1] + budget, budget)
        state = self.session.start(len(ids))
        for begin in range(0, ids.shape[1], PREFILL):
            part = slice(begin, begin + PREFILL)
            logits, state = self.session.run(ids[:, part], kept[:, part], state, 1)
        step = Stepper(self.session, state)
        yield from decode(step, logits[:, -1], ids, options, budget, texts)

    def _check_length(self, length: int, budget: int = 0) -> None:
        if length > self.context:
            prompt = f"{length - budget} tokens of the prompt and {budget} new ones" if budget else f"{length} tokens"
            raise InputError(
                f"{prompt} are more than the context of {self.context}; shorten the prompt or lower max_new_tokens"
            )
