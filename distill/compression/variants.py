"""The names of compressed forms, and which of them there are for which models."""

from collections.abc import Sequence

from neural_layers.errors import InputError, require

DESCRIPTIONS = {
    "bf16": "every weight in bfloat16",
    "int8": "linear layers and embeddings in 8 bits",
    "int4": "linear layers and embeddings in 4 bits (affine, groups of 64)",
    "nf4": "linear layers and embeddings in 4 bits (NF4, blocks of 64)",
    "onnx": "a float32 graph, run by ONNX Runtime",
    "onnx-int8": "a graph with weights in 8 bits, run by ONNX Runtime",
    "onnx-int4": "a graph with weights in 4 bits, run by ONNX Runtime",
}
# What `export_onnx` calls the weights of a graph.
ONNX_WEIGHTS: dict[str, str | None] = {"onnx": None, "onnx-int8": "int8", "onnx-int4": "int4"}
# What `quantize` calls the weights of a form in torch.
SCHEMES = {"int8": "int8_dynamic", "int4": "int4", "nf4": "nf4"}
OFFERED = {"translation": tuple(DESCRIPTIONS), "classification": ("bf16", *SCHEMES)}


def check_variants(variants: str | Sequence[str], kind: str) -> list[str]:
    """The variants of `--compress`, each of which exists for this kind of model.

    variants: names, or one text with commas between them. kind: "translation" or "classification".
    Raises InputError for a name that there is not or not for this kind, for one that is given twice, and for none;
    ImportError where a graph is wanted without the extra `onnx`; ValueError for an unknown kind. Called before a run
    begins, it keeps a wrong name from being found at its end.
    """
    if kind not in OFFERED:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(OFFERED)}")
    names = [name.strip() for name in variants.split(",")] if isinstance(variants, str) else list(variants)
    offered = OFFERED[kind]
    there_are = f"there are {', '.join(offered)}"
    for i, name in enumerate(names):
        if name in ONNX_WEIGHTS and name not in offered:
            raise InputError(f"there is no {name} for {kind}: classifiers are not exported to ONNX yet; {there_are}")
        if name not in offered:
            raise InputError(f"there is no compressed form {name!r} for {kind}; {there_are}")
        if name in names[:i]:
            raise InputError(f"the compressed form {name} is given twice; give it once")
    if not names:
        raise InputError(f"no compressed form is given; {there_are}")
    if any(name in ONNX_WEIGHTS for name in names):
        require("onnx", "onnxruntime", extra="onnx")
    return names
