"""Random sequences of apply, switch, merge, unmerge, quantize, remove, save and load: after each the logits are those
of a float64 model whose weights are W + Σ weight · ΔW, computed here from the tensors alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from neural_layers.functional import dequantize_4bit, quantize_4bit
from neural_layers.linear_4bit import Linear4bit
from neural_layers.wrappers.lora import (
    LoRAConfig,
    apply_lora,
    fold_lora,
    load_adapter,
    merge_lora,
    remove_adapter,
    save_adapter,
    set_adapter,
    unmerge_lora,
)
from neural_layers.wrappers.quantization import quantize
from tests.wrappers.lora.samples import hybrid, shake, tokens

TARGETS = ("re:.*_proj", "conv1d", "embed_tokens", "lm_head")
CONFIGS = {
    "plain": LoRAConfig(r=2, alpha=3, target_modules=TARGETS),
    "stable": LoRAConfig(r=3, alpha=2, target_modules="all-linear", use_rslora=True, rank_pattern={"x_proj": 1}),
    "dora": LoRAConfig(r=1, alpha=1, target_modules=TARGETS, use_dora=True, layers=None),
    "last": LoRAConfig(r=2, alpha=4, target_modules="re:.*_proj", layers=(1, 2), alpha_pattern={"in_proj": 1}),
}
OPERATIONS = ("apply", "switch", "merge", "unmerge", "quantize", "remove", "move", "fold")


def nf4(weight):
    """What NF4 keeps of a weight."""
    return dequantize_4bit(quantize_4bit(weight.float(), "nf4")).double()


class Expected:
    """The weights that the model should compute with: W by name, adapters' tensors by name, which are in use."""

    def __init__(self, model) -> None:
        self.plain = model
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.quantized: set[str] = set()
        self.adapters: dict[str, dict] = {}
        self.use: dict[str, float] = {}
        self.merged: dict | None = None

    def change(self, name, weight):
        """Σ weight · ΔW of one module, by the formulas of the papers."""
        total = torch.zeros_like(weight)
        for adapter, factor in self.use.items():
            if name not in self.adapters[adapter]:
                continue
            a, b, magnitude, scale = self.adapters[adapter][name]
            delta = scale * (b.flatten(1) @ a.flatten(1))
            is_table = name.endswith("embed_tokens")
            delta = delta.t() if is_table else delta.view(weight.shape)
            if magnitude is not None:
                new = weight + delta
                rows = new if is_table else new.flatten(1).t()
                ratio = magnitude.flatten() / rows.square().sum(0).sqrt()
                ratio = ratio if is_table else ratio.view(-1, *[1] * (weight.ndim - 1))
                delta = ratio * new - weight
            total = total + factor * delta
        return total

    def current(self):
        if self.merged is not None:
            return self.merged
        return {
            key: weight + self.change(key.removesuffix(".weight"), weight) if key.endswith(".weight") else weight
            for key, weight in self.weights.items()
        }

    def logits(self, ids):
        return functional_call(self.plain, self.current(), (ids,)).logits


def tensors_of(model, adapter):
    """(A, B, magnitude, scale) of each module, copied out of the model."""
    found = {}
    for name, module in model.named_modules():
        own = getattr(module, "adapters", {})
        if adapter in own:
            one = own[adapter]
            r, alpha = one.settings.r, one.settings.alpha
            scale = alpha / (r**0.5 if adapter == "stable" else r)
            magnitude = None if one.magnitude is None else one.magnitude.detach().clone()
            found[name] = (one.lora_A.detach().clone(), one.lora_B.detach().clone(), magnitude, scale)
    return found


