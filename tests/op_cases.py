"""For each op of `neural_layers.functional`, a strategy that draws arguments of it: shapes, options and a seed.

Drawn are float64 tensors, and what is not a float as it is. `cast` rounds them to another dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

import neural_layers.functional as F
from neural_layers.kernels.four_bit import Quantized4bit
from neural_layers.kernels.int4 import QuantizedInt4
from tests.op_checks import Arguments, as_tuple, seeded

SEEDS = st.integers(0, 999)
LONGEST, LONGEST_SMALL = 130, 20  # tokens; the small ones are for Triton's interpreter
Drawing = Callable[..., Arguments]


@dataclass(frozen=True)
class OpCases:
    """Arguments of an op.

    arguments: draws them, with lengths up to the given one
    outputs:   what of its result for these arguments is compared
    """

    arguments: Callable[[int], SearchStrategy[Arguments]]
    outputs: Callable[[Any, Arguments], tuple[Tensor, ...]] = lambda result, arguments: as_tuple(result)


def cast(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The same with floats in `dtype`; a 4-bit weight then restores to it."""

    def convert(value: Any) -> Any:
        if isinstance(value, Quantized4bit | QuantizedInt4):
            return replace(value, dtype=dtype)
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: convert(value) for name, value in arguments.items()}


def widths(most: int) -> SearchStrategy[int]:
    """Sizes up to `most`, those around a vector's width as often as any."""
    special = [size for size in (1, 3, 8, 15, 16, 17, 31, 32, 33, 64, 65, 100) if size <= most]
    return st.sampled_from(special) | st.integers(1, most)


def documents(draw: DrawFn, batch: int, length: int, seed: int) -> Arguments:
    """`seq_idx` in half of the draws: short documents with few numbers, so that numbers come back."""
    if not draw(st.booleans()):
        return {}
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-1, 2, (batch, (length + 3) // 4), generator=generator)
    return {"seq_idx": numbers.repeat_interleave(4, dim=1)[:, :length]}


def some_of(draw: DrawFn, arguments: Arguments, *optional: str) -> Arguments:
    """The arguments without some of the optional ones."""
    left_out = draw(st.sets(st.sampled_from(optional)))
    return {name: value for name, value in arguments.items() if name not in left_out}


@st.composite
def rms_norm(draw: DrawFn, longest: int) -> Arguments:
    shape, normal = (draw(st.integers(1, 3)), draw(widths(longest)), draw(widths(200))), seeded(draw(SEEDS))
    return {"x": normal(*shape), "weight": normal(shape[-1]), "eps": draw(st.sampled_from([1e-6, 1e-5]))}


@st.composite
def swiglu(draw: DrawFn, longest: int) -> Arguments:
    shape, normal = (draw(st.integers(1, 3)), draw(widths(longest)), draw(widths(200))), seeded(draw(SEEDS))
    return {"gate": 2 * normal(*shape), "up": normal(*shape)}


@st.composite
def geglu(draw: DrawFn, longest: int) -> Arguments:
    return draw(swiglu(longest)) | {"approximate": draw(st.sampled_from(["tanh", "none"]))}


@st.composite
def apply_rotary(draw: DrawFn, longest: int) -> Arguments:
    B, T, H, half = draw(st.integers(1, 3)), draw(widths(longest)), draw(st.integers(1, 4)), draw(widths(40))
    normal = seeded(draw(SEEDS))
    angles = normal(B, T, half) if draw(st.booleans()) else normal(T, half)
    return {"x": normal(B, T, H, 2 * half), "cos": angles.cos(), "sin": angles.sin()}


@st.composite
def causal_conv1d(draw: DrawFn, longest: int) -> Arguments:
    B, T, E, W = draw(st.integers(1, 2)), draw(widths(longest)), draw(widths(70)), draw(st.integers(1, 5))
    seed = draw(SEEDS)
    normal = seeded(seed)
    arguments = {"x": normal(B, T, E), "weight": normal(E, W), "bias": normal(E), "initial_state": normal(B, W - 1, E)}
    arguments = some_of(draw, arguments, "bias", "initial_state") | documents(draw, B, T, seed)
    arguments["activation"] = draw(st.sampled_from([None, "silu"]))
    return arguments | {"return_final_state": draw(st.booleans())}


@st.composite
def selective_scan(draw: DrawFn, longest: int) -> Arguments:
    B, T, E = draw(st.integers(1, 2)), draw(widths(longest)), draw(widths(40))
    N, seed = draw(st.sampled_from([1, 3, 4, 8, 16, 32])), draw(SEEDS)
    arguments = _scan(seeded(seed), (B, T), (B,), E, N)
    arguments["initial_state"] = seeded(seed + 1)(B, E, N)
    arguments = some_of(draw, arguments, "D", "z", "delta_bias", "initial_state") | documents(draw, B, T, seed)
    return _with_softplus(draw, arguments, "delta", "delta_bias") | {"return_final_state": draw(st.booleans())}


@st.composite
def selective_scan_step(draw: DrawFn, longest: int) -> Arguments:
    B, E, N = draw(st.integers(1, 3)), draw(widths(longest)), draw(st.sampled_from([1, 3, 4, 8, 16, 32]))
    normal = seeded(draw(SEEDS))
    arguments = {"state": normal(B, E, N), **_scan(normal, (B,), (B,), E, N)}
    return _with_softplus(draw, some_of(draw, arguments, "D", "z", "delta_bias"), "delta", "delta_bias")


def _scan(normal: Callable[..., Tensor], tokens: tuple[int, ...], batch: tuple[int, ...], E: int, N: int) -> Arguments:
    return {
        "u": normal(*tokens, E),
        "delta": normal(*tokens, E),
        "A": -normal(E, N).exp(),
        "B": normal(*tokens, N),
        "C": normal(*tokens, N),
        "D": normal(E),
        "z": normal(*tokens, E),
        "delta_bias": normal(E),
    }


def _with_softplus(draw: DrawFn, arguments: Arguments, step: str, bias: str) -> Arguments:
    """Through softplus, or with steps that are positive by themselves: a negative one lets the state grow."""
    if draw(st.booleans()):
        return arguments | {f"{step}_softplus": True}
    return arguments | {name: arguments[name].abs() for name in (step, bias) if name in arguments}


@st.composite
def ssd_scan(draw: DrawFn, longest: int) -> Arguments:
    B, T, G, P = draw(st.integers(1, 2)), draw(widths(longest)), draw(st.integers(1, 2)), draw(widths(20))
    H, N, seed = G * draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 16, 33])), draw(SEEDS)
    normal = seeded(seed)
    arguments = {
        "x": normal(B, T, H, P),
        "dt": normal(B, T, H),
        "A": -normal(H).exp(),
        "B": normal(B, T, G, N),
        "C": normal(B, T, G, N),
        "D": normal(H),
        "z": normal(B, T, H, P),
        "dt_bias": normal(H),
        "initial_state": normal(B, H, P, N),
    }
    arguments = some_of(draw, arguments, "D", "z", "dt_bias", "initial_state") | documents(draw, B, T, seed)
    return _with_softplus(draw, arguments, "dt", "dt_bias") | {"return_final_state": draw(st.booleans())}


