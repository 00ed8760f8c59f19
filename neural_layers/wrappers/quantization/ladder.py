"""The rungs that each layer of a model can be lowered to, what each saves, and models that mix them.

A layer here is a weight: the head that is tied to an embedding goes with it, under the embedding's name.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from neural_layers.wrappers.modules import replace_module, tensor_bytes
from neural_layers.wrappers.quantization.plan import Plan
from neural_layers.wrappers.quantization.trials import quantized_shell, shell, wants_calibration

SHORT: dict[str, dict[str, Any]] = {
    "bf16": {"scheme": "bfloat16"},
    "fp16": {"scheme": "float16"},
    "int8": {"scheme": "int8_dynamic"},
    "nf4-double": {"scheme": "nf4", "double_quant": True},
    "fp4-double": {"scheme": "fp4", "double_quant": True},
}
# Of each layer the rung it stands on; layers that are as they were are not in it.
State = dict[str, str]


class Ladder:
    """Quantized modules of every rung beside a model that stays as it is.

    rungs: names, from above. saved: {layer: {rung: bytes saved}}, only what a layer can take and what makes it smaller.
    """

    def __init__(
        self,
        model: nn.Module,
        rungs: Sequence[str | Mapping[str, Any]],
        calibration: list[Any],
        *,
        exclude: str | Iterable[str] = (),
        embeddings: bool = True,
    ) -> None:
        self.model, self.calibration, self.bytes = model, calibration, tensor_bytes(model)
        left: dict[str, Any] = {"exclude": exclude if isinstance(exclude, str) else tuple(exclude)}
        limits = left | {"embeddings": embeddings}
        self._made: dict[str, nn.Module] = {}
        self._plans: dict[str, Plan] = {}
        for name, options in _checked(rungs).items():
            made = quantized_shell(model, **options, **limits, calibration=calibration)
            self._made[name], self._plans[name] = made, Plan.of(made)
        self.rungs = tuple(self._made)
        self.saved: dict[str, dict[str, int]] = {}
        for rung, plan in self._plans.items():
            for layer in plan.layers:
                saving = self._held(model, layer, rung) - self._held(self._made[rung], layer, rung)
                if plan.shares(layer) is None and saving > 0:
                    self.saved.setdefault(layer, {})[rung] = saving

    @property
    def least(self) -> int:
        """The fewest bytes that the model can have."""
        return self.bytes - sum(max(options.values()) for options in self.saved.values())

    def uniform(self) -> dict[str, nn.Module]:
        """Each rung with the model that stands on it with all layers."""
        return self._made

    def bytes_of(self, state: State) -> int:
        """The bytes of the model with these layers lowered."""
        return self.bytes - sum(self.saved[layer][rung] for layer, rung in state.items())

    def plan(self, state: State) -> Plan:
        """The plan with these layers lowered, in the order of the model's modules."""
        entries = {
            name: self._plans[rung].layers[name] for layer, rung in state.items() for name in self._group(layer, rung)
        }
        return Plan({name: entries[name] for name, _ in self.model.named_modules() if name in entries})

    def build(self, state: State) -> nn.Module:
        """A model with these layers lowered. It shares its tensors with the model and the rungs: only to be read."""
        made = shell(self.model)
        lowered = {name: self._made[rung] for layer, rung in state.items() for name in self._group(layer, rung)}
        firsts = {id(module): name for name, module in made.named_modules()}
        for name, module in list(made.named_modules(remove_duplicate=False)):
            first = firsts.get(id(module))
            if first in lowered:
                replace_module(made, name, lowered[first].get_submodule(first))
        return made

    def options(self, plan: Plan) -> dict[str, Any]:
        """What `quantize(model, plan)` needs beside them."""
        return {"calibration": self.calibration} if wants_calibration(plan) else {}

    def _group(self, layer: str, rung: str) -> list[str]:
        plan = self._plans[rung]
        return [name for name in plan.layers if layer in (name, plan.shares(name))]

    def _held(self, model: nn.Module, layer: str, rung: str) -> int:
        return tensor_bytes(nn.ModuleList(model.get_submodule(name) for name in self._group(layer, rung)))


def rung_options(rung: str | Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `quantize` for a rung."""
    return dict(rung) if isinstance(rung, Mapping) else dict(SHORT.get(rung, {"scheme": rung}))


def _checked(rungs: Sequence[str | Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{name: arguments of quantize}. Raises ValueError for rungs that are none, or not from above."""
    if isinstance(rungs, (str, Mapping)) or not rungs:
        raise ValueError(f"ladder={rungs!r} must be a sequence of at least one rung, such as ('bf16', 'int8', 'nf4')")
    found: dict[str, dict[str, Any]] = {}
    for rung in rungs:
        options = rung_options(rung)
        name = rung if isinstance(rung, str) else " ".join(str(value) for value in options.values())
        if "scheme" not in options:
            raise ValueError(f"the rung {name!r} has no 'scheme'; give the arguments of quantize")
        if options["scheme"] == "int8_qat":
            raise ValueError("int8_qat is no rung: a layer prepared for training is not smaller; take int8")
        if name in found:
            raise ValueError(f"the rung {name!r} is in the ladder twice; name each once")
        found[name] = options
    return found
