"""Exporting a model to a folder that is enough to serve it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from neural_layers.errors import InputError, require
from neural_layers.models.export.blocks import BITS
from neural_layers.models.export.folder import staged, travel_along, write_model
from neural_layers.models.export.reference import quantized_layers, reference, tolerance
from neural_layers.models.export.session import StateSession, open_session
from neural_layers.models.export.verify import Check, verify_hybrid

# What the runtime checks against config.json.
_SIGNATURE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")


def export_onnx(
    model: Any,
    path: str | Path,
    *,
    quantize: str | None = None,
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
    quantize: None for standard operators alone; "int8" or "int4" for weights in blocks of at most 64 that share a scale
              (`MatMulNBits` and `GatherBlockQuantized` of ONNX Runtime)
    verify:   compare logits and every state with the model at lengths 1, 2, 63, 64, 65, 128 and past each window,
              with and without a state before, for one row and for three with padding on the left. Quantized graphs are
              compared with a copy of the model whose weights are rounded in the same way.
    tokenizer: one of transformers' (or its folder); by default the files beside the weights that the model came from
    external_data: weights in a file of their own; by default those of more than 2 GB
    tell:     is called with each `Check` as it is made

    Files are written to a temporary folder inside `path`, verified there, and moved: what stood there stays
    until then. Returns what was checked.
    Raises VerificationError for a graph that differs, and then leaves nothing; InputError for a model or part that
    cannot be exported and for an unknown `quantize`; ImportError without the extra `onnx`.
    """
    require("onnx", "onnxruntime", extra="onnx")
    if quantize is not None and quantize not in BITS:
        raise InputError(f"quantize={quantize!r} must be None, {', '.join(map(repr, BITS))}")
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
    was_training = model.training
    model.eval()
    try:
        with staged(Path(path)) as stage:
            checks = writers[kind](model, stage, quantize, verify, external_data, tell)
            travel_along(model, stage, tokenizer)
    finally:
        model.train(was_training)
    return checks


def describe(model: Any, kind: str, quantize: str | None) -> dict[str, Any]:
    """What is kept in the graph for the runtime."""
    signature = {name: getattr(model.config, name) for name in _SIGNATURE}
    context = model.config.max_position_embeddings
    return {"kind": kind, "quantize": quantize, "context": context, "config": signature}


def _write_hybrid(
    model: Any, stage: Path, quantize: str | None, verify: bool, external: bool | None, tell: Callable[[Check], None]
) -> list[Check]:
    from neural_layers.models.export.hybrid import hybrid_graph

    proto, tensors = hybrid_graph(model, quantize)
    write_model(proto, stage / "model.onnx", describe(model, "causal_lm", quantize), external=external)
    if not verify:
        return []
    session = StateSession(open_session(stage / "model.onnx"))
    return verify_hybrid(reference(model, quantize), session, tensors, tolerance(model, quantize), tell)


def _write_cvm(
    model: Any, stage: Path, quantize: str | None, verify: bool, external: bool | None, tell: Callable[[Check], None]
) -> list[Check]:
    from neural_layers.models.export.cvm import cvm_graphs, verify_cvm

    encoder, decoder = cvm_graphs(model, quantize)
    described = describe(model, "translator", quantize)
    write_model(encoder, stage / "encoder.onnx", described, external=external)
    write_model(decoder, stage / "decoder.onnx", described, external=external)
    if not verify:
        return []
    sessions = open_session(stage / "encoder.onnx"), StateSession(open_session(stage / "decoder.onnx"))
    return verify_cvm(reference(model, quantize), *sessions, tolerance(model, quantize), tell)
