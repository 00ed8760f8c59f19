"""When one step of the selective scan can run in Triton, and running it: triton_step.py. It is for decoding alone."""

from torch import Tensor

from neural_layers.kernels import c_library, triton_support

_step = triton_support.deferred("selective_scan_step.triton_step", "step")


def triton_obstacle(state: Tensor, *tensors: Tensor, delta_softplus: bool, **optional: Tensor | None) -> str | None:
    """Why the Triton step cannot run, or None."""
    everything = (state, *tensors, *optional.values())
    reason = triton_support.obstacle(*everything)
    if reason is None and not c_library.unwatched(*everything):
        return "the Triton step is for decoding: it has no gradient and cannot be traced"
    return reason


def selective_scan_step_triton(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """h = exp(Δ A) state + Δ B u;  y = (C·h + D u) · silu(z), in Triton."""
    y, new_state = _step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return y, new_state
