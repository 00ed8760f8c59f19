"""Exporting a model to a folder that is enough to serve it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neural_layers.errors import InputError, require
from neural_layers.models.export.adapters import exportable
from neural_layers.models.export.blocks import BITS
from neural_layers.models.export.calibration import decoder_feed, token_batches
from neural_layers.models.export.folder import staged, travel_along, write_model
from neural_layers.models.export.integer import SCHEMES, int8_reference, quantize_graph
from neural_layers.models.export.reference import ALIKE, ROUNDED, Tolerance, quantized_layers, reference, tolerance
from neural_layers.models.export.session import StateSession, open_session
from neural_layers.models.export.verify import Check, verify_hybrid

# What the runtime checks against config.json.
_SIGNATURE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")


def export_onnx(
    model: Any,
    path: str | Path,
    *,
    quantize: str | None = None,
    calibration: Iterable[Any] | None = None,
    lora: str = "merged",
    verify: bool = True,
    tokenizer: Any = None,
    external_data: bool | None = None,
    tell: Callable[[Check], None] = lambda check: None,
) -> list[Check]:
    """Write a model as ONNX (opset 23) into a folder that `OnnxModel` serves.

    model:    a `HybridForCausalLM`: `model.onnx`, one graph that reads a prompt, continues and decodes; or a
              `CVMForConditionalGeneration`: `encoder.onnx` and `decoder.onnx`. Computed in float32 whatever its dtype.
    path:     the folder, made where it is not there. It also gets config.json, generation_config.json and the
              tokenizer's files.
              Layers that are quantized (`neural_layers.wrappers.quantization`) go into the graph as their bits are,
              see `products.py` and `tables.py`.
    quantize: None; "int8" or "int4" for weights of a float model in blocks of at most 64 that share a scale
              (`MatMulNBits` and `GatherBlockQuantized` of ONNX Runtime); "int8_dynamic" or "int8_static" for
              products of integers, see `integer.py`
    calibration: for int8_static, batches as `quantize` takes them: tensors of token ids (batch, length), or dicts or
              tuples of the arguments of the model's forward; of a translator, with the targets
    lora:     of a model with adapters, "merged" for a copy with those in use in its weights, or "inputs" for a graph
              that has them as inputs: `OnnxModel(path, adapter=…)` feeds another of the same layers and ranks
    verify:   compare logits and every state with the model at lengths 1, 2, 63, 64, 65, 128 and past each window,
              with and without a state before, for one row and for three with padding on the left. Quantized graphs are
              compared with a copy of the model that rounds in the same way (`reference.py`).
    tokenizer: one of transformers' (or its folder); by default the files beside the weights that the model came from
    external_data: weights in a file of their own; by default those of more than 2 GB
    tell:     is called with each `Check` as it is made

    Files are written to a temporary folder inside `path`, verified there, and moved: what stood there stays
    until then. Returns what was checked.
    Raises VerificationError for a graph that differs, and then leaves nothing; InputError for a model or part that
    cannot be exported and for an unknown `quantize`; ImportError without the extra `onnx`.
    """
    require("onnx", "onnxruntime", extra="onnx")
    if quantize not in (None, *BITS, *SCHEMES):
        raise InputError(f"quantize={quantize!r} must be None, {', '.join(map(repr, (*BITS, *SCHEMES)))}")
    if (calibration is not None) != (quantize == "int8_static"):
        need = (
            "needs calibration, batches of token ids" if calibration is None else "takes no calibration; leave it out"
        )
        raise InputError(f"quantize={quantize!r} {need}")
    done = next(quantized_layers(model), None)
    if quantize is not None and done is not None:
        raise InputError(
            f"quantize={quantize!r} is for a float model, and {done[0]} is a {type(done[1]).__name__}; leave quantize "
            "out to export the layers as they are"
        )
    kind = type(model).__name__
    writers = {"HybridForCausalLM": _write_hybrid, "CVMForConditionalGeneration": _write_cvm}
    if kind not in writers:
        raise InputError(f"{kind} cannot be exported; exported are {' and '.join(writers)}")
    batches = token_batches(model, calibration) if calibration is not None else []
    plan = _Plan(quantize, verify, external_data, tell, batches)
    model = exportable(model, lora)
    was_training = model.training
    model.eval()
    try:
        with staged(Path(path)) as stage:
            checks = writers[kind](model, stage, plan)
            travel_along(model, stage, tokenizer)
    finally:
        model.train(was_training)
    return checks


@dataclass(frozen=True)
class _Plan:
    """How a model is to be written. batches: of the calibration data, where the scheme asks for it."""

    quantize: str | None
    verify: bool
    external: bool | None
    tell: Callable[[Check], None]
    batches: list[dict[str, np.ndarray]]

    def expected(self, model: Any, *protos: Any) -> tuple[Any, Tolerance]:
        """What the graphs are to equal, and how nearly."""
        if self.quantize in SCHEMES:
            return int8_reference(model, protos), ALIKE if self.quantize == "int8_static" else ROUNDED
        return reference(model, self.quantize), tolerance(model, self.quantize)


def describe(model: Any, kind: str, quantize: str | None) -> dict[str, Any]:
    """What is kept in the graph for the runtime."""
    signature = {name: getattr(model.config, name) for name in _SIGNATURE}
    context = model.config.max_position_embeddings
    return {"kind": kind, "quantize": quantize, "context": context, "config": signature}


def _write_hybrid(model: Any, stage: Path, plan: _Plan) -> list[Check]:
    from neural_layers.models.export.hybrid import hybrid_graph

    proto, tensors = hybrid_graph(model, plan.quantize)
    if plan.quantize in SCHEMES:
        feeds = [decoder_feed(proto, ids=b["input_ids"], mask=b["attention_mask"]) for b in plan.batches]
        proto = quantize_graph(proto, plan.quantize, feeds)
    write_model(proto, stage / "model.onnx", describe(model, "causal_lm", plan.quantize), external=plan.external)
    if not plan.verify:
        return []
    session = StateSession(open_session(stage / "model.onnx"))
    return verify_hybrid(*plan.expected(model, proto), session, tensors, plan.tell)


def _write_cvm(model: Any, stage: Path, plan: _Plan) -> list[Check]:
    from neural_layers.models.export.cvm import cvm_feeds, cvm_graphs, verify_cvm

    protos = cvm_graphs(model, plan.quantize)
    if plan.quantize in SCHEMES:
        feeds = cvm_feeds(*protos, plan.batches)
        protos = quantize_graph(protos[0], plan.quantize, feeds[0]), quantize_graph(protos[1], plan.quantize, feeds[1])
    described = describe(model, "translator", plan.quantize)
    write_model(protos[0], stage / "encoder.onnx", described, external=plan.external)
    write_model(protos[1], stage / "decoder.onnx", described, external=plan.external)
    if not plan.verify:
        return []
    sessions = open_session(stage / "encoder.onnx"), StateSession(open_session(stage / "decoder.onnx"))
    return verify_cvm(*plan.expected(model, *protos), *sessions, plan.tell)
