"""Training with the rounding in it: what it computes, its gradients, and what it is converted to."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from neural_layers.linear_int8 import LinearInt8
from neural_layers.quantized_embedding import EmbeddingInt8
from neural_layers.wrappers.pruning import prune
from neural_layers.wrappers.quantization import Plan, convert_qat, quantize
from neural_layers.wrappers.quantization.qat import FakeQuantizedLinear, fake_quantize_rows
from tests.wrappers.quantization.samples import cvm, hybrid, outputs, tower


@given(
    rows=st.integers(1, 5), width=st.integers(1, 40), seed=st.integers(0, 99), scale=st.sampled_from([1e-6, 1.0, 1e6])
)
def test_rounding_is_torchaos(rows, width, seed, scale) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives", reason="torchao is the judge here")
    x = scale * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    most = x.abs().amax(dim=1) / 127
    theirs = primitives._fake_quantize_affine(
        x, (1, width), most, torch.zeros(rows, dtype=torch.int32), torch.int8, -127, 127
    )
    ours = fake_quantize_rows(x)
    # A value halfway between two codes may go to either, one step apart.
    differ = (ours - theirs).abs() > 1e-6 * most[:, None] * 127
    position = x.double() / most.double()[:, None]
    assert ((position - position.floor() - 0.5).abs()[differ] < 1e-4).all()
    assert ((ours - x).abs() <= most[:, None] * 0.5001).all()


@given(seed=st.integers(0, 99), width=st.integers(1, 70))
def test_the_gradient_passes_as_if_nothing_were_rounded(seed, width) -> None:
    torch.manual_seed(seed)
    layer = FakeQuantizedLinear.from_linear(nn.Linear(width, 5).double())
    x = torch.randn(3, width, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 5, dtype=torch.float64)
    layer(x).backward(upstream)
    x_rounded, w_rounded = fake_quantize_rows(x.detach()), layer.dense_weight().detach()
    assert torch.allclose(x.grad, upstream @ w_rounded, rtol=1e-12)
    assert torch.allclose(layer.weight.grad, upstream.T @ x_rounded, rtol=1e-12)
    assert torch.allclose(layer.bias.grad, upstream.sum(0), rtol=1e-12)


@given(rows=st.integers(1, 5), width=st.integers(1, 90), seed=st.integers(0, 99))
def test_training_computes_as_the_converted_layer_up_to_float_rounding(rows, width, seed) -> None:
    torch.manual_seed(seed)
    model, x = nn.Sequential(nn.Linear(width, 7)), torch.randn(rows, width)
    quantize(model, "int8_qat")
    training = model(x).detach()
    convert_qat(model)
    exact = model[0].dense_weight().double() @ fake_quantize_rows(x).double().T
    bound = 4e-7 * (model[0].dense_weight().abs() @ x.abs().T + 1)
    assert ((training - model(x).detach()).T.abs() <= bound).all()
    assert ((training - model[0].bias).T.double() - exact).abs().le(bound).all()


@pytest.mark.parametrize("make", [tower, hybrid, cvm])
def test_the_converted_model_computes_as_the_prepared_one(make) -> None:
    model = make()
    plain = model.state_dict()
    report = quantize(model, "int8_qat")
    assert report.ratio == 1
    # The parameters are the model's own, under the same names, so that optimizers and checkpoints go on.
    assert model.state_dict().keys() == plain.keys()
    assert all(tensor.data_ptr() == plain[name].data_ptr() for name, tensor in model.state_dict().items())
    assert not hasattr(getattr(model, "config", None), "quantization_config")
    prepared = outputs(model)
    converted = convert_qat(copied := copy.deepcopy(model))
    assert converted.ratio > 3 or make is tower
    assert torch.equal(outputs(copied), prepared)
    dynamic = make()
    quantize(dynamic, "int8_dynamic")
    assert torch.equal(outputs(dynamic), outputs(copied))
    assert Plan.of(dynamic) == Plan.of(copied)


def test_training_with_the_rounding_beats_rounding_afterwards() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(30, 16), nn.Flatten(), nn.Linear(48, 4))

    ids = torch.randint(30, (64, 3), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        goal = make()(ids) * 1.7 + 0.3

    def train(model: nn.Module) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for step in range(150):
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * (1 - step / 150)
            optimizer.zero_grad()
            F.mse_loss(model(ids), goal).backward()
            optimizer.step()

    aware, afterwards = make(), make()
    quantize(aware, "int8_qat")
    train(aware)
    train(afterwards)
    convert_qat(aware)
    quantize(afterwards, "int8_dynamic")
    assert (type(aware[0]), type(aware[2])) == (EmbeddingInt8, LinearInt8)
    assert F.mse_loss(aware(ids), goal) < F.mse_loss(afterwards(ids), goal)


def test_transformers_trainer_trains_a_prepared_model(tmp_path) -> None:
    transformers = pytest.importorskip("transformers", reason="its Trainer is what is asked here")
    pytest.importorskip("accelerate", reason="Trainer needs it")
    model = hybrid(tie_word_embeddings=True)
    quantize(model, "int8_qat")
    before = model.lm_head.weight.detach().clone()
    rows = [{"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5]}] * 4
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], disable_tqdm=True,
        use_cpu=True, save_steps=3, logging_steps=1,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert not torch.equal(model.lm_head.weight, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # What Trainer saved is a float model, whose training can go on.
    saved = type(model).from_pretrained(tmp_path / "checkpoint-3")
    quantize(saved, "int8_qat")
    prepared = outputs(model.eval())
    assert torch.equal(outputs(saved), prepared)
    convert_qat(model)
    assert torch.equal(outputs(model), prepared)


def test_what_is_not_prepared_is_not_converted() -> None:
    model = tower()
    with pytest.raises(ValueError, match="no layer is prepared for int8_qat; call quantize"):
        convert_qat(model)
    quantize(model, "int8_qat")
    with torch.no_grad():
        model.first[0].weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"first\.0\.weight holds NaN or infinity"):
        convert_qat(model)
    assert isinstance(model.first[0], FakeQuantizedLinear)


def test_zeros_of_a_pruned_layer_hold_in_training() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    prune(model, "l1", 0.5)
    zero = model[0].weight == 0
    quantize(model, "int8_qat")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.randn(4, 64)).square().sum().backward()
    assert (model[0].weight.grad[zero] == 0).all()
    assert (model[0].weight.grad[~zero] != 0).any()
    optimizer.step()
    assert (model[0].weight[zero] == 0).all()
    convert_qat(model)
    assert (model[0].weight[zero] == 0).all()
    assert model(torch.randn(4, 64)).isfinite().all()
