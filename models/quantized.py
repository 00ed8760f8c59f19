"""transformers' `from_pretrained` for models that `neural_layers.wrappers.quantize` made.

Importing this module registers the quantizer "neural_layers" with transformers, for any of its models; the model
packages of this library import it.
"""

import importlib
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from neural_layers.errors import InputError
from neural_layers.wrappers.modules import replace_module
from neural_layers.wrappers.quantization import saving
from neural_layers.wrappers.quantization.plan import Plan
from neural_layers.wrappers.quantization.quantize import METHOD, record
from neural_layers.wrappers.quantization.restoring import read_json, read_tensors, restored_layers

_OWN_MODELS = {"neural_hybrid": "neural_layers.models.hybrid", "cvm": "neural_layers.models.cvm"}
_AUTO = ("CausalLM", "Seq2SeqLM", "SequenceClassification", "TokenClassification", "MaskedLM", "QuestionAnswering")


@register_quantization_config(METHOD)
class QuantizedConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json; layers: those of a `Plan`."""

    def __init__(self, layers: dict[str, dict[str, Any]], **others: Any) -> None:
        self.quant_method: Any = METHOD
        self.layers = layers


class _Slot(nn.Module):
    """The place of a quantized layer while transformers loads the rest: it must neither draw nor tie nor move its bits.

    weight, bias: without memory, for code that initialises the weights of its children.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight = torch.empty_like(layer.weight, device="meta").detach()
        bias = getattr(layer, "bias", None)
        self.bias = None if bias is None else torch.empty_like(bias, device="meta").detach()


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):
    """Puts the saved bits of quantized layers into a model that transformers loads; the rest transformers loads itself.

    The loaded model is a plain one with quantized layers: `.to(dtype)`, Trainer and adapters take it as any other.
    """

    def __init__(self, quantization_config: QuantizedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "from_pretrained loads what is quantized already; load the float model and call "
                "neural_layers.wrappers.quantize(model, scheme)"
            )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        files = [str(path) for path in checkpoint_files or []]
        if not files or not all(path.endswith(".safetensors") for path in files):
            raise InputError(f"a quantized model is read from safetensors alone; there are {files or 'no files'}")
        try:
            config: Any = self.quantization_config
            saved = Plan(config.layers)
        except ValueError as problem:
            raise InputError(f"the quantization_config in config.json cannot be used: {problem}") from problem
        names = _names_in(model, saved)
        if not names:
            raise InputError(f"none of the saved layers has a place in a {type(model).__name__}; load the saved class")
        plan = Plan(
            {
                names[name]: entry | ({"shares": names[entry["shares"]]} if "shares" in entry else {})
                for name, entry in saved.layers.items()
                if name in names
            }
        )
        tensors = read_tensors(files, saved.layers)
        own = {_renamed(key, names): tensor for key, tensor in tensors.items() if key.rpartition(".")[0]}
        self.made = restored_layers(model, plan, own)
        for name, layer in self.made.items():
            # Biases in the dtype that was asked for; bits have none.
            layer.to(dtype=model.get_submodule(name).weight.dtype)
        self.tied = dict(model.all_tied_weights_keys)
        starts = tuple(f"{name}." for name in _every_name(model, plan))
        inside = {key for key, source in self.tied.items() if key.startswith(starts) or source.startswith(starts)}
        model.all_tied_weights_keys = {key: source for key, source in self.tied.items() if key not in inside}
        ignored = {rf"^{re.escape(key)}$" for key in [*tensors, *own]}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}
        _put(model, {name: _Slot(model.get_submodule(name)) for name in self.made})
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        _put(model, {name: layer.to(device).train(model.training) for name, layer in self.made.items()})
        model.all_tied_weights_keys = self.tied
        # A class attribute again, as before.
        del model._keys_to_ignore_on_load_unexpected
        for module in model.modules():
            if isinstance(module, transformers.PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        # Otherwise transformers would refuse to cast and to train what is a model like any other.
        del model.hf_quantizer, model.quantization_method
        model.is_quantized = False
        self.made = {}
        record(model)
        return model


def _names_in(model: Any, plan: Plan) -> dict[str, str]:
    """The names of the plan's layers in `model`, which may be the base of the saved model, or have a head on it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    if prefix and not any(name in modules for name in plan.layers):
        base = {name: name.removeprefix(prefix) for name in plan.layers if name.startswith(prefix)}
        headed = {name: prefix + name for name in plan.layers}
        for names in (base, headed):
            if names and all(name in modules for name in names.values()):
                return names
    # Where another class is asked for than was saved, the base of a T5 as it may be, a head may have no place in it.
    is_saved = type(model).__name__ in (model.config.architectures or ())
    return {name: name for name in plan.layers if is_saved or name in modules}


def _renamed(key: str, names: dict[str, str]) -> str:
    name = max((name for name in names if key.startswith(f"{name}.")), key=len, default=None)
    return key if name is None else names[name] + key.removeprefix(name)


def _every_name(model: nn.Module, plan: Plan) -> list[str]:
    """All names of the plan's layers: a shared module has several."""
    held = {id(model.get_submodule(name)) for name in plan.layers}
    return [name for name, module in model.named_modules(remove_duplicate=False) if id(module) in held]


def _put(model: nn.Module, new: dict[str, nn.Module]) -> None:
    places = {id(model.get_submodule(name)): module for name, module in new.items()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in places:
            replace_module(model, name, places[id(module)])


def load_transformers(folder: Path, plan: Plan) -> nn.Module:
    """The transformers model in `folder` with the layers of `plan` quantized, in evaluation mode.

    Raises InputError for a folder without a config.json, one of an unknown architecture, and weights that do not fit.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"there is no config.json in {folder}; give load_quantized the float model too")
    content = read_json(folder / "config.json")
    if content.get("model_type") in _OWN_MODELS:
        importlib.import_module(_OWN_MODELS[content["model_type"]])
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as problem:  # whatever it is, the folder cannot be used
        raise InputError(f"{folder / 'config.json'} cannot be used: {' '.join(str(problem).split())}") from problem
    config.quantization_config = {"quant_method": METHOD, "layers": plan.layers}
    model, info = _class_of(config, folder).from_pretrained(
        folder, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise InputError(f"the weights in {folder} do not fit its config.json: {wrong[0]} is missing or unknown")
    return model.eval()


def _class_of(config: Any, folder: Path) -> Any:
    (name,) = (config.architectures or [None])[:1]
    for auto in [f"AutoModelFor{task}" for task in _AUTO] + ["AutoModel"]:
        known = getattr(transformers, auto)._model_mapping.get(type(config), None)
        for kind in known if isinstance(known, (tuple, list)) else [known]:
            if kind is not None and kind.__name__ == name:
                return kind
    kind = getattr(transformers, name or "", None)
    if kind is None:
        raise InputError(
            f"the architecture {name!r} in {folder / 'config.json'} is unknown; give load_quantized the model"
        )
    return kind


saving.loaders[:] = [load_transformers]