@st.composite
def flash_attention(draw: DrawFn, longest: int) -> Arguments:
    B, G, K, seed = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(widths(40)), draw(SEEDS)
    S, H = draw(widths(longest)), G * draw(st.integers(1, 3))
    T = draw(st.sampled_from([S, 1]) | widths(longest))
    normal = seeded(seed)
    arguments = {"q": normal(B, T, H, K), "k": normal(B, S, G, K), "v": normal(B, S, G, K)}
    arguments |= {"causal": draw(st.booleans()), "window": draw(st.none() | st.integers(1, longest))}
    if T <= S:
        arguments |= documents(draw, B, S, seed)
    if draw(st.booleans()):
        arguments["key_padding_mask"] = torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) > 0.3
    extra = {"alibi_slopes": normal(H).abs(), "sinks": normal(H), "softcap": 1.5, "scale": 0.5}
    # Most draws have none of these, which only some backends take.
    return arguments | (some_of(draw, extra, *extra) if draw(st.integers(0, 2)) == 0 else {})


@st.composite
def quantize_4bit(draw: DrawFn, longest: int) -> Arguments:
    # Half of the draws have rows of whole blocks, which some kernels ask for.
    inputs = draw(widths(100) | st.sampled_from([128, 256]))
    shape, normal = (draw(widths(longest)), inputs), seeded(draw(SEEDS))
    return {
        "weight": normal(*shape),
        "quant_type": draw(st.sampled_from(["nf4", "fp4"])),
        "block_size": draw(st.sampled_from([32, 64, 128])),
        "double_quant": draw(st.booleans()),
    }


@st.composite
def dequantize_4bit(draw: DrawFn, longest: int) -> Arguments:
    return {"quantized": F.quantize_4bit(**draw(quantize_4bit(longest)), backend="reference")}


@st.composite
def linear_4bit(draw: DrawFn, longest: int) -> Arguments:
    quantized, normal = draw(dequantize_4bit(longest))["quantized"], seeded(draw(SEEDS))
    arguments = {"x": normal(draw(widths(40)), quantized.shape[1]), "bias": normal(quantized.shape[0])}
    return some_of(draw, arguments, "bias") | {"quantized": quantized}


@st.composite
def quantize_int4(draw: DrawFn, longest: int) -> Arguments:
    inputs, normal = draw(widths(100) | st.sampled_from([128, 256, 300])), seeded(draw(SEEDS))
    # As large as a layer's, and not around zero.
    weight = (normal(draw(widths(longest)), inputs) + draw(st.sampled_from([0, 0.5]))) / inputs**0.5
    return {"weight": weight, "block_size": draw(st.sampled_from([16, 32, 64, 256]))}


@st.composite
def dequantize_int4(draw: DrawFn, longest: int) -> Arguments:
    return {"quantized": F.quantize_int4(**draw(quantize_int4(longest)), backend="torch")}


