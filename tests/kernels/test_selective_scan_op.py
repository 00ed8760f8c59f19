"""selective_scan as a citizen of PyTorch: operator checks, finite differences, tracing, memory, errors, a judge."""

import pytest
import torch

from neural_layers.kernels.causal_conv1d import causal_conv1d
from neural_layers.kernels.selective_scan import selective_scan
from neural_layers.kernels.selective_scan_step import selective_scan_step
from tests.op_checks import BACKENDS, seeded
from tests.tolerances import FORWARD


def make_arguments(batch: int, length: int, width: int, states: int, dtype: torch.dtype = torch.float64) -> dict:
    normal = seeded(0)
    arguments = {
        "u": normal(batch, length, width),
        "delta": normal(batch, length, width),
        "A": -normal(width, states).exp(),
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": normal(width),
        "z": normal(batch, length, width),
        "delta_bias": normal(width),
        "initial_state": normal(batch, width, states),
    }
    return {name: value.to(dtype) for name, value in arguments.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_custom_ops_pass_opcheck(backend) -> None:
    forward = torch.ops.neural_layers.selective_scan.default
    backward = torch.ops.neural_layers.selective_scan_backward.default
    tensors = list(make_arguments(2, 35, 3, 2).values())
    seq_idx = torch.arange(70).view(2, 35) // 6
    given = (*(tensor.clone().requires_grad_() for tensor in tensors), seq_idx, True, backend)
    torch.library.opcheck(forward, given)
    torch.library.opcheck(
        forward, (*(tensor.float().requires_grad_() for tensor in tensors[:5]), *[None] * 5, False, backend)
    )
    y, state, starts = forward(*given)
    # The backward op's own gradient is an error on purpose, so its inputs ask for none.
    rest = (*(tensor.detach() for tensor in given[:9]), seq_idx, True, backend)
    torch.library.opcheck(backward, (torch.ones_like(y), torch.ones_like(state), starts.detach(), *rest))
    bare = (*tensors[:5], *[None] * 5, False, backend)
    torch.library.opcheck(backward, (torch.ones_like(y), None, forward(*bare)[2], *bare))


@pytest.mark.parametrize("seq_idx", [None, torch.tensor([[0, 0, 1, 0], [5, 5, 5, 5]])])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_gradients_match_finite_differences(backend, seq_idx) -> None:
    arguments = make_arguments(2, 4, 2, 2)
    names = list(arguments)

    def call(*values):
        options = {"delta_softplus": True, "return_final_state": True, "seq_idx": seq_idx, "backend": backend}
        return selective_scan(**dict(zip(names, values, strict=True)), **options)

    values = tuple(value.requires_grad_() for value in arguments.values())
    assert torch.autograd.gradcheck(call, values)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(call, values)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients_of_a_step_match_finite_differences(backend) -> None:
    token = {k: v[:, 0] if k in ("u", "delta", "B", "C", "z") else v for k, v in make_arguments(2, 1, 2, 2).items()}
    token = {"state": token.pop("initial_state"), **token}
    names = list(token)

    def call(*values):
        return selective_scan_step(**dict(zip(names, values, strict=True)), delta_softplus=True, backend=backend)

    values = tuple(value.requires_grad_() for value in token.values())
    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(call, values)


def test_gradient_of_the_final_state_alone() -> None:
    arguments = make_arguments(2, 35, 3, 2)
    state = arguments["initial_state"].requires_grad_()
    grads = [
        torch.autograd.grad(selective_scan(**arguments, return_final_state=True, backend=backend)[1].sum(), state)[0]
        for backend in ("auto", "torch", "reference")
    ]
    torch.testing.assert_close(grads[:2], [grads[2]] * 2, rtol=1e-12, atol=1e-12)
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_is_refused(backend) -> None:
    arguments = make_arguments(1, 3, 2, 2)
    u = arguments["u"].requires_grad_()
    (grad,) = torch.autograd.grad(selective_scan(**arguments, backend=backend).sum(), u, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_scan_is_traced_without_graph_break(dynamic, backend) -> None:
    def run(arguments, seq_idx):
        options = {"delta_softplus": True, "return_final_state": True, "backend": backend}
        return selective_scan(**arguments, seq_idx=seq_idx, **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (40, 71):
        arguments = make_arguments(2, length, 3, 4)
        u = arguments["u"].requires_grad_()
        seq_idx = torch.arange(2 * length).view(2, length) // 7
        actual, expected = compiled(arguments, seq_idx), run(arguments, seq_idx)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        grads = [torch.autograd.grad(y.sum() + state.sum(), u)[0] for y, state in (actual, expected)]
        torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_step_is_traced_without_graph_break() -> None:
    token = {k: v[:, 0] if k in ("u", "delta", "B", "C", "z") else v for k, v in make_arguments(2, 1, 3, 4).items()}
    state = token.pop("initial_state")
    compiled = torch.compile(lambda s, kw: selective_scan_step(s, **kw), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(state, token), selective_scan_step(state, **token))


def test_saved_for_backward_are_the_inputs_and_a_few_states() -> None:
    arguments = {name: value.requires_grad_() for name, value in make_arguments(1, 256, 8, 16).items()}
    saved: dict[int, int] = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        selective_scan(**arguments, delta_softplus=True, backend="torch")
    inputs = sum(value.numel() for value in arguments.values())
    states = sum(saved.values()) - inputs
    assert 0 < states <= 256 * 8 * 16 // 16, f"{states} numbers saved beside the {inputs} of the inputs"


def test_two_runs_give_the_same_bits() -> None:
    arguments = {name: value.requires_grad_() for name, value in make_arguments(2, 70, 5, 4, torch.float32).items()}
    runs = [selective_scan(**arguments, delta_softplus=True, backend="torch") for _ in range(2)]
    grads = [torch.autograd.grad(y.sum(), list(arguments.values()), allow_unused=True) for y in runs]
    assert all(torch.equal(a, b) for a, b in zip((runs[0], *grads[0]), (runs[1], *grads[1]), strict=True))


def test_convolution_and_scan_rebuild_the_mixer_of_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    torch.manual_seed(0)
    config = modeling.MambaConfig(hidden_size=8, state_size=4, num_hidden_layers=1, time_step_rank=3, use_mambapy=False)
    mixer = modeling.MambaMixer(config, layer_idx=0)
    hidden = torch.randn(2, 50, 8)

    u, z = mixer.in_proj(hidden).chunk(2, dim=-1)
    u = causal_conv1d(u, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, activation="silu")
    rank, B, C = mixer.x_proj(u).split([3, 4, 4], dim=-1)
    options = {"D": mixer.D, "z": z, "delta_bias": mixer.dt_proj.bias, "delta_softplus": True}
    y = mixer.out_proj(selective_scan(u, rank @ mixer.dt_proj.weight.T, -mixer.A_log.exp(), B, C, **options))

    expected = mixer(hidden)
    grads = [torch.autograd.grad(out.square().sum(), list(mixer.parameters())) for out in (y, expected)]
    scale = expected.abs().max()
    torch.testing.assert_close(y / scale, expected / scale, rtol=0, atol=FORWARD[torch.float32])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"delta": torch.ones(2, 5, 3)}, ValueError, r"delta has shape \(2, 5, 3\); .*T=4"),
        ({"A": torch.ones(2, 2)}, ValueError, r"A has shape \(2, 2\); .*E=3"),
        ({"B": torch.ones(2, 4, 3)}, ValueError, r"B has shape \(2, 4, 3\); .*N=2"),
        ({"C": torch.ones(2, 4)}, ValueError, r"C has shape \(2, 4\); expected \(B, T, N\)"),
        ({"D": torch.ones(2)}, ValueError, r"D has shape \(2,\); .*E=3"),
        ({"z": torch.ones(1, 4, 3)}, ValueError, r"z has shape \(1, 4, 3\); .*B=2"),
        ({"delta_bias": torch.ones(3, 1)}, ValueError, r"delta_bias has shape \(3, 1\)"),
        ({"initial_state": torch.ones(2, 2, 3)}, ValueError, r"initial_state has shape \(2, 2, 3\); .*E=3, N=2"),
        ({"seq_idx": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"seq_idx has shape \(2, 3\).*\(2, 4\)"),
        ({"seq_idx": torch.zeros(2, 4)}, TypeError, r"seq_idx has dtype torch.float32; expected torch.int32"),
        ({"u": torch.ones(2, 4, 3, dtype=torch.int64)}, TypeError, "u has dtype torch.int64"),
        ({"A": torch.ones(3, 2, device="meta")}, ValueError, "different devices: .*A on meta"),
    ],
)
def test_bad_arguments_of_the_scan_are_named(changes, error, message) -> None:
    with pytest.raises(error, match=message):
        selective_scan(**make_arguments(2, 4, 3, 2) | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"state": torch.ones(2, 2, 3)}, ValueError, r"state has shape \(2, 2, 3\); .*E=3, N=2"),
        ({"B": torch.ones(2, 1, 2)}, ValueError, r"B has shape \(2, 1, 2\); expected \(B, N\)"),
        ({"z": torch.ones(2, 2)}, ValueError, r"z has shape \(2, 2\); .*E=3"),
        ({"delta": torch.ones(2, 3, dtype=torch.bool)}, TypeError, "delta has dtype torch.bool"),
    ],
)
def test_bad_arguments_of_the_step_are_named(changes, error, message) -> None:
    token = {"u": (2, 3), "delta": (2, 3), "A": (3, 2), "B": (2, 2), "C": (2, 2), "state": (2, 3, 2)}
    with pytest.raises(error, match=message):
        selective_scan_step(**{name: torch.ones(shape) for name, shape in token.items()} | changes)
