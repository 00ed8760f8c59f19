"""Running an exported graph: numpy in and out, the state kept where ONNX Runtime left it.

This file, like all that an exported folder is served with, needs numpy and onnxruntime and neither torch nor
transformers.
"""

import contextlib
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from neural_layers.errors import InputError, require
from neural_layers.models.export.folder import read_json
from neural_layers.models.export.pages import large_pages

PAST, NEW = "past.", "new."
WINDOW = "past_of_"  # before the window, the name of a dimension that grows to the window less one


def open_session(path: Path, threads: int | None = None) -> Any:
    """An `InferenceSession` on the CPU.

    threads: of one operator; by default as many as there are cores. Raises InputError for a file that is missing or is
    no model.
    """
    require("onnxruntime", extra="onnx")
    import onnxruntime

    if not path.is_file():
        raise InputError(f"there is no {path.name} in {path.parent}; export a model there: neural-layers export")
    if threads is not None and threads < 1:
        raise InputError(f"threads={threads} must be at least 1; leave it out for all cores")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    # ONNX Runtime would keep a plan of its memory for every length that it meets: 20 MB after 3,000 tokens of four
    # layers, and nothing gained.
    options.enable_mem_pattern = False
    if _sums_saturate():
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        with large_pages():
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(f"{path} is not a model that ONNX Runtime {onnxruntime.__version__} reads: {error}") from error


def _sums_saturate(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether sums of two products of 8 bits are cut at 16: on x86 without VNNI, where ONNX Runtime multiplies weights
    of int8 wrongly, though fast, unless it is told to be exact. Where nobody can tell, exact."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    with contextlib.suppress(OSError):
        return "vnni" not in Path(cpuinfo).read_text()
    return True


def adapter_inputs(sessions: Sequence[Any], folder: str | Path | None) -> list[dict[str, Any]]:
    """Of the adapter in a folder of PEFT's files what each session takes of it; nothing where there is no folder.

    Raises InputError for an adapter that does not fit what was exported.
    """
    own = [{given.name: given.shape for given in session.get_overridable_initializers()} for session in sessions]
    if folder is None:
        return [{} for _ in sessions]
    import onnxruntime

    from neural_layers.models.export.adapters import read_inputs

    found = read_inputs(folder, {name: shape for inputs in own for name, shape in inputs.items()})
    made = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in found.items()}
    return [{name: made[name] for name in inputs} for inputs in own]


def metadata(session: Any, path: Path) -> dict[str, Any]:
    """What the export wrote into the graph; raises InputError for a graph that is not ours."""
    found = session.get_modelmeta().custom_metadata_map.get("neural_layers")
    if found is None:
        raise InputError(f"{path} was not written by neural-layers export; export the model again")
    made: dict[str, Any] = json.loads(found)
    return made


def check_config(described: dict[str, Any], folder: Path) -> None:
    """Raise InputError where config.json belongs to another model than the graph."""
    config = read_json(folder / "config.json")
    for name, value in described["config"].items():
        if config.get(name) != value:
            raise InputError(
                f"{folder / 'config.json'} says {name}={config.get(name)}, and the graph was exported with "
                f"{name}={value}; take both from the same export"
            )


@dataclass(frozen=True)
class OnnxState:
    """What a model remembers of the tokens read so far.

    mask: (B, P), 1 for each that counts. tensors: those of ONNX Runtime, by the names of the graph's inputs.
    """

    mask: np.ndarray
    tensors: dict[str, Any]

    @property
    def batch(self) -> int:
        return int(self.mask.shape[0])

    def __len__(self) -> int:
        return int(self.mask.shape[1])

    def numpy(self) -> dict[str, np.ndarray]:
        """Copies of the tensors."""
        return {name: np.array(value.numpy()) for name, value in self.tensors.items()}