@st.composite
def linear_int4(draw: DrawFn, longest: int) -> Arguments:
    quantized, normal = draw(dequantize_int4(min(longest, 30)))["quantized"], seeded(draw(SEEDS))
    x = normal(draw(st.integers(1, 5) | widths(40)), quantized.shape[1])
    return some_of(draw, {"x": x, "bias": normal(quantized.shape[0])}, "bias") | {"quantized": quantized}


@st.composite
def linear_int8(draw: DrawFn, longest: int) -> Arguments:
    outputs, inputs, seed = draw(widths(longest)), draw(widths(300)), draw(SEEDS)
    normal, generator = seeded(seed), torch.Generator().manual_seed(seed)
    arguments: Arguments = {
        "x": normal(draw(widths(40)), inputs),
        "weight": torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8, generator=generator),
        "scale": normal(outputs).abs() / 128 / inputs**0.5,
        "bias": normal(outputs),
    }
    if draw(st.booleans()):
        zero_point = torch.tensor(draw(st.sampled_from([0, 100, 128, 255])), dtype=torch.int32)
        arguments |= {"input_scale": torch.tensor(0.02, dtype=torch.float64), "input_zero_point": zero_point}
    return some_of(draw, arguments, "bias")


@st.composite
def linear_cross_entropy(draw: DrawFn, longest: int) -> Arguments:
    rows, D, V, seed = draw(widths(longest)), draw(widths(40)), draw(widths(100)), draw(SEEDS)
    normal, generator = seeded(seed), torch.Generator().manual_seed(seed)
    target = torch.randint(V, (rows,), generator=generator)
    ignored = torch.rand(rows, generator=generator) < draw(st.sampled_from([0, 0.3]))
    target[1:] = target[1:].masked_fill(ignored[1:], -100)
    return {
        "hidden": normal(rows, D),
        "weight": normal(V, D) / D**0.5,
        "target": target,
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "chunk_size": draw(st.none() | st.integers(1, rows)),
    }


@st.composite
def linear(draw: DrawFn, longest: int) -> Arguments:
    rows, inputs, outputs, normal = draw(widths(longest)), draw(widths(130)), draw(widths(70)), seeded(draw(SEEDS))
    arguments = {"x": normal(rows, inputs), "weight": normal(outputs, inputs) / inputs**0.5}
    return {**arguments, "bias": normal(outputs)} if draw(st.booleans()) else arguments


@st.composite
def linear_kl_div(draw: DrawFn, longest: int) -> Arguments:
    rows, V, seed = draw(widths(longest)), draw(widths(100)), draw(SEEDS)
    student, teacher, normal = draw(widths(40)), draw(widths(40)), seeded(seed)
    arguments = {
        "student_hidden": normal(rows, student),
        "student_weight": normal(V, student) / student**0.5,
        "teacher_hidden": normal(rows, teacher),
        "teacher_weight": normal(V, teacher) / teacher**0.5,
        "temperature": draw(st.sampled_from([1.0, 2.0, 6.0])),
        "chunk_size": draw(st.none() | st.integers(1, rows)),
    }
    if draw(st.booleans()):
        mask = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) > 0.3
        mask[0] = True
        arguments["mask"] = mask
    return arguments


def _without_factor(loss: Tensor, arguments: Arguments) -> tuple[Tensor, ...]:
    """T² · KL without its T²: the errors are those of the sum, which is small beside 1 where T is large."""
    return (loss / arguments["temperature"] ** 2,)


def _bits(quantized: Quantized4bit, arguments: Arguments) -> tuple[Tensor, ...]:
    """Codes and scales: two implementations give the same, or one is wrong."""
    tensors = (quantized.packed, quantized.absmax, quantized.offset, quantized.nested_absmax)
    return tuple(tensor.double() for tensor in tensors if tensor is not None)


def _int4_bits(quantized: QuantizedInt4, arguments: Arguments) -> tuple[Tensor, ...]:
    """The same of the affine record."""
    return tuple(tensor.double() for tensor in (quantized.packed, quantized.scale, quantized.zero_point))


CASES: dict[str, OpCases] = {
    "rms_norm": OpCases(rms_norm),
    "swiglu": OpCases(swiglu),
    "geglu": OpCases(geglu),
    "apply_rotary": OpCases(apply_rotary),
    "flash_attention": OpCases(flash_attention),
    "causal_conv1d": OpCases(causal_conv1d),
    "selective_scan": OpCases(selective_scan),
    "selective_scan_step": OpCases(selective_scan_step),
    "ssd_scan": OpCases(ssd_scan),
    "linear": OpCases(linear),
    "quantize_4bit": OpCases(quantize_4bit, _bits),
    "dequantize_4bit": OpCases(dequantize_4bit),
    "linear_4bit": OpCases(linear_4bit),
    "quantize_int4": OpCases(quantize_int4, _int4_bits),
    "dequantize_int4": OpCases(dequantize_int4),
    "linear_int4": OpCases(linear_int4),
    "linear_int8": OpCases(linear_int8),
    "linear_cross_entropy": OpCases(linear_cross_entropy),
    "linear_kl_div": OpCases(linear_kl_div, _without_factor),
}
