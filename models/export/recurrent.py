"""Mamba and Mamba-2 in a graph: one formulation for a prompt, for its continuation and for a single token.

Letters: B batch, T length, E channels of the recurrence, N state size, W convolution width, H heads of width P in G
groups of M, C tokens of a chunk, c chunks.
"""

import math

import numpy as np
from torch import nn

from neural_layers.mamba import Mamba
from neural_layers.mamba2 import GroupedRMSNorm, Mamba2
from neural_layers.models.export.attention import Shared, head_norm
from neural_layers.models.export.graph import END, Graph
from neural_layers.models.export.state import States
from neural_layers.models.export.weights import Weights, array

FLOAT = 1
CHUNK = 64  # tokens of a prompt that Mamba-2 multiplies with one another at a time


def silu(g: Graph, x: str) -> str:
    """x · sigmoid(x), of elementary nodes."""
    return g.op("Mul", x, g.op("Sigmoid", x))


def softplus(g: Graph, x: str) -> str:
    """max(x, 0) + log(1 + exp(−|x|)): six nodes take half the time of ONNX Runtime's Softplus, and are as exact."""
    tail = g.op("Exp", g.op("Neg", g.op("Abs", x)))
    return g.op("Add", g.op("Relu", x), g.op("Log", g.op("Add", tail, 1.0)))


def convolve(
    g: Graph, weights: Weights, conv: nn.Conv1d, x_BTE: str, kept_BT1: str, states: States, *, is_activated: bool = True
) -> str:
    """silu of the causal depthwise convolution, zero for padding; its state (B, E, W − 1) goes on."""
    width = conv.kernel_size[0]
    name = weights.name(conv)
    past = states.take("conv", (conv.in_channels, width - 1))
    x_BET = g.op("Transpose", g.op("Mul", x_BTE, kept_BT1), perm=[0, 2, 1])
    x_BEP = g.concat(past, x_BET, axis=2)
    states.give(g.tail(x_BEP, width - 1, 2))
    # With a dimension of height 1: ONNX Runtime is 12 times faster at depthwise Conv in two dimensions than in one.
    kernel = g.weight(f"{name}.weight", array(conv.weight)[:, :, None])
    bias = None if conv.bias is None else g.weight(f"{name}.bias", array(conv.bias))
    y = g.op("Conv", g.op("Unsqueeze", x_BEP, [2]), kernel, bias, group=conv.in_channels)
    y_BET = g.op("Squeeze", y, [2])
    y_BET = silu(g, y_BET) if is_activated else y_BET
    return g.op("Mul", g.op("Transpose", y_BET, perm=[0, 2, 1]), kept_BT1)


def mamba(g: Graph, weights: Weights, mixer: Mamba, x: str, shared: Shared, states: States) -> str:
    """A Mamba mixer; its state lies (B, N, E), so that the E channels, which are many, are neighbours in memory."""
    name, inner, n = weights.name(mixer), mixer.D.shape[0], mixer.state_dim
    u, z = weights.split(g, weights.linear(g, x, mixer.in_proj), [inner, inner])
    u = convolve(g, weights, mixer.conv1d, u, shared.kept(), states)
    dt, b_BTN, c_BTN = weights.split(g, weights.linear(g, u, mixer.x_proj), [mixer.dt_rank, n, n])
    delta = softplus(g, weights.linear(g, dt, mixer.dt_proj))
    a_NE = g.weight(f"{name}.A", -np.exp(array(mixer.A_log)).T)
    y = _scan(g, a_NE, delta, g.op("Mul", delta, u), b_BTN, c_BTN, states, (n, inner))
    y = g.op("Add", y, g.op("Mul", u, g.weight(f"{name}.D", array(mixer.D))))
    return weights.linear(g, g.op("Mul", y, silu(g, z)), mixer.out_proj)


