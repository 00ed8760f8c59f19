"""Which layers a model keeps in which format: written down, read off a model, and followed again."""

import json
from dataclasses import dataclass
from typing import Any

from torch import nn

from neural_layers.wrappers.quantization.formats import Format, format_of, shared_with

_SETTINGS = {"scheme", "block_size", "double_quant"}
_SHARES = "shares"


@dataclass(frozen=True)
class Plan:
    """The quantized layers of a model by their names.

    layers: {"model.layers.0.mixer.inner.q_proj": {"scheme": "nf4", "block_size": 64, "double_quant": False}, …}. A
            layer whose weight is that of another, as a tied head's is, names it: "shares": "model.embed_tokens". A
            module that stands in several places is there under its first name.

    `quantize(model, plan)` follows it. Raises ValueError for entries that are no formats.
    """

    layers: dict[str, dict[str, Any]]

    def __post_init__(self) -> None:
        if not isinstance(self.layers, dict):
            raise ValueError(f"layers is a {type(self.layers).__name__}; expected a dict of layer names to formats")
        for name, entry in self.layers.items():
            if not isinstance(entry, dict) or "scheme" not in entry:
                raise ValueError(f"layer {name!r}: {entry!r} is no format; expected a dict with a 'scheme'")
            unknown = entry.keys() - _SETTINGS - {_SHARES}
            if unknown:
                raise ValueError(f"layer {name!r}: {sorted(unknown)[0]!r} is no setting; there are {sorted(_SETTINGS)}")
            owner = entry.get(_SHARES)
            if owner is not None and (owner == name or owner not in list(self.layers)):
                raise ValueError(f"layer {name!r} shares the weight of {owner!r}, which is no other layer of the plan")
            try:
                self.format(name)
            except ValueError as problem:
                raise ValueError(f"layer {name!r}: {problem}") from problem

    def format(self, name: str) -> Format:
        """The format of a layer."""
        return Format(**{key: value for key, value in self.layers[name].items() if key != _SHARES})

    def shares(self, name: str) -> str | None:
        """The layer whose weight is also that of the layer `name`."""
        return self.layers[name].get(_SHARES)

    @classmethod
    def of(cls, model: nn.Module) -> "Plan":
        """The plan that a model follows, {} for one of plain layers."""
        quantized = {name: module for name, module in model.named_modules() if format_of(module) is not None}
        names = {id(module): name for name, module in quantized.items()}
        layers = {}
        for name, module in quantized.items():
            own, other = format_of(module), shared_with(module)
            assert own is not None
            layers[name] = own.entry()
            if other is not None and id(other) in names:
                layers[name][_SHARES] = names[id(other)]
        return cls(layers)

    def to_json(self) -> str:
        """The plan as a JSON text, which `from_json` reads."""
        return json.dumps({"layers": self.layers}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan of a JSON text. Raises ValueError for a text that is none."""
        try:
            content = json.loads(text)
        except ValueError as problem:
            raise ValueError(f"the plan is not JSON: {problem}") from problem
        if not isinstance(content, dict) or "layers" not in content:
            raise ValueError("the plan has no 'layers'; expected what Plan.to_json wrote")
        return cls(content["layers"])
