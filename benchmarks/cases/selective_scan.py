"""The selective scan of Mamba, over the sequence and for one token."""

import torch
import torch.nn.functional as tf
from torch import Tensor

from neural_layers.benchmarks.case import Call, Case, Inputs, Limit, Maker, Peer, Size, leaf, sweep
from neural_layers.benchmarks.limits import Run, bytes_of, copy_limit

MODELS = "pip install 'neural-layers[models]'"
BENCH = "pip install 'neural-layers[bench]'"
MAMBA_SSM = "needs CUDA and a compiler: pip install mamba-ssm --no-build-isolation"
QUADRATIC_FROM = 128  # tokens; at 512 tokens × 512 channels one call takes 11 s


def make(size: Size, maker: Maker) -> Inputs:
    """All arguments, with steps and decays as Mamba's initialisation has them."""
    B, T, E, N = (size[letter] for letter in "BTEN")
    inputs = _common(maker, (B, T), E, N)
    return inputs | {"delta_softplus": True}


def make_step(size: Size, maker: Maker) -> Inputs:
    """The same for one token, with a state."""
    B, E, N = size["B"], size["E"], size["N"]
    return {"state": maker.normal(B, E, N, dtype=torch.float32), **_common(maker, (B,), E, N), "delta_softplus": True}


def _common(maker: Maker, tokens: tuple[int, ...], E: int, N: int) -> Inputs:
    float32 = torch.float32
    return {
        "u": maker.normal(*tokens, E),
        "delta": 0.5 * maker.normal(*tokens, E),
        "A": -torch.arange(1, N + 1, dtype=float32, device=maker.device).repeat(E, 1),
        "B": maker.normal(*tokens, N),
        "C": maker.normal(*tokens, N),
        "D": maker.normal(E, dtype=float32),
        "z": maker.normal(*tokens, E),
        "delta_bias": maker.normal(E, dtype=float32) - 4,
    }


