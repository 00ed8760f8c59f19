"""Serving an exported language model with numpy and ONNX Runtime alone.

Letters: B batch, T length, V vocabulary.
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
from neural_layers.models.export.session import OnnxState, StateSession, check_config, metadata, open_session
from neural_layers.models.export.stepper import Stepper
from neural_layers.models.export.text import TextPieces, load_tokenizer

# Tokens of a prompt that are read at a time: attention builds a bias of (T, S).
PREFILL = 512


class OnnxModel:
    """A language model in a folder that `export_onnx` wrote.

    path: the folder. threads: of one operator; by default as many as there are cores.

    generate(…) and stream(…) take the options of `GenerationOptions`, which bear the names of transformers' `generate`;
    what is left out comes from generation_config.json. Greedy tokens are those of the PyTorch model.
    Raises InputError for a folder without model.onnx, a model that was not exported here, and a config.json of another
    model; ImportError without the extra `onnx`.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        self.folder = Path(path)
        file = self.folder / "model.onnx"
        session = open_session(file, threads)
        described = metadata(session, file)
        if described["kind"] != "causal_lm":
            raise InputError(f"{file} is a {described['kind']}; use OnnxTranslator")
        check_config(described, self.folder)
        self.session = StateSession(session)
        self.vocab_size, self.context = described["config"]["vocab_size"], described["context"]
        defaults = self.folder / "generation_config.json"
        self.defaults = read_json(defaults) if defaults.is_file() else {}

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's `tokenizers.Tokenizer`; raises InputError where there is none."""
        return load_tokenizer(self.folder)

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
        inputs = input_ids if inputs is None else inputs
        if inputs is None:
            raise InputError("generate needs a prompt: text, or token ids")
        if isinstance(inputs, str):
            (text,) = self.generate([inputs], **options)
            return text
        is_text = len(inputs) > 0 and isinstance(inputs[0], str)
        chosen = GenerationOptions.resolve(self.defaults, options)
        rows = [self._encode(prompt) for prompt in inputs] if is_text else inputs
        ids, kept = as_batch(rows, attention_mask, chosen.padding, self.vocab_size)
        texts = [TextPieces(self.tokenizer, chosen.stops) for _ in ids] if is_text or chosen.stops else []
        made = list(self._tokens(ids, kept, chosen, texts))
        return [text.take() for text in texts] if is_text else np.concatenate([ids, np.stack(made, axis=1)], axis=1)

    def stream(self, prompt: Any, **options: Any) -> Iterator[str]:
        """Pieces of the text that follows a prompt (text, or one row of ids), as soon as they are certain."""
        chosen = GenerationOptions.resolve(self.defaults, options)
        row = self._encode(prompt) if isinstance(prompt, str) else prompt
        ids, kept = as_batch(row, None, chosen.padding, self.vocab_size)
        if len(ids) != 1:
            raise InputError(f"stream takes one prompt, not {len(ids)}; call it for each")
        text = TextPieces(self.tokenizer, chosen.stops)
        return self._pieces(ids, kept, chosen, text)

    def _pieces(self, ids: np.ndarray, kept: np.ndarray, options: GenerationOptions, text: TextPieces) -> Iterator[str]:
        for _ in self._tokens(ids, kept, options, [text]):
            piece = text.take()
            if piece:
                yield piece

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

    def _encode(self, prompt: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(prompt).ids
        return ids