def _scan(
    g: Graph, a_NE: str, delta: str, drive: str, b_BTN: str, c_BTN: str, states: States, shape: tuple[int, int]
) -> str:
    """h_t = exp(Δ_t A) h_{t−1} + B_t (Δ_t u_t);  y_t = C_t · h_t, a token at a time."""
    body = g.child()
    h = body.input(g.fresh("h"), FLOAT, None)
    delta_B1E, drive_B1E, b_BN1, c_B1N = (body.input(g.fresh(name), FLOAT, None) for name in ("dt", "dtu", "B", "C"))
    decay = body.op("Exp", body.op("Mul", delta_B1E, a_NE))
    h_BNE = body.op("Add", body.op("Mul", decay, h), body.op("Mul", b_BN1, drive_B1E))
    y_B1E = body.op("MatMul", c_B1N, h_BNE)
    body.output(h_BNE, g.fresh("state"), FLOAT, None)
    body.output(y_B1E, g.fresh("y"), FLOAT, None)
    past = states.take("mamba", shape)
    # Given their dimension of 1 here, all tokens at once: a node in the body runs for each token.
    delta, drive, c_BT1N = (g.op("Unsqueeze", value, [2]) for value in (delta, drive, c_BTN))
    last, y = g.ops(
        "Scan", past, delta, drive, g.op("Unsqueeze", b_BTN, [3]), c_BT1N,
        count=2, body=body.proto("token"), num_scan_inputs=4, scan_input_axes=[1] * 4, scan_output_axes=[1],
    )  # fmt: skip
    states.give(last)
    return g.op("Squeeze", y, [2])


