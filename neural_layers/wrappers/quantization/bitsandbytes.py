"""What transformers needs to be told to load 4-bit weights of ours with bitsandbytes."""

from typing import Any

from torch import nn

from neural_layers.linear_4bit import Linear4bit
from neural_layers.wrappers.quantization.plan import Plan


def bitsandbytes_config(model: nn.Module, plan: Plan) -> dict[str, Any]:
    """The `quantization_config` of config.json for transformers with bitsandbytes.

    The weights themselves are saved in bitsandbytes' keys and bits in any case. transformers makes 4-bit layers of
    plain `nn.Linear`s alone; models with linear layers of their own class, the hybrid and CVM, load with
    `load_quantized`.

    Raises ValueError for a model that is no transformers model, and for what bitsandbytes has not: other schemes,
    embeddings, and layers of different types.
    """
    if not callable(getattr(model, "save_pretrained", None)):
        raise ValueError(
            f"format='bitsandbytes' is read by transformers; a {type(model).__name__} is no transformers model"
        )
    layers = {name: model.get_submodule(name) for name in plan.layers}
    kinds = set()
    for name, layer in layers.items():
        if not isinstance(layer, Linear4bit):
            scheme = plan.format(name).scheme
            raise ValueError(
                f"{name!r} is a {type(layer).__name__} ({scheme}), which bitsandbytes has not; quantize with 'nf4' or "
                "'fp4', embeddings=False"
            )
        if plan.shares(name) is not None:
            raise ValueError(
                f"{name!r} shares the weight of {plan.shares(name)!r}, which bitsandbytes cannot; exclude both"
            )
        kinds.add((layer.quant_type, layer.nested_absmax is not None))
    if len(kinds) > 1:
        raise ValueError(f"the layers are in {len(kinds)} formats, and bitsandbytes has one for a model; use one")
    quant_type, nested = kinds.pop()
    plain = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": str(getattr(model, "dtype", "float32")).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": plain,
    }
