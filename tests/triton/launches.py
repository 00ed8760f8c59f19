"""The launches that are compiled ahead of time: each op's main configurations, on meta tensors.

An op enters itself with a generator of `Launch`es in `OPS`. A launch calls the host functions of the op with tensors
that have shapes, strides and dtypes and no memory, so that it runs as it would on a GPU with any size. Mark the one or
two launches of an op that matter most as `quick`: `make test` compiles those for one target, all of them in 15 seconds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neural_layers.kernels.four_bit import Quantized4bit

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Launch:
    """One call of host functions: op and name tell it apart, run makes it."""

    op: str
    name: str
    run: Callable[[], Any]
    quick: bool = False

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _rms_norm() -> Iterator[Launch]:
    from neural_layers.kernels.rms_norm.triton_backward import backward
    from neural_layers.kernels.rms_norm.triton_forward import forward

    def run(x: Tensor, weight: Tensor) -> None:
        y, scale = forward(x, weight, 1e-6)
        backward(y, x, weight, scale)

    sizes = [("bf16", rows, width) for rows, width in ((131072, 128), (16384, 1024), (4096, 4096), (4096, 8192))]
    sizes += [("bf16", 1024, 16384), ("bf16", 512, 65536), ("fp16", 4096, 4096), ("fp32", 4096, 4096)]
    sizes += [("fp32", 4096, 8192), ("fp32", 1024, 16384), ("fp64", 4096, 1024), ("fp64", 1024, 4096)]
    for name, rows, width in sizes:
        x, weight = meta(rows, width, dtype=DTYPES[name]), meta(width, dtype=DTYPES[name])
        quick = (name, width) == ("bf16", 4096)
        yield Launch("rms_norm", f"{name} {rows}×{width}", lambda x=x, weight=weight: run(x, weight), quick)


def _gate(op: str, activations: tuple[str, ...]) -> Iterator[Launch]:
    from neural_layers.kernels.swiglu.triton_gate import gate_backward, gate_forward

    def run(gate: Tensor, up: Tensor, activation: str) -> None:
        gate_backward(gate_forward(gate, up, activation), gate, up, activation)

    for activation in activations:
        for name, dtype in DTYPES.items():
            gate, up = meta(4096, 11008, dtype=dtype), meta(4096, 11008, dtype=dtype)
            yield Launch(op, f"{activation} {name} 4096×11008", lambda g=gate, u=up, a=activation: run(g, u, a))
        fused = meta(4096, 2 * 11008, dtype=torch.bfloat16).chunk(2, dim=-1)
        yield Launch(
            op,
            f"{activation} bf16 halves of 4096×22016",
            lambda f=fused, a=activation: run(*f, a),
            activation != "gelu_erf",
        )


def _apply_rotary() -> Iterator[Launch]:
    from neural_layers.kernels.rotary.triton_kernels import angle_gradients, rotate

    def run(x: Tensor, cos: Tensor, sin: Tensor) -> None:
        angle_gradients(rotate(x, cos, sin, False), x, cos, sin, True)

    for name, heads, width in (("bf16", 32, 128), ("bf16", 8, 128), ("bf16", 12, 64), ("fp16", 32, 128),
                               ("fp32", 32, 128), ("fp64", 8, 64)):  # fmt: skip
        angles = meta(4096, width // 2, dtype=torch.float64 if name == "fp64" else torch.float32)
        x = meta(4, 4096, heads, width, dtype=DTYPES[name])
        quick = (name, heads) == ("bf16", 32)
        yield Launch("apply_rotary", f"{name} 4×4096×{heads}×{width}", lambda x=x, a=angles: run(x, a, a), quick)
    q = meta(4, 4096, 3 * 32, 128, dtype=torch.bfloat16)[:, :, :32].requires_grad_()
    rows = meta(4, 4096, 64, dtype=torch.bfloat16)
    yield Launch("apply_rotary", "bf16 q of a fused q, k, v, angles by row", lambda: run(q, rows, rows))


def _causal_conv1d() -> Iterator[Launch]:
    from neural_layers.kernels.causal_conv1d.triton_backward import backward
    from neural_layers.kernels.causal_conv1d.triton_forward import forward

    def run(x: Tensor, taps: int, documents: bool, state: bool) -> None:
        batch, length, width = x.shape
        weight, bias = meta(width, taps, dtype=x.dtype), meta(width, dtype=x.dtype)
        seq_idx = meta(batch, length, dtype=torch.int32) if documents else None
        initial_state = meta(batch, taps - 1, width, dtype=x.dtype) if state else None
        y, final = forward(x, weight, bias, initial_state, seq_idx, "silu", state)
        backward(y, final if state else None, x, weight, bias, initial_state, seq_idx, "silu")

    for name, batch, length, width, taps, documents, state in (
        ("bf16", 8, 2048, 4096, 4, False, False),
        ("bf16", 8, 2048, 4096, 4, True, True),
        ("bf16", 1, 1024, 1536, 3, False, True),
        ("bf16", 8, 2048, 4096, 7, False, False),
        ("bf16", 2, 2048, 4096, 8, True, True),
        ("bf16", 64, 1, 4096, 4, False, True),
        ("fp16", 8, 2048, 4096, 4, False, False),
        ("fp32", 8, 2048, 4096, 4, True, True),
        ("fp64", 2, 512, 1024, 4, True, True),
    ):
        x = meta(batch, length, width, dtype=DTYPES[name])
        with_options = " with documents" * documents + " with states" * state
        yield Launch(
            "causal_conv1d",
            f"{name} {batch}×{length}×{width}, {taps} taps{with_options}",
            lambda x=x, taps=taps, documents=documents, state=state: run(x, taps, documents, state),
            quick=(name, length, taps, state) == ("bf16", 2048, 4, False),
        )


def _selective_scan() -> Iterator[Launch]:
    from neural_layers.kernels.selective_scan.triton_backward import backward
    from neural_layers.kernels.selective_scan.triton_forward import forward

    def run(u: Tensor, states: int, bare: bool, documents: bool, train: bool) -> None:
        batch, length, width = u.shape
        A, D = meta(width, states, dtype=torch.float32), meta(width, dtype=torch.float32)
        B = C = meta(batch, length, states, dtype=u.dtype)
        state = meta(batch, width, states, dtype=torch.float32)
        seq_idx = meta(batch, length, dtype=torch.int32) if documents else None
        optional = (None, None, None, None) if bare else (D, u, D, state if documents else None)
        inputs = (u, u, A, B, C, *optional, seq_idx, True)
        y, final, borders = forward(*inputs, train)
        if train:
            backward(y, final if documents else None, borders, *inputs)

    for name, batch, length, width, states, bare, documents, train in (
        ("bf16", 1, 8192, 4096, 16, False, False, False),
        ("bf16", 1, 8192, 4096, 16, False, False, True),
        ("bf16", 8, 2048, 4096, 16, False, True, True),
        ("bf16", 1, 8192, 1536, 16, False, True, True),
        ("bf16", 4, 2048, 1536, 1, False, False, True),
        ("bf16", 4, 2048, 1536, 64, False, False, True),
        ("bf16", 2, 2048, 1536, 256, False, True, True),
        ("bf16", 8, 2048, 4096, 24, True, False, True),
        ("fp16", 8, 2048, 4096, 16, False, False, True),
        ("fp32", 8, 2048, 4096, 16, False, True, True),
        ("fp64", 2, 512, 1024, 16, False, True, True),
    ):
        u = meta(batch, length, width, dtype=DTYPES[name])
        options = " bare" * bare + " with documents" * documents + " forward" * (not train)
        yield Launch(
            "selective_scan",
            f"{name} {batch}×{length}×{width}, {states} states{options}",
            lambda u=u, states=states, bare=bare, documents=documents, train=train: run(
                u, states, bare, documents, train
            ),
            quick=(name, length, states, train) == ("bf16", 8192, 16, True) and not documents,
        )


def _selective_scan_step() -> Iterator[Launch]:
    from neural_layers.kernels.selective_scan_step.triton_step import step

    for name, batch, width, states in (
        ("bf16", 1, 4096, 16),
        ("bf16", 64, 4096, 16),
        ("bf16", 64, 4096, 256),
        ("fp32", 64, 4096, 16),
        ("fp32", 8, 1536, 64),
        ("fp64", 8, 1536, 64),
        ("fp64", 8, 1536, 256),
    ):
        u, A = meta(batch, width, dtype=DTYPES[name]), meta(width, states, dtype=torch.float32)
        state, B = meta(batch, width, states, dtype=torch.float32), meta(batch, states, dtype=DTYPES[name])
        arguments = (state, u, u, A, B, B, A[:, 0], u, A[:, 0], True)
        yield Launch(
            "selective_scan_step",
            f"{name} {batch}×{width}, {states} states",
            lambda arguments=arguments: step(*arguments),
            quick=(name, batch) == ("bf16", 1),
        )


def _ssd_scan() -> Iterator[Launch]:
    from neural_layers.kernels.ssd_scan.triton_backward import backward
    from neural_layers.kernels.ssd_scan.triton_forward import forward

    def run(x: Tensor, groups: int, states: int, bare: bool, documents: bool, chunk: int) -> None:
        batch, length, heads, width = x.shape
        dt, A = meta(batch, length, heads, dtype=x.dtype), meta(heads, dtype=torch.float32)
        B = C = meta(batch, length, groups, states, dtype=x.dtype)
        state = meta(batch, heads, width, states, dtype=torch.float32) if documents else None
        seq_idx = meta(batch, length, dtype=torch.int32) if documents else None
        optional = (None, None, None) if bare else (A, x, A)
        inputs = (x, dt, A, B, C, *optional, state, seq_idx, True, chunk)
        y, final, kept = forward(*inputs, True)
        backward(y, final if documents else None, kept, *inputs)

    for name, batch, length, heads, width, groups, states, bare, documents, chunk in (
        ("bf16", 1, 8192, 64, 64, 1, 128, False, False, 64),
        ("bf16", 8, 2048, 24, 64, 1, 128, False, True, 64),
        ("bf16", 2, 2048, 32, 128, 8, 64, True, False, 64),
        ("bf16", 2, 2048, 24, 40, 2, 16, False, False, 32),
        ("fp16", 8, 2048, 24, 64, 1, 128, False, False, 64),
        ("fp32", 2, 2048, 24, 64, 1, 128, False, True, 64),
        ("fp64", 2, 512, 8, 64, 1, 64, False, False, 32),
    ):
        x = meta(batch, length, heads, width, dtype=DTYPES[name])
        rest = (groups, states, bare, documents, chunk)
        yield Launch(
            "ssd_scan",
            f"{name} {batch}×{length}×{heads}×{width}, {states} states{' bare' * bare}{' with documents' * documents}",
            lambda x=x, rest=rest: run(x, *rest),
            quick=(name, length) == ("bf16", 8192),
        )


def _flash_attention() -> Iterator[Launch]:
    from neural_layers.kernels.flash_attention.triton_backward import backward
    from neural_layers.kernels.flash_attention.triton_forward import forward

    def run(sizes: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any], train: bool) -> None:
        B, T, S, H, G, K = sizes
        q, k = meta(B, T, H, K, dtype=dtype), meta(B, S, G, K, dtype=dtype)
        slopes, sinks = (meta(H, dtype=torch.float32) if options.get(x) else None for x in ("alibi", "sinks"))
        mask = meta(B, S, dtype=torch.bool) if options.get("mask") else None
        seq_idx = meta(B, S, dtype=torch.int32) if options.get("packed") else None
        numbers = (None, options.get("causal", True), options.get("window"), K**-0.5, options.get("softcap"), 0.0, None)
        arguments = (q, k, k, slopes, sinks, mask, seq_idx, *numbers)
        out, lse = forward(*arguments)
        if train:
            backward(out, out, lse, *arguments, slopes is not None)

    long = (4, 4096, 4096, 32, 8, 128)
    for name, sizes, options in (
        ("bf16", long, {"window": 1024}),
        ("bf16", long, {"alibi": True}),
        ("bf16", long, {"packed": True}),
        ("bf16", long, {"softcap": 50.0}),
        ("bf16", long, {"sinks": True, "window": 128}),
        ("bf16", long, {"mask": True, "causal": False}),
        ("bf16", (4, 2048, 2048, 24, 24, 64), {"window": 1024}),
        ("bf16", (2, 2048, 2048, 8, 2, 256), {"softcap": 50.0, "window": 1024}),
        ("fp16", (4, 2048, 2048, 32, 8, 128), {"alibi": True, "sinks": True, "softcap": 30.0, "packed": True}),
        ("fp32", (4, 2048, 2048, 32, 8, 128), {"window": 1024}),
        ("fp32", (4, 2048, 2048, 24, 24, 64), {"alibi": True, "softcap": 30.0}),
        ("fp64", (1, 512, 512, 4, 4, 64), {"alibi": True, "sinks": True}),
        ("fp64", (1, 512, 512, 4, 4, 128), {"alibi": True, "window": 128}),
        ("fp32", (1, 512, 512, 4, 2, 256), {"alibi": True, "window": 128}),
    ):
        shape = "×".join(map(str, sizes))
        told = ", ".join(key if value is True else f"{key} {value}" for key, value in options.items())
        rest = (sizes, DTYPES[name], options, True)
        yield Launch("flash_attention", f"{name} {shape}, {told}", lambda rest=rest: run(*rest))
    rest = ((4, 2048, 2048, 24, 24, 64), torch.bfloat16, {"window": 1024}, False)
    yield Launch("flash_attention", "bf16 4×2048×24×64, window 1024 forward", lambda: run(*rest), quick=True)
    rest_of_step = ((8, 1, 4096, 32, 8, 128), torch.bfloat16, {"window": 1024}, False)
    yield Launch("flash_attention", "bf16 8×1×4096, decoding", lambda: run(*rest_of_step))


def _four_bit_weight(
    outputs: int, inputs: int, quant_type: str, double_quant: bool, dtype: torch.dtype
) -> Quantized4bit:
    blocks = outputs * inputs // 64
    packed, absmax = meta(outputs * inputs // 2, 1, dtype=torch.uint8), meta(blocks, dtype=torch.float32)
    shape = (outputs, inputs)
    if not double_quant:
        return Quantized4bit(packed, absmax, quant_type, 64, shape, dtype)
    offset, nested = meta(dtype=torch.float32), meta(-(-blocks // 256), dtype=torch.float32)
    return Quantized4bit(packed, absmax.to(torch.uint8), quant_type, 64, shape, dtype, offset, nested)


def _dequantize_4bit() -> Iterator[Launch]:
    from neural_layers.kernels.dequantize_4bit.triton_kernels import dequantize

    for name, dtype in DTYPES.items():
        for double_quant in (False, True):
            quantized = _four_bit_weight(4096, 11008, "nf4", double_quant, dtype)
            yield Launch(
                "dequantize_4bit",
                f"{name} 4096×11008{' double-quantized' * double_quant}",
                lambda q=quantized: dequantize(q),
                quick=name == "bf16" and double_quant,
            )


def _linear_4bit() -> Iterator[Launch]:
    from neural_layers.kernels.linear_4bit.triton_kernels import product

    def run(x: Tensor, quantized: Quantized4bit) -> None:
        bias = meta(quantized.shape[0], dtype=x.dtype)
        product(product(x, quantized, bias, False), quantized, None, True)

    cases = [
        (name, rows, outputs, inputs, "nf4", rows == 1)
        for name in ("bf16", "fp16", "fp32")
        for rows in (1, 16, 256)
        for outputs, inputs in ((4096, 4096), (4096, 11008))
    ]
    cases += [("bf16", 4, 11008, 4096, "fp4", True), ("bf16", 64, 11008, 4096, "fp4", True)]
    cases += [("bf16", 256, 1000, 1001, "nf4", False), ("bf16", 256, 1000, 1100, "nf4", True)]
    cases += [("fp64", rows, 1024, 1024, "nf4", True) for rows in (1, 64)]
    for name, rows, outputs, inputs, quant_type, double_quant in cases:
        quantized = _four_bit_weight(outputs, inputs, quant_type, double_quant, DTYPES[name])
        x = meta(rows, inputs, dtype=DTYPES[name])
        yield Launch(
            "linear_4bit",
            f"{name} {rows} rows, {quant_type} {outputs}×{inputs}",
            lambda x=x, q=quantized: run(x, q),
        )
    quantized = _four_bit_weight(4096, 4096, "nf4", True, torch.bfloat16)
    x = meta(1, 4096, dtype=torch.bfloat16)
    yield Launch("linear_4bit", "bf16 forward of 1 row", lambda: product(x, quantized, None, False), quick=True)


def _linear_kl_div() -> Iterator[Launch]:
    from neural_layers.kernels.linear_kl_div.triton_rows import forward_kl

    def run(logits: Tensor, *wants: bool) -> None:
        forward_kl([logits, logits], meta(len(logits), dtype=torch.int64), list(wants))

    # The logits of bfloat16 and float16 are float32.
    for name, tokens, vocabulary in (("fp32", 1024, 32000), ("fp32", 1024, 151936), ("fp64", 256, 4001)):
        logits = meta(tokens, vocabulary, dtype=DTYPES[name])
        size = f"{name} {tokens}×{vocabulary}"
        yield Launch("linear_kl_div", size, lambda x=logits: run(x, True, False), vocabulary == 32000)
        yield Launch("linear_kl_div", f"{size}, the teacher's gradient too", lambda x=logits: run(x, True, True))
        yield Launch("linear_kl_div", f"{size}, no gradient", lambda x=logits: run(x, False, False))


def _linear_cross_entropy() -> Iterator[Launch]:
    from neural_layers.kernels.linear_cross_entropy.triton_rows import cross_entropy

    for name, tokens, vocabulary in (("fp32", 1024, 32000), ("fp32", 1024, 151936), ("fp64", 256, 4001)):
        logits, target = meta(tokens, vocabulary, dtype=DTYPES[name]), meta(tokens, dtype=torch.int64)
        for smoothing in (0.0, 0.1):
            yield Launch(
                "linear_cross_entropy",
                f"{name} {tokens}×{vocabulary}{' smoothed' * bool(smoothing)}",
                lambda x=logits, target=target, smoothing=smoothing: cross_entropy(x, target, smoothing, True),
                quick=vocabulary == 32000 and not smoothing,
            )


def faulty_launches() -> Iterator[Launch]:
    """Launches that must be found faulty; they are no part of `all_launches`."""
    from tests.triton import faulty_kernels as kernels

    x, out = meta(256, 256, dtype=torch.float32), meta(256, 256, dtype=torch.float32)
    integers = meta(256, dtype=torch.int32)
    yield Launch("faulty", "spills", lambda: kernels.outer_products[(1,)](x, out, 64, num_warps=1))
    yield Launch("faulty", "no sum of a pointer", lambda: kernels.sum_of_a_pointer[(1,)](integers, out, 128))


OPS: tuple[Callable[[], Iterator[Launch]], ...] = (
    _rms_norm,
    lambda: _gate("swiglu", ("silu",)),
    lambda: _gate("geglu", ("gelu_tanh", "gelu_erf")),
    _apply_rotary,
    _causal_conv1d,
    _selective_scan,
    _selective_scan_step,
    _ssd_scan,
    _flash_attention,
    _dequantize_4bit,
    _linear_4bit,
    _linear_kl_div,
    _linear_cross_entropy,
)


def all_launches() -> list[Launch]:
    """Every launch of every op; imports triton and the kernels."""
    return [launch for op in OPS for launch in op()]
