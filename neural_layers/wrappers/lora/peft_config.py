"""The text beside an adapter's tensors: PEFT's adapter_config.json, written and read.

PEFT matches names by regular expressions: `target_modules` by the last parts of a name, or, where it is one string, by
all of it; the keys of `rank_pattern` and `alpha_pattern` by its end.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from neural_layers.errors import InputError
from neural_layers.wrappers.lora.adapter import Settings

# What would make PEFT compute something else than ΔW = s·B·A or DoRA. The values are those that leave it alone.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    "megatron_config": (None,),
    # The others change the weights of the base, or quantize them.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


# What PEFT writes beside these, and what does not change what a loaded adapter computes.
_OTHERS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
    "runtime_config",
}


def write_config(model: nn.Module, layers: Mapping[str, Settings]) -> dict[str, Any]:
    """The content of adapter_config.json for the adapters of these modules.

    Raises InputError where the adapters differ in what the file says only once.
    """
    every = list(layers.values())
    for field in ("dropout", "use_rslora", "use_dora"):
        values = sorted({getattr(settings, field) for settings in every})
        if len(values) > 1:
            raise InputError(f"the layers' adapters differ in {field} ({values}), which PEFT's file says once for all")
    r = Counter(settings.r for settings in every).most_common(1)[0][0]
    alpha = Counter(settings.alpha for settings in every).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _short(alpha),
        "lora_dropout": every[0].dropout,
        # Whole names: short ones would also match what `layers`, a glob or a later change of the model left out.
        "target_modules": list(layers),
        "rank_pattern": {_exactly(name): own.r for name, own in layers.items() if own.r != r},
        "alpha_pattern": {_exactly(name): _short(own.alpha) for name, own in layers.items() if own.alpha != alpha},
        "use_rslora": every[0].use_rslora,
        "use_dora": every[0].use_dora,
        "layers_to_transform": None,
        "layers_pattern": None,
        **{name: values[0] for name, values in _PLAIN.items()},
    }


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"


def _short(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def read_settings(config: Mapping[str, Any], name: str) -> Settings:
    """What a file's adapter of the module `name` is. Raises InputError for values that cannot be."""
    r = _of(config, "rank_pattern", name, config.get("r"))
    alpha = _of(config, "alpha_pattern", name, config.get("lora_alpha"))
    dropout = config.get("lora_dropout") or 0.0
    if not _is_number(r, 1) or not isinstance(r, int) or not _is_number(alpha):
        raise InputError(f"adapter_config.json gives {name} r={r!r} and lora_alpha={alpha!r}; expected numbers")
    if not _is_number(dropout, 0) or dropout >= 1:
        raise InputError(f"adapter_config.json has lora_dropout={dropout!r}; expected a number in [0, 1)")
    use_rslora, use_dora = bool(config.get("use_rslora")), bool(config.get("use_dora"))
    return Settings(r=r, alpha=alpha, dropout=float(dropout), use_rslora=use_rslora, use_dora=use_dora)


def _is_number(value: Any, least: float = -math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= least


def _of(config: Mapping[str, Any], field: str, name: str, default: Any) -> Any:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"adapter_config.json has {field}={patterns!r}; expected names with numbers")
    try:
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)
    except re.error as error:
        raise InputError(
            f"adapter_config.json has {field}={patterns!r}, with no regular expression: {error}"
        ) from error


def check_config(config: Any) -> dict[str, Any]:
    """The content of an adapter_config.json. Raises InputError where it is no LoRA, or one with parts of PEFT's that
    are not a change of one weight by B·A."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise InputError(f"adapter_config.json has peft_type={kind!r}; expected 'LORA'")
    for field, values in _PLAIN.items():
        if field in config and config[field] not in values:
            raise InputError(
                f"adapter_config.json has {field}={config[field]!r}, which is not supported; merge the adapter with "
                "PEFT, or train one without it"
            )
    for field, value in config.items():
        # Of a newer PEFT, perhaps: what it would change is not known. Off is what every option of it is by default.
        if field not in _PLAIN and field not in _OTHERS and value not in (None, False, [], {}):
            raise InputError(
                f"adapter_config.json has {field}={value!r}, which is not known here; merge the adapter with PEFT, or "
                "take the field out if it changes nothing of what the adapter computes"
            )
    return config
