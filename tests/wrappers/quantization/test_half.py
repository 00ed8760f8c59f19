"""Layers in 16 bits within a model of another dtype."""

import pytest
import torch
from torch import nn

from neural_layers.wrappers.quantization.half import EmbeddingHalf, LinearHalf

DTYPES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.bfloat16])
def test_the_product_is_that_of_the_rounded_numbers(dtype, given) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(37, 11).to(given)
    layer, x = LinearHalf.from_linear(linear, dtype), torch.randn(3, 37, dtype=given, requires_grad=True)
    y = layer(x)
    exact = x.detach().to(dtype).double() @ layer.weight.double().T
    assert y.dtype == given
    steps = torch.finfo(dtype).eps * exact.abs() + torch.finfo(given).eps * 4
    assert ((y.double() - exact - linear.bias.double()).abs() <= steps + torch.finfo(given).eps * y.abs()).all()
    y.sum().backward()
    assert torch.allclose(x.grad.double(), layer.weight.double().sum(0).expand(3, -1), rtol=0.02, atol=0.02)
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_keeps_its_dtype_and_lookups_follow_the_model(dtype) -> None:
    table = EmbeddingHalf.from_embedding(nn.Embedding(5, 8), dtype)
    head = LinearHalf.from_linear(nn.Linear(8, 5, bias=False), dtype).share(table)
    model = nn.ModuleList([table, head]).double().half().float().double()
    assert model[0].weight.dtype == dtype
    assert model[1].weight is model[0].weight
    assert model[0](torch.tensor([[1, 2]])).dtype == torch.float64
    assert torch.equal(table.dense_weight(), head.dense_weight())


def test_autocast_does_not_change_the_product() -> None:
    layer, x = LinearHalf.from_linear(nn.Linear(8, 8), torch.float16), torch.randn(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer(x)
    assert torch.equal(inside, layer(x))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="must be torch.float16 or torch.bfloat16"):
        LinearHalf.from_linear(nn.Linear(4, 4), torch.float64)
