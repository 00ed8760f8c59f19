"""ssd_scan as a citizen of PyTorch: operator checks, finite differences, tracing, memory, errors, a judge."""

import pytest
import torch

from neural_layers import explain
from neural_layers.kernels.dispatch import BackendError
from neural_layers.kernels.ssd_scan import ssd_scan
from tests.op_checks import seeded
from tests.tolerances import FORWARD, GRADIENT

BACKENDS = ["torch"]


def make_arguments(batch: int, length: int, groups: int = 1, dtype: torch.dtype = torch.float64) -> dict:
    normal, heads, width, states = seeded(0), 2 * groups, 3, 2
    arguments = {
        "x": normal(batch, length, heads, width),
        "dt": normal(batch, length, heads),
        "A": -normal(heads).exp(),
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
        "D": normal(heads),
        "z": normal(batch, length, heads, width),
        "dt_bias": normal(heads),
        "initial_state": normal(batch, heads, width, states),
    }
    return {name: value.to(dtype) for name, value in arguments.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_custom_ops_pass_opcheck(backend) -> None:
    forward = torch.ops.neural_layers.ssd_scan.default
    backward = torch.ops.neural_layers.ssd_scan_backward.default
    tensors = list(make_arguments(2, 35, groups=2).values())
    seq_idx = torch.arange(70).view(2, 35) // 6
    given = (*(tensor.clone().requires_grad_() for tensor in tensors), seq_idx, True, 4, True, backend)
    torch.library.opcheck(forward, given)
    bare = (*(tensor.float() for tensor in tensors[:5]), *[None] * 5, False, 64, False, backend)
    torch.library.opcheck(forward, bare)
    torch.library.opcheck(forward, (*(v[:, :1] if v.ndim > 1 else v for v in bare[:5]), *bare[5:]))
    y, state, kept = forward(*given)
    # The backward op's own gradient is an error on purpose, so its inputs ask for none.
    rest = (*(tensor.detach() for tensor in given[:9]), seq_idx, True, 4, backend)
    torch.library.opcheck(backward, (torch.ones_like(y), torch.ones_like(state), kept.detach(), *rest))
    bare = (*tensors[:5], *[None] * 5, False, 64)
    torch.library.opcheck(backward, (torch.ones_like(y), None, forward(*bare, True, backend)[2], *bare, backend))


@pytest.mark.parametrize("seq_idx", [None, torch.tensor([[0, 0, 1, 0], [5, 5, 5, 5]])])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_gradients_match_finite_differences(backend, seq_idx) -> None:
    arguments = make_arguments(2, 4)
    names = list(arguments)

    def call(*values):
        options = {"dt_softplus": True, "return_final_state": True, "seq_idx": seq_idx, "chunk_size": 3}
        return ssd_scan(**dict(zip(names, values, strict=True)), **options, backend=backend)

    values = tuple(value.requires_grad_() for value in arguments.values())
    assert torch.autograd.gradcheck(call, values)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(call, values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_final_state_alone(backend) -> None:
    arguments = make_arguments(2, 35)
    state = arguments["initial_state"].requires_grad_()
    grads = [
        torch.autograd.grad(ssd_scan(**arguments, return_final_state=True, backend=name)[1].sum(), state)[0]
        for name in (backend, "reference")
    ]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_is_refused(backend) -> None:
    arguments = make_arguments(1, 3)
    x = arguments["x"].requires_grad_()
    (grad,) = torch.autograd.grad(ssd_scan(**arguments, backend=backend).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_scan_is_traced_without_graph_break(dynamic, backend) -> None:
    def run(arguments, seq_idx):
        options = {"dt_softplus": True, "return_final_state": True, "chunk_size": 8, "backend": backend}
        return ssd_scan(**arguments, seq_idx=seq_idx, **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (40, 71):
        arguments = make_arguments(2, length)
        x = arguments["x"].requires_grad_()
        seq_idx = torch.arange(2 * length).view(2, length) // 7
        actual, expected = compiled(arguments, seq_idx), run(arguments, seq_idx)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        grads = [torch.autograd.grad(y.sum() + state.sum(), x)[0] for y, state in (actual, expected)]
        torch.testing.assert_close(*grads, rtol=0, atol=0)
        with torch.no_grad():
            torch.testing.assert_close(compiled(arguments, seq_idx), expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exported_scan_serves_lengths_beyond_the_traced_one(backend) -> None:
    class Module(torch.nn.Module):
        def forward(self, x, dt, A, B, C):
            return ssd_scan(x, dt, A, B, C, dt_softplus=True, return_final_state=True, chunk_size=8, backend=backend)

    names = ("x", "dt", "A", "B", "C")
    inputs = lambda length: tuple(make_arguments(2, length)[name] for name in names)  # noqa: E731
    length = torch.export.Dim("T", min=2, max=999)
    dynamic = tuple(None if name == "A" else {1: length} for name in names)
    exported = torch.export.export(Module(), inputs(5), dynamic_shapes=dynamic).module()
    for length in (2, 8, 9, 40, 131):
        torch.testing.assert_close(exported(*inputs(length)), Module()(*inputs(length)), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_for_backward_are_the_inputs_and_a_few_states(backend) -> None:
    arguments = {name: value.requires_grad_() for name, value in make_arguments(1, 1024).items()}
    saved: dict[int, int] = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ssd_scan(**arguments, dt_softplus=True, chunk_size=64, backend=backend)
    inputs = sum(value.numel() for value in arguments.values())
    states = (sum(saved.values()) - inputs) / arguments["initial_state"].numel()
    assert 0 < states <= 1024 / 64 + 1, f"{states} states saved beside the inputs"


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend) -> None:
    arguments = {name: value.requires_grad_() for name, value in make_arguments(2, 70, 2, torch.float32).items()}
    runs = [ssd_scan(**arguments, dt_softplus=True, backend=backend) for _ in range(2)]
    grads = [torch.autograd.grad(y.sum(), list(arguments.values())) for y in runs]
    assert all(torch.equal(a, b) for a, b in zip((runs[0], *grads[0]), (runs[1], *grads[1]), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("groups", "length"), [(1, 150), (3, 64)])
def test_scan_is_that_of_transformers(groups, length, backend) -> None:
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2", reason="transformers is not installed")
    arguments = make_arguments(2, length, groups, torch.float32)
    state = arguments.pop("initial_state")
    del arguments["z"]
    leaves = [value.requires_grad_() for value in arguments.values()]
    actual = ssd_scan(**arguments, dt_softplus=True, initial_state=state, return_final_state=True, backend=backend)
    options = {"chunk_size": 32, "dt_softplus": True, "initial_states": state, "return_final_states": True}
    expected = modeling.mamba2_chunk_scan(*leaves[:5], **options, D=leaves[5], dt_bias=leaves[6])
    grads = [torch.autograd.grad(y.square().sum() + state.sum(), leaves) for y, state in (actual, expected)]
    for tolerance, ours, theirs in ((FORWARD, actual, expected), (GRADIENT, *grads)):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a / b.abs().max(), b / b.abs().max(), rtol=0, atol=tolerance[torch.float32])


def test_explain_takes_the_arguments_of_the_scan() -> None:
    assert str(explain("ssd_scan", **make_arguments(1, 3), backend="reference")).startswith("ssd_scan: backend 'refer")
    with pytest.raises(BackendError, match="ssd_scan has no backend 'cuda'; it has 'auto', "):
        ssd_scan(**make_arguments(1, 3), backend="cuda")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dt": torch.ones(2, 5, 2)}, ValueError, r"dt has shape \(2, 5, 2\); .*T=4, H=2"),
        ({"A": torch.ones(3)}, ValueError, r"A has shape \(3,\); .*H=2"),
        ({"B": torch.ones(2, 4, 2)}, ValueError, r"B has shape \(2, 4, 2\); expected \(B, T, G, N\)"),
        ({"C": torch.ones(2, 4, 1, 3)}, ValueError, r"C has shape \(2, 4, 1, 3\); .*G=1, N=2"),
        ({"B": torch.ones(2, 4, 3, 2), "C": torch.ones(2, 4, 3, 2)}, ValueError, "G=3 groups, .* the H=2 heads"),
        ({"B": torch.ones(2, 4, 0, 2), "C": torch.ones(2, 4, 0, 2)}, ValueError, "G=0 groups"),
        ({"D": torch.ones(2, 3)}, ValueError, r"D has shape \(2, 3\); expected \(H\)"),
        ({"z": torch.ones(1, 4, 2, 3)}, ValueError, r"z has shape \(1, 4, 2, 3\); .*B=2"),
        ({"dt_bias": torch.ones(2, 1)}, ValueError, r"dt_bias has shape \(2, 1\)"),
        ({"initial_state": torch.ones(2, 2, 2, 3)}, ValueError, r"initial_state has shape .*P=3, N=2"),
        ({"seq_idx": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"seq_idx has shape \(2, 3\).*\(2, 4\)"),
        ({"seq_idx": torch.zeros(2, 4)}, TypeError, r"seq_idx has dtype torch.float32; expected torch.int32"),
        ({"chunk_size": 0}, ValueError, "chunk_size=0 must be at least 1"),
        ({"x": torch.ones(2, 4, 2, 3, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        ({"A": torch.ones(2, device="meta")}, ValueError, "different devices: .*A on meta"),
    ],
)
def test_bad_arguments_are_named(changes, error, message) -> None:
    with pytest.raises(error, match=message):
        ssd_scan(**make_arguments(2, 4) | changes)
