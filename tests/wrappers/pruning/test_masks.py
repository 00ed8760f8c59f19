"""Pruned weights stay zero through training, and the masks come back after saving."""

import copy
import json
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from neural_layers.errors import InputError
from neural_layers.wrappers import prune, quantize
from neural_layers.wrappers.pruning import (
    apply_masks,
    load_masks,
    mask_of,
    masks,
    restore_masks,
    save_masks,
    sparsity,
    unprune,
)

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "muon": lambda p: torch.optim.Muon([w for w in p if w.ndim == 2], lr=0.1),
}


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for i in range(steps):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def pruned_weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([module.weight[~mask_of(module)] for module in model if mask_of(module) is not None])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_stay_zero_where_the_optimizer_has_momentum(name: str) -> None:
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer)  # so that its state would move every weight
    prune(model, "l1", 0.5)
    kept = model[0].weight.detach().clone()
    for _ in range(3):
        train(model, optimizer, steps=1)
        assert (pruned_weights(model) == 0).all()
    assert not torch.equal(model[0].weight, kept)


def test_gradients_are_those_of_the_masked_weight() -> None:
    model, plain = make_model(), make_model()
    prune(model, "random", 0.4)
    x = torch.randn(5, 6, dtype=torch.float64)
    model(x).square().sum().backward()
    weights = [plain[0].weight, plain[2].weight]
    shown = [w * mask_of(m) for w, m in zip(weights, (model[0], model[2]), strict=True)]
    hidden = torch.tanh(x @ shown[0].T + plain[0].bias)
    (hidden @ shown[1].T + plain[2].bias).square().sum().backward()
    for own, expected in zip((model[0], model[2]), weights, strict=True):
        torch.testing.assert_close(own.weight.grad, expected.grad, rtol=1e-12, atol=1e-14)


@given(seed=st.integers(0, 99), amount=st.floats(0.1, 0.8))
def test_saved_and_loaded_weights_are_held_again(seed: int, amount: float) -> None:
    model, fresh = make_model(seed), make_model(seed + 1)
    prune(model, "l1", amount)
    assert sorted(model.state_dict()) == sorted(make_model().state_dict()), "a mask got a name in the checkpoint"
    fresh.load_state_dict(model.state_dict())
    restore_masks(fresh)
    assert all(torch.equal(mask, masks(fresh)[name]) for name, mask in masks(model).items())
    train(fresh, torch.optim.Adam(fresh.parameters(), lr=0.1))
    assert (pruned_weights(fresh) == 0).all()
    assert sparsity(fresh).zeros == sum(int((~mask).sum()) for mask in masks(model).values())


def test_copies_and_new_parameters_are_held_too() -> None:
    model = make_model()
    prune(model, "l1", 0.5)
    twin = copy.deepcopy(model)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1))
    assert (pruned_weights(twin) == 0).all()
    twin[0].weight = nn.Parameter(torch.ones_like(twin[0].weight))
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1))
    assert (pruned_weights(twin) == 0).all()
    assert (model[0].weight != twin[0].weight).any(), "the copy and its model share a weight"


def test_a_pickled_model_holds_its_masks_in_another_process(tmp_path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    prune(model, "l1", 0.5)
    torch.save(model, tmp_path / "model.pt")
    hooks = sys.modules["neural_layers.wrappers.pruning.masks"]  # the package's `masks` is the function
    while hooks._STEPS:  # as in a process that has pruned nothing
        hooks._STEPS.pop().remove()
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=0.1)
    for weight in (loaded[0].weight, loaded[2].weight):
        optimizer.state[weight] = {n: torch.ones_like(weight) for n in ("exp_avg", "exp_avg_sq")}
        optimizer.state[weight]["step"] = torch.tensor(1.0)
    train(loaded, optimizer, steps=1)
    assert (pruned_weights(loaded) == 0).all()


def test_a_frozen_weight_is_held_once_it_is_trained() -> None:
    model = make_model()
    model.requires_grad_(False)
    prune(model, "l1", 0.5)
    model.requires_grad_(True)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert (pruned_weights(model) == 0).all()
    assert (model[0].weight.grad[~mask_of(model[0])] == 0).all()