class StateSession:
    """A graph with a state: reads tokens, returns logits and the state after them.

    adapter: tensors of ONNX Runtime in place of the graph's own adapter, by the names of its inputs.
    """

    def __init__(self, session: Any, adapter: Mapping[str, Any] | None = None) -> None:
        import onnxruntime

        self.session, self.adapter = session, dict(adapter or {})
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self.inputs = {given.name: given for given in session.get_inputs()}
        self.outputs = [made.name for made in session.get_outputs()]
        self.logits_width = int(session.get_outputs()[self.outputs.index("logits")].shape[-1])

    def window_of(self, name: str) -> int:
        """How many keys a growing tensor keeps at most."""
        kept = [dim for dim in self.inputs[name].shape if isinstance(dim, str) and dim.startswith(WINDOW)]
        return int(kept[0][len(WINDOW) :]) - 1 if kept else sys.maxsize

    def start(self, batch: int) -> OnnxState:
        """The state before the first token: recurrent states of zeros, no keys and values."""
        tensors = {}
        for name, given in self.inputs.items():
            if name.startswith(PAST):
                shape = [batch if dim == "batch" else 0 if isinstance(dim, str) else dim for dim in given.shape]
                tensors[name] = self._value(np.zeros(shape, np.float32))
        return OnnxState(np.zeros((batch, 0), np.int64), tensors)

    def check(self, state: OnnxState, batch: int) -> None:
        """Raise InputError for a state of another model or of another number of rows."""
        if state.batch != batch:
            raise InputError(f"the state is of {state.batch} rows, and input_ids has {batch}; give one row for each")
        for name, given in self.inputs.items():
            if name.startswith(PAST):
                found = state.tensors[name].shape() if name in state.tensors else None
                wanted = [batch if dim == "batch" else dim for dim in given.shape]
                fixed = [i for i, dim in enumerate(wanted) if not isinstance(dim, str)]
                if found is None or any(found[i] != wanted[i] for i in fixed):
                    raise InputError(f"the state is of another model: its {name} is {found}, not {wanted}")

    def run(
        self, ids: np.ndarray, kept: np.ndarray, state: OnnxState, keep: int, **fixed: Any
    ) -> tuple[np.ndarray, OnnxState]:
        """Read ids (B, T), of which those with kept (B, T) 1 count; logits (B, keep, V) and the new state.

        fixed: further inputs of the graph, as tensors of ONNX Runtime.
        """
        mask = np.concatenate([state.mask, kept], axis=1)
        given = {"input_ids": ids, "attention_mask": mask, "keep": np.array([keep])}
        if "position_ids" in self.inputs:
            given["position_ids"] = (mask.cumsum(1) - 1).clip(min=0)[:, -ids.shape[1] :]
        feed = {
            name: self._value(np.ascontiguousarray(x, np.int64)) for name, x in given.items() if name in self.inputs
        }
        made = self.session.run_with_ort_values(self.outputs, {**feed, **state.tensors, **fixed, **self.adapter})
        tensors = {PAST + name[len(NEW) :]: value for name, value in zip(self.outputs, made, strict=True)}
        logits: np.ndarray = made[self.outputs.index("logits")].numpy()
        del tensors[PAST + "logits"[len(NEW) :]]
        return logits, replace(state, mask=mask, tensors=tensors)


class Encoder:
    """Runs an encoder's graph: sources in, the decoder's further inputs out."""

    def __init__(self, session: Any, adapter: Mapping[str, Any] | None = None) -> None:
        import onnxruntime

        self.session, self.adapter = session, dict(adapter or {})
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self.outputs = [made.name for made in session.get_outputs()]

    def run(self, ids_BS: np.ndarray, mask_BS: np.ndarray) -> dict[str, Any]:
        """Keys and values of the source for each layer of the decoder, and its mask."""
        feed = {"input_ids": self._value(ids_BS), "attention_mask": self._value(mask_BS)}
        made = self.session.run_with_ort_values(self.outputs, {**feed, **self.adapter})
        return {**dict(zip(self.outputs, made, strict=True)), "context_mask": feed["attention_mask"]}
