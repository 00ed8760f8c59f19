"""Decoding token by token in buffers that are bound once.

A step of a small model takes a millisecond, of which handing 40 tensors over and back through Python would be a third.
Here the recurrent states have two sets of buffers, which the steps write in turns; only what grows (keys, values, the
mask) is bound anew.
"""

from typing import Any

import numpy as np

from neural_layers.models.export.session import NEW, PAST, OnnxState, StateSession


class Stepper:
    """Reads a token for each row and returns the logits (B, V) behind it; the state is its own and not given out.

    state: where it begins; it is copied. fixed: further inputs of the graph. A stepper's logits are overwritten by its
    next step.
    """

    def __init__(self, session: StateSession, state: OnnxState, **fixed: Any) -> None:
        self.session = session.session
        batch, vocab = state.batch, session.logits_width
        self.mask, self.given = state.mask, {"input_ids": np.zeros((batch, 1), np.int64), "keep": np.ones(1, np.int64)}
        if "position_ids" in session.inputs:
            self.given["position_ids"] = np.zeros((batch, 1), np.int64)
        self.given = {name: value for name, value in self.given.items() if name in session.inputs}
        self.seen = state.mask.sum(1, keepdims=True)
        self.logits = np.empty((batch, 1, vocab), np.float32)
        self.grown, steady = dict[str, np.ndarray](), dict[str, np.ndarray]()
        for name, value in state.numpy().items():
            grows = any(isinstance(dim, str) and dim != "batch" for dim in session.inputs[name].shape)
            (self.grown if grows else steady)[name] = value
        self.most = {name: session.window_of(name) for name in self.grown}
        # Kept, as a binding holds addresses alone.
        self._sets = (steady, {name: np.empty_like(value) for name, value in steady.items()})
        self._fixed, self._turn = {**fixed, **session.adapter}, 0
        self._bindings = [self._bind(self._sets[i], self._sets[1 - i]) for i in (0, 1)]

    def __call__(self, tokens_B1: np.ndarray) -> np.ndarray:
        """Read one token of each row, all of which count."""
        binding = self._bindings[self._turn]
        self._turn = 1 - self._turn
        self.given["input_ids"][:] = tokens_B1
        if "position_ids" in self.given:
            self.given["position_ids"][:] = self.seen
        self.seen = self.seen + 1
        self.mask = np.concatenate([self.mask, np.ones_like(tokens_B1, np.int64)], axis=1)
        _bind(binding.bind_input, "attention_mask", self.mask)
        made = {}
        for name, past in self.grown.items():
            _bind(binding.bind_input, name, past)
            length = min(past.shape[2] + 1, self.most[name])
            made[name] = np.empty((*past.shape[:2], length, past.shape[3]), np.float32)
            _bind(binding.bind_output, NEW + name[len(PAST) :], made[name])
        self.session.run_with_iobinding(binding)
        self.grown = made
        return self.logits[:, 0]

    def _bind(self, before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> Any:
        binding = self.session.io_binding()
        for name, value in {**self.given, **before}.items():
            _bind(binding.bind_input, name, value)
        for name, value in self._fixed.items():
            binding.bind_ortvalue_input(name, value)
        _bind(binding.bind_output, "logits", self.logits)
        for name, value in after.items():
            _bind(binding.bind_output, NEW + name[len(PAST) :], value)
        return binding


def _bind(bind: Any, name: str, value: np.ndarray) -> None:
    bind(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