def test_apply_masks_counts_what_others_wrote() -> None:
    model = make_model()
    prune(model, "l1", 0.5)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert apply_masks(model) == 24
    assert apply_masks(model) == 0
    unprune(model)
    assert not masks(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert (model[0].weight != 0).all()


def test_a_compiled_model_trains_with_its_masks() -> None:
    model = make_model()
    prune(model, "l1", 0.5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(compiled, optimizer)
    assert (pruned_weights(model) == 0).all()


def test_a_file_of_masks_knows_zeros_that_are_not_pruned(tmp_path) -> None:
    model, fresh = make_model(), make_model()
    with torch.no_grad():
        model[2].weight[0] = 0.0
    prune(model, "random", 0.3, include=["2"])
    save_masks(model, tmp_path / "masks.safetensors")
    fresh.load_state_dict(model.state_dict())
    report = load_masks(fresh, tmp_path / "masks.safetensors")
    assert [layer.name for layer in report.layers] == ["2"]
    assert torch.equal(mask_of(fresh[2]), mask_of(model[2]))
    assert mask_of(fresh[2])[0].any()
    assert load_file(tmp_path / "masks.safetensors")["2"].shape == (3,)  # 24 weights, one bit each
    assert [path.name for path in tmp_path.iterdir()] == ["masks.safetensors"]


def test_masks_of_another_model_are_refused(tmp_path) -> None:
    model, path = make_model(), tmp_path / "masks.safetensors"
    with pytest.raises(ValueError, match="no layer holds a mask"):
        save_masks(model, path)
    with pytest.raises(ValueError, match="no weight of the layers is zero"):
        restore_masks(model)
    prune(model, "l1", 0.5)
    save_masks(model, path)
    wider = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    with pytest.raises(InputError, match=r"the mask of 2 .* has shape \(3, 8\), and the weight \(4, 8\)"):
        load_masks(wider, path)
    assert not masks(wider)
    with pytest.raises(InputError, match="names the layer 2, which this model has not"):
        load_masks(nn.Sequential(nn.Linear(6, 8)), path)
    save_file({"2": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="holds no masks"):
        load_masks(model, path)
    path.write_bytes(b"cut")
    with pytest.raises(InputError, match="cannot be read"):
        load_masks(model, path)


def test_a_transformers_model_notes_what_is_pruned(tmp_path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from neural_layers.models.hybrid import HybridConfig, HybridForCausalLM

    sizes = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    mixers = {"mixers": ["mamba", "attention"], "num_attention_heads": 2}
    torch.manual_seed(0)
    model = HybridForCausalLM(HybridConfig(**sizes, **mixers)).eval()
    prune(model, "l1", 0.5, exclude=["x_proj"])
    model.save_pretrained(tmp_path)
    loaded = HybridForCausalLM.from_pretrained(tmp_path).eval()
    with pytest.raises(InputError, match=r"notes model.layers.0.* and 12 more as pruned"):
        prune(loaded, "l1", 0.5, of="remaining")
    restore_masks(loaded)
    assert sorted(masks(loaded)) == sorted(masks(model))
    assert all(torch.equal(mask, masks(loaded)[name]) for name, mask in masks(model).items())
    ids = torch.arange(6).view(1, 6)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=0.01)
    loaded.train()(ids, labels=ids).loss.backward()
    optimizer.step()
    assert apply_masks(loaded) == 0

    noted = json.loads((tmp_path / "config.json").read_text())["pruning"]["zeros"]
    assert set(noted) == set(masks(model))
    other = HybridForCausalLM(HybridConfig(**sizes, **mixers, pruning={"zeros": noted}))
    with pytest.raises(InputError, match=r"has 0 zeros, and \d+ of its weights were pruned"):
        restore_masks(other)
    unprune(loaded)
    assert not hasattr(loaded.config, "pruning")
    quantized = HybridForCausalLM.from_pretrained(tmp_path)
    quantize(quantized, "int8_dynamic")
    with pytest.raises(InputError, match="the zeros of .* cannot be held: LinearInt8 holds quantized weights"):
        restore_masks(quantized)
