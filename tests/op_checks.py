"""Comparing a backend with the float64 reference: values and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from neural_layers.kernels import c_library
from tests.tolerances import FORWARD, GRADIENT

# What is tested against the reference. Tests of `native` run again in every variant that the processor has.
NATIVE = pytest.param(
    "native",
    marks=[pytest.mark.native, pytest.mark.skipif(not c_library.VARIANT, reason="the C kernels are not built here")],
)
BACKENDS = ["torch", NATIVE]

Arguments = dict[str, Any]


def seeded(seed: int) -> Callable[..., Tensor]:
    """A standard normal float64 tensor maker: normal = seeded(0); normal(2, 3)."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


def non_contiguous(tensor: Tensor) -> Tensor:
    """The same values with a stride of two in the last dimension."""
    if tensor.ndim == 0:
        return tensor
    return torch.stack([tensor, torch.full_like(tensor, 7)], dim=-1)[..., 0]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation, relative to the largest magnitude expected (at least 1)."""
    if expected.numel() == 0:
        return 0.0
    assert actual.isfinite().all() or not expected.isfinite().all()
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max().clamp_min(1.0)).item()


def assert_matches_reference(
    op: Callable[..., Any], arguments: Arguments, dtype: torch.dtype, *, backend: str, contiguous: bool = True
) -> None:
    """Run `op` in `dtype` on `backend` and in float64 on the reference; compare every output and every gradient.

    Floating tensors among the float64 `arguments` are rounded to `dtype` first, for both sides.
    """
    floats = {k: v.to(dtype) for k, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()}
    rest = {k: v for k, v in arguments.items() if k not in floats}
    given = {k: (v if contiguous else non_contiguous(v)).detach().requires_grad_() for k, v in floats.items()}
    exact = {k: v.double().detach().requires_grad_() for k, v in floats.items()}

    outputs = as_tuple(op(**given, **rest, backend=backend))
    expected = as_tuple(op(**exact, **rest, backend="reference"))
    assert len(outputs) == len(expected)
    for i, (out, ref) in enumerate(zip(outputs, expected, strict=True)):
        assert out.shape == ref.shape, f"output {i}"
        error = relative_error(out, ref)
        assert error <= FORWARD[dtype], f"output {i} of {backend}: error {error:.2e}"

    normal = seeded(1)
    # Rounded as the outputs are, so that both sides are given the same gradients.
    weights = [normal(*out.shape).to(out.dtype).double() for out in outputs]
    actual_grads = torch.autograd.grad(_weighted(outputs, weights), list(given.values()), allow_unused=True)
    expected_grads = torch.autograd.grad(_weighted(expected, weights), list(exact.values()), allow_unused=True)
    for name, grad, ref in zip(given, actual_grads, expected_grads, strict=True):
        assert (grad is None) == (ref is None), f"gradient of {name}: {grad} against {ref}"
        if ref is not None:
            error = relative_error(grad, ref)
            assert error <= GRADIENT[dtype], f"gradient of {name} on {backend}: error {error:.2e}"


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """One output as a tuple of one."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _weighted(outputs: tuple[Tensor, ...], weights: list[Tensor]) -> Tensor:
    return torch.stack([(out.double() * weight).sum() for out, weight in zip(outputs, weights, strict=True)]).sum()