def channels_first(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of the scan in the layout of the original kernel, (B, E, T)."""
    timed = ("u", "delta", "B", "C", "z")
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    return {name: leaf(inputs[name].transpose(1, 2) if name in timed else inputs[name]) for name in names}


def back(y: Tensor) -> Tensor:
    """(B, E, T) to (B, T, E)."""
    return y.transpose(1, 2)


def transformers(inputs: Inputs) -> Call:
    """What every Mamba of transformers runs where mamba_ssm is missing: all of exp(ΔA) at once, then a loop."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    t = channels_first(inputs)
    run = lambda: mamba_selective_scan(  # noqa: E731
        t["u"], t["delta"], t["A"], t["B"], t["C"], t["D"], t["z"], t["delta_bias"], delta_softplus=True
    )
    return Call(run, tuple(t.values()), back)


def _mambapy(inputs: Inputs, *, sequential: bool) -> Call:
    from mambapy.mamba import MambaBlock, MambaConfig

    t = {name: leaf(value) for name, value in inputs.items() if isinstance(value, Tensor)}
    E, N = t["A"].shape
    # The methods that compute the scan read nothing of the block but these sizes, and only the sequential one does.
    block = MambaBlock(MambaConfig(d_model=2, n_layers=1, d_state=N, expand_factor=1))
    block.config.d_inner = E
    scan = block.selective_scan_seq if sequential else block.selective_scan

    def run() -> Tensor:
        delta = tf.softplus(t["delta"] + t["delta_bias"])
        return scan(t["u"], delta, t["A"], t["B"], t["C"], t["D"]) * tf.silu(t["z"])

    return Call(run, tuple(t.values()))


def mambapy(inputs: Inputs) -> Call:
    """mambapy's parallel scan, its default."""
    return _mambapy(inputs, sequential=False)


def mambapy_sequential(inputs: Inputs) -> Call:
    """mambapy with `pscan=False`."""
    return _mambapy(inputs, sequential=True)


def mamba_ssm(inputs: Inputs) -> Call:
    """The original CUDA kernel."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    t = channels_first(inputs)
    run = lambda: selective_scan_fn(  # noqa: E731
        t["u"], t["delta"], t["A"], t["B"], t["C"], t["D"], t["z"], t["delta_bias"], delta_softplus=True
    )
    return Call(run, tuple(t.values()), back)


def quadratic(size: Size, effort: str) -> str | None:
    """A loop over slices of one tensor: each slice's gradient fills a whole one."""
    return "quadratic in T" if size["T"] > QUADRATIC_FROM else None


def exponentials(inputs: Inputs) -> tuple[Run | None, Run | None]:
    """B·T·E·N exponentials, by the function that the C kernels use, in registers."""
    from neural_layers.kernels import c_library

    if c_library.obstacle(inputs["u"]) or inputs["u"].dtype != torch.float32:
        return None, None
    compute = c_library.function("exponentials", torch.float32)
    count = inputs["u"].numel() * inputs["A"].shape[1]
    return (lambda: compute(count, torch.get_num_threads())), None


def eager_step(inputs: Inputs) -> Call:
    """What transformers runs for a token where mamba_ssm is missing; it writes its state, so it gets a copy."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_state_update

    t = dict(inputs)
    t["state"] = inputs["state"].clone()
    first = t["state"].clone()
    names = ("u", "delta", "A", "B", "C", "D", "delta_bias", "delta_softplus", "z")

    def compare(y: Tensor) -> Tensor:
        t["state"].copy_(first)
        return mamba_selective_state_update(t["state"], *(t[name] for name in names))

    return Call(lambda: mamba_selective_state_update(t["state"], *(t[name] for name in names)), compare=compare)


def mamba_ssm_step(inputs: Inputs) -> Call:
    """The original Triton kernel for a token."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    t = dict(inputs)
    t["state"] = inputs["state"].clone()
    first = t["state"].clone()

    def run() -> Tensor:
        return selective_state_update(
            t["state"], t["u"], t["delta"], t["A"], t["B"], t["C"], D=t["D"], z=t["z"],
            dt_bias=t["delta_bias"], dt_softplus=True,
        )  # fmt: skip

    def compare(y: Tensor) -> Tensor:
        t["state"].copy_(first)
        return run()

    return Call(run, compare=compare)


CASES = (
    Case(
        name="selective_scan",
        op="selective_scan",
        about="the scan of a Mamba mixer with softplus, bias, D and z",
        axis="T",
        make=make,
        leaves=("u", "delta", "A", "B", "C", "D", "z", "delta_bias"),
        tiny=sweep(B=1, T=(4, 8), E=6, N=4),
        quick=sweep(B=1, T=(128, 2048), E=1536, N=16),
        full=sweep(B=1, T=(128, 512, 2048, 8192), E=1536, N=16),
        cuda=sweep(B=1, T=(512, 2048, 8192, 32768), E=4096, N=16),
        peers=(
            Peer("transformers", transformers, "transformers.models.mamba.modeling_mamba", MODELS,
                 skip_backward=quadratic, call="mamba_selective_scan, its sequential path"),
            Peer("mambapy", mambapy, "mambapy.mamba", BENCH, call="MambaBlock.selective_scan: the parallel scan"),
            Peer("mambapy sequential", mambapy_sequential, "mambapy.mamba", BENCH, skip_backward=quadratic,
                 only_full="slower than its default: not with --quick", call="MambaBlock.selective_scan_seq"),
            Peer("mamba_ssm", mamba_ssm, "mamba_ssm", MAMBA_SSM, "cuda", call="selective_scan_fn"),
        ),
        limit=Limit("the exponentials alone", exponentials),
    ),
    Case(
        name="selective_scan_step",
        op="selective_scan_step",
        about="one token of the scan",
        axis="B",
        make=make_step,
        leaves=(),
        tiny=sweep(B=(1, 2), E=6, N=4),
        quick=sweep(B=(1, 16), E=1536, N=16),
        full=sweep(B=(1, 4, 16, 64), E=1536, N=16),
        cuda=sweep(B=(1, 16, 128), E=4096, N=16),
        peers=(
            Peer("torch eager", eager_step, "transformers.models.mamba.modeling_mamba", MODELS,
                 call="mamba_selective_state_update of transformers"),
            Peer("mamba_ssm", mamba_ssm_step, "mamba_ssm", MAMBA_SSM, "cuda", call="selective_state_update"),
        ),
        limit=copy_limit(lambda i: bytes_of(i, "state", "state")),
    ),
)  # fmt: skip