class Driver:
    """A model under test and what is expected of it; each operation is made on both, or refused on both."""

    def __init__(self, folder) -> None:
        base = hybrid(hidden_size=64, mamba2_head_dim=16)
        self.model, self.expected, self.folder = copy.deepcopy(base), Expected(base), folder

    def run(self, operation, choice) -> None:
        getattr(self, operation)(choice)

    def allowed(self, condition, call) -> bool:
        """Make the call, which must be refused unless the condition holds."""
        if condition:
            call()
            return True
        with pytest.raises(ValueError, match=r"\w"):
            call()
        return False

    def apply(self, choice) -> None:
        name, own = sorted(CONFIGS)[choice % len(CONFIGS)], self.expected
        free = own.merged is None and name not in own.adapters
        if self.allowed(free, lambda: apply_lora(self.model, CONFIGS[name], name)):
            shake(self.model, name, scale=0.05, seed=choice)
            own.adapters[name] = tensors_of(self.model, name)
            own.use = {name: 1.0}

    def switch(self, choice) -> None:
        own = self.expected
        use = {name: 0.5 * (choice + i % 3) - 1 for i, name in enumerate(own.adapters) if (choice >> i) % 2}
        known = {**use, "unknown": 1.0} if choice == 7 else use
        if self.allowed(own.adapters and own.merged is None and known == use, lambda: set_adapter(self.model, known)):
            own.use = use

    def merge(self, choice) -> None:
        own = self.expected
        in_use = any(name in own.adapters for name in own.use)
        if self.allowed(own.adapters and in_use and own.merged is None, lambda: merge_lora(self.model)):
            own.merged = self.rounded()

    def rounded(self):
        own, changed = self.expected, self.expected.current()
        touched = {f"{name}.weight" for adapter in own.use for name in own.adapters[adapter]}
        return {key: nf4(w) if key in touched & own.quantized else w for key, w in changed.items()}

    def unmerge(self, choice) -> None:
        if self.allowed(self.expected.merged is not None, lambda: unmerge_lora(self.model)):
            self.expected.merged = None

    def fold(self, choice) -> None:
        own = self.expected
        ready = own.adapters and (own.merged is not None or any(name in own.adapters for name in own.use))
        if choice < 6:
            return  # it ends what the other operations go on with
        if self.allowed(ready, lambda: fold_lora(self.model)):
            own.weights = self.rounded() if own.merged is None else own.merged
            own.merged, own.adapters, own.use = None, {}, {}

    def quantize(self, choice) -> None:
        own = self.expected
        if own.merged is not None:
            return
        if self.allowed(not own.quantized, lambda: quantize(self.model, "nf4", embeddings=choice % 2 == 0)):
            names = [name for name, m in self.model.named_modules() if isinstance(m, Linear4bit)]
            names += [name for name, m in self.model.named_modules() if type(m).__name__ == "Embedding4bit"]
            own.quantized = {f"{name.removesuffix('.base_layer')}.weight" for name in names}
            own.weights = {key: nf4(w) if key in own.quantized else w for key, w in own.weights.items()}

    def remove(self, choice) -> None:
        own = self.expected
        name = sorted(CONFIGS)[choice % len(CONFIGS)]
        if self.allowed(name in own.adapters and own.merged is None, lambda: remove_adapter(self.model, name)):
            del own.adapters[name]
            own.use.pop(name, None)

    def move(self, choice) -> None:
        """Through PEFT's files, and back as the one in use."""
        own = self.expected
        name = sorted(CONFIGS)[choice % len(CONFIGS)]
        folder = self.folder / name
        if not self.allowed(name in own.adapters, lambda: save_adapter(self.model, folder, name)):
            return
        if self.allowed(own.merged is None, lambda: remove_adapter(self.model, name)):
            load_adapter(self.model, folder, name)
            own.adapters[name] = own.adapters.pop(name)
            own.use = {name: 1.0}


@settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 7)), min_size=3, max_size=9))
def test_any_sequence_computes_with_the_weights_that_it_should(tmp_path_factory, steps) -> None:
    driver, ids = Driver(tmp_path_factory.mktemp("adapters")), tokens(2, 5)
    for operation, choice in [("apply", len(steps)), *steps]:
        driver.run(operation, choice)
        with torch.no_grad():
            logits, expected = driver.model(ids).logits, driver.expected.logits(ids)
        error = ((logits - expected).norm() / expected.norm()).item()
        assert error < 1e-6, (operation, choice)