def mamba2(g: Graph, weights: Weights, mixer: Mamba2, x: str, shared: Shared, states: States) -> str:
    """A Mamba-2 mixer, in chunks of min(T, 64) tokens; its state lies (B, G, M, N, P)."""
    name, groups, p, n = weights.name(mixer), mixer.num_groups, mixer.head_dim, mixer.state_dim
    inner, _, bn, _, heads = mixer.widths
    z, inputs, dt = weights.split(g, weights.linear(g, x, mixer.in_proj), [inner, inner + 2 * bn, heads])
    is_activated = mixer.activation is not None
    inputs = convolve(g, weights, mixer.conv1d, inputs, shared.kept(), states, is_activated=is_activated)
    u, b, c = weights.split(g, inputs, [inner, bn, bn])
    b, c = head_norm(g, weights, mixer.B_norm, b, bn, n), head_norm(g, weights, mixer.C_norm, c, bn, n)
    if mixer.rotary is not None:
        cos, sin = shared.rotary(mixer.rotary)
        b, c = (g.op("RotaryEmbedding", part, cos, sin, num_heads=groups) for part in (b, c))
    dt = softplus(g, g.op("Add", dt, g.weight(f"{name}.dt_bias", array(mixer.dt_bias))))
    if mixer.step_limit != (0.0, math.inf):
        dt = g.op("Clip", dt, *(float(bound) for bound in mixer.step_limit))
    u_BTHP = g.op("Reshape", u, [0, 0, heads, p])
    drive = g.op("Mul", u_BTHP, g.op("Unsqueeze", dt, [3]))
    log_decay = g.op("Mul", dt, g.weight(f"{name}.A", -np.exp(array(mixer.A_log))))
    y_BTE = _Chunks(g, x, groups, heads // groups, n, p).scan(log_decay, drive, b, c, states)
    skip = g.op("Mul", u_BTHP, g.weight(f"{name}.D", array(mixer.D)[:, None]))
    y_BTE = g.op("Mul", g.op("Add", y_BTE, g.op("Reshape", skip, [0, 0, inner])), silu(g, z))
    return weights.linear(g, _group_norm(g, weights, mixer.norm, y_BTE, groups, inner), mixer.out_proj)


def _group_norm(g: Graph, weights: Weights, norm: nn.Module, y_BTE: str, groups: int, inner: int) -> str:
    if not isinstance(norm, GroupedRMSNorm):
        return y_BTE
    weight = g.weight(f"{weights.name(norm)}.weight", array(norm.weight))
    if groups == 1:
        return g.op("RMSNormalization", y_BTE, weight, axis=-1, epsilon=norm.eps)
    parts, ones = g.op("Reshape", y_BTE, [0, 0, groups, -1]), np.ones(inner // groups, np.float32)
    parts = g.op("RMSNormalization", parts, ones, axis=-1, epsilon=norm.eps)
    return g.op("Mul", g.op("Reshape", parts, [0, 0, inner]), weight)


class _Chunks:
    """The scan of Mamba-2 by chunks: attention-like products within one, a state from one to the next.

    The last chunk is filled up with tokens of decay 1 that add nothing: they leave the state alone. A single token is
    a chunk of one.
    """

    def __init__(self, g: Graph, x_BTD: str, groups: int, per_group: int, n: int, p: int) -> None:
        self.g, self.groups, self.per_group, self.n, self.p = g, groups, per_group, n, p
        self.length = g.dim(x_BTD, 1)
        self.chunk = g.op("Min", self.length, [CHUNK])
        above = g.op("Sub", g.op("Add", self.length, self.chunk), [1])
        self.count = g.op("Div", above, self.chunk)
        self.fill = g.op("Sub", g.op("Mul", self.count, self.chunk), self.length)
        ones = g.op("Expand", np.ones((1, 1), np.float32), g.concat(self.chunk, self.chunk))
        # 0 where the column is not after the row, −1e30 where it is: exp makes it 1 and 0.
        self.future = g.op("Mul", g.op("Sub", ones, g.op("Trilu", ones, upper=0)), -1e30)

    def scan(self, log_decay_BTH: str, drive_BTHP: str, b_BTE: str, c_BTE: str, states: States) -> str:
        g, groups, m, n, p = self.g, self.groups, self.per_group, self.n, self.p
        # Chunks first, then heads, then the tokens of a chunk, so that the products run over the last two.
        log_decay = self._cut(log_decay_BTH, 3, [groups, m, 1], [0, 1, 3, 4, 2, 5])
        drive = self._cut(drive_BTHP, 4, [groups, m, p], [0, 1, 3, 4, 2, 5])
        b = self._cut(b_BTE, 3, [groups, 1, n], [0, 1, 3, 4, 2, 5])
        c = self._cut(c_BTE, 3, [groups, 1, n], [0, 1, 3, 4, 2, 5])
        past = states.take("mamba2", (groups, m, n, p))
        last, y = g.ops(
            "Scan", past, log_decay, drive, b, c,
            count=2, body=self._body().proto("chunk"), num_scan_inputs=4, scan_input_axes=[1] * 4,
            scan_output_axes=[1],
        )  # fmt: skip
        states.give(last)
        y = g.op("Transpose", y, perm=[0, 1, 4, 2, 3, 5])
        y_BTE = g.op("Reshape", y, g.concat(g.dim(drive_BTHP, 0), [-1, groups * m * p]))
        return g.op("Slice", y_BTE, [0], self.length, [1])

    def _cut(self, value: str, rank: int, last: list[int], order: list[int]) -> str:
        """(B, T, …) → (B, c, G, M, C, …), filled up with zeros."""
        g = self.g
        pads = g.concat([0], [0] * (rank - 1), [0], self.fill, [0] * (rank - 2))
        filled = g.op("Pad", value, pads)
        shape = g.concat(g.dim(value, 0), self.count, self.chunk, last)
        return g.op("Transpose", g.op("Reshape", filled, shape), perm=order)

    def _body(self) -> Graph:
        g = self.g.child()
        h = g.input(self.g.fresh("h"), FLOAT, None)
        log_decay, drive, b, c = (g.input(self.g.fresh(name), FLOAT, None) for name in ("decay", "drive", "B", "C"))
        total = g.op("CumSum", log_decay, np.array(3))  # (B, G, M, C, 1): the decay up to each token, its own included
        end = g.op("Slice", total, [-1], [END], [3])
        between = g.op("Sub", total, g.op("Transpose", total, perm=[0, 1, 2, 4, 3]))
        reach = g.op("Exp", g.op("Add", between, self.future))
        score = g.op("Mul", g.op("MatMul", c, g.op("Transpose", b, perm=[0, 1, 2, 4, 3])), reach)
        within = g.op("MatMul", score, drive)
        before = g.op("Mul", g.op("MatMul", c, h), g.op("Exp", total))
        left = g.op("Mul", drive, g.op("Exp", g.op("Sub", end, total)))
        added = g.op("MatMul", g.op("Transpose", b, perm=[0, 1, 2, 4, 3]), left)
        g.output(g.op("Add", g.op("Mul", h, g.op("Exp", end)), added), self.g.fresh("state"), FLOAT, None)
        g.output(g.op("Add", within, before), self.g.fresh("y"), FLOAT, None)
        return g
