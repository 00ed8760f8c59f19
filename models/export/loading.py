"""The model of a folder that is to be exported."""

from pathlib import Path
from typing import Any

from neural_layers.errors import InputError, require
from neural_layers.models.loading import check_weights, model_type

TASKS = {"causal-lm": "neural_hybrid", "translation": "cvm"}


def load_exportable(folder: Path, task: str = "auto") -> Any:
    """The `HybridForCausalLM` or `CVMForConditionalGeneration` saved in a folder, in evaluation mode.

    task: "causal-lm", "translation", or "auto" for what config.json says.
    Raises InputError for a folder without config.json or safetensors, a model that cannot be exported or is of another
    task, and weights that cannot be read or do not fit; ImportError without transformers.
    """
    kind = model_type(folder)
    if kind not in TASKS.values():
        raise InputError(
            f"{folder} holds a model of type {kind!r}, which cannot be exported; exported are "
            f"{' and '.join(map(repr, TASKS.values()))} (neural-layers convert makes one of other checkpoints)"
        )
    if task != "auto" and TASKS[task] != kind:
        raise InputError(f"{folder} holds a model of type {kind!r}, and --task {task} needs {TASKS[task]!r}")
    check_weights(folder)
    return _load(folder, kind)


def _load(folder: Path, kind: str) -> Any:
    require("transformers", extra="models")
    loader: Any
    if kind == "cvm":
        from neural_layers.models.cvm import CVMForConditionalGeneration as loader
    else:
        from neural_layers.models.hybrid import HybridForCausalLM as loader
    try:
        model, info = loader.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    # What a broken file raises differs from library to library; whatever it is, the folder cannot be used.
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"the model in {folder} cannot be read: {first}") from error
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise InputError(f"the weights in {folder} do not fit its config.json: {wrong[0]} is missing or unknown")
    return model.eval()
