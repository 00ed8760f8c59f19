"""The gradients of the Mamba-2 scan, span by span from the last to the first.

With G_t the gradient of h_t C_t + D x_t, g that of the state after the span, v = Δ x, and the letters of pytorch.py:

    dv_s = Σ_{t ≥ s} e^{s_t − s_s} (C_t·B_s) G_t + e^{s_end − s_s} g B_s          dx = Δ dv + D G
    dC_t = Σ_{s ≤ t} k_ts B_s + Σ_heads e^{s_t} G_t·h      with k_ts = Σ_heads e^{s_t − s_s} G_t·v_s
    dB_s = Σ_{t ≥ s} k_ts C_t + Σ_heads e^{s_end − s_s} v_s·g
    dh   = e^{s_end} g + Σ_t e^{s_t} G_t C_tᵀ

The gradient of Δ_t A is all that flows past the border before token t: from earlier tokens and from h to this token and
later ones, and from h and earlier tokens to the state after the span.

Dimension letters are those of chunks.py.
"""

import torch
from torch import Tensor

from neural_layers.kernels.ssd_scan.chunks import Chunk, Scan, Span, by_group, by_token


class Backward:
    """The gradients in the making, and the carry: what the later spans say about the state after this one."""

    def __init__(self, scan: Scan, grad_y: Tensor, grad_final_state: Tensor | None) -> None:
        self.scan, self.grad_y_BGTRP, self.carry_BHPN = scan, scan.split(grad_y), scan.new_state(grad_final_state)
        self.x, self.B, self.C = (given.new_empty(given.shape) for given in (scan.x, scan.B, scan.C))
        self.z = None if scan.z is None else scan.z.new_empty(scan.z.shape)
        # The gradients of Δ by way of v, of Δ A, and each token's part of that of D.
        self.delta_BGRT, self.flow_BGRT, self.D_BGRT = (torch.empty_like(scan.delta_BGRT) for _ in range(3))

    def results(self) -> list[Tensor]:
        """The gradients of the float arguments that were given, in the order of the public function."""
        scan, over_tokens = self.scan, (0, 3)
        dt_BGRT = torch.addcmul(self.delta_BGRT, self.flow_BGRT, scan.A_GR1)
        if scan.dt_softplus:
            dt_BGRT *= torch.sigmoid(scan.raw_BGRT)
        gradients = [
            (scan.x, self.x),
            (scan.dt, dt_BGRT.flatten(1, 2).mT),
            (scan.A, (self.flow_BGRT * scan.delta_BGRT).sum(over_tokens).flatten()),
            (scan.B, self.B),
            (scan.C, self.C),
            (scan.D, self.D_BGRT.sum(over_tokens).flatten()),
            (scan.z, self.z),
            (scan.dt_bias, dt_BGRT.sum(over_tokens).flatten()),
            (scan.initial_state, self.carry_BHPN),
        ]
        pairs = [(given, grad) for given, grad in gradients if given is not None and grad is not None]
        return [grad.to(given.dtype).contiguous() for given, grad in pairs]

    def run(self, span: Span, state_BHPN: Tensor) -> None:
        """Add the part of a span, given the state before it."""
        scan, rows, time = self.scan, span.rows, span.time
        chunk, carry_BHPN = scan.load(span), self.carry_BHPN[rows]
        grad_BGCRP = self.grad_y_BGTRP[rows, :, time].to(scan.dtype)
        read_BGCRP = chunk.through_state("read", chunk.C_BGCN, state_BHPN)
        if self.z is not None:
            grad_BGCRP = self._through_gate(chunk, span, grad_BGCRP, read_BGCRP)
        grad_drive_BGRCP, *within = self._within(chunk, grad_BGCRP)
        # Whatever is not finite in the span or in its gradient is in the gradients of B and C.
        if span.length > 1 and not (within[1].sum() + within[2].sum()).isfinite():
            self._run_by_token(span, state_BHPN)
            return
        across_BGCRP, *across = self._across(chunk, grad_BGCRP, read_BGCRP, state_BHPN, carry_BHPN)
        if span.begins:
            # A fill, not a product with 0: this document may have NaN or inf to say.
            carry_BHPN.zero_()
        flow_BGRC, *grads_BGCN = (a.add_(b) for a, b in zip(within, across, strict=True))
        for grad, part_BGCN in zip((self.B, self.C), grads_BGCN, strict=True):
            grad[rows, time] = part_BGCN.transpose(1, 2)
        self.flow_BGRT[rows, :, :, time] = flow_BGRC
        grad_drive_BGCRP, out = grad_drive_BGRCP.transpose(2, 3), scan.work("grad_drive", *grad_BGCRP.shape)
        torch.addcmul(grad_drive_BGCRP, across_BGCRP, by_token(chunk.to_end_BGRC), out=out)
        self._store(chunk, span, grad_BGCRP, out)

    def _run_by_token(self, span: Span, state_BHPN: Tensor) -> None:
        """The span token by token, so that NaN and inf reach no token that does not depend on them."""
        tokens, states = span.tokens(), [state_BHPN]
        for token in tokens[:-1]:
            states.append(torch.empty_like(state_BHPN))
            self.scan.load(token).advance(states[-2], states[-1])
        for token, before_BHPN in reversed(list(zip(tokens, states, strict=True))):
            self.run(token, before_BHPN)

    def _through_gate(self, chunk: Chunk, span: Span, grad_BGCRP: Tensor, read_BGCRP: Tensor) -> Tensor:
        """The gradient of h_t C_t + D x_t, and that of z on the way."""
        scan, rows, time = self.scan, span.rows, span.time
        if self.z is None or scan.z_BGTRP is None:
            return grad_BGCRP
        z_BGCRP = scan.z_BGTRP[rows, :, time].to(scan.dtype)
        sigmoid_BGCRP = torch.sigmoid(z_BGCRP)
        slope_BGCRP = sigmoid_BGCRP * (1 + z_BGCRP * (1 - sigmoid_BGCRP))
        y_BGCRP = scan.ungated(chunk, chunk.within(), read_BGCRP)
        scan.split(self.z)[rows, :, time] = grad_BGCRP * y_BGCRP * slope_BGCRP
        return grad_BGCRP * (z_BGCRP * sigmoid_BGCRP)

    def _within(self, chunk: Chunk, grad_BGCRP: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of v, Δ A, B and C by what the tokens of the span say to one another."""
        work, grad_BGRCP = self.scan.work, grad_BGCRP.transpose(2, 3)
        products_BGRCC = work.times("products", grad_BGRCP, chunk.drive_BGCRP.transpose(2, 3).mT)
        grad_scores_BGCC = products_BGRCC.mul_(chunk.decay_BGRCC).sum(dim=2).tril_()
        # The flow from s to t. Past the border before token b flows Σ_{t ≥ b > s}, which is Σ_{t ≥ b} less Σ_{s ≥ b};
        # in float64, because what begins at b or later stands in both.
        products_BGRCC *= chunk.scores_BGCC.unsqueeze(2)
        flow_BGRCC = work("float64", *products_BGRCC.shape, dtype=torch.float64).copy_(products_BGRCC)
        return (
            work.times("within", chunk.weights_BGRCC.mT, grad_BGRCP),
            _from_here_on(flow_BGRCC.sum(dim=-1) - flow_BGRCC.sum(dim=-2)),
            grad_scores_BGCC.mT @ chunk.C_BGCN,
            grad_scores_BGCC @ chunk.B_BGCN,
        )

    def _across(
        self, chunk: Chunk, grad_BGCRP: Tensor, read_BGCRP: Tensor, state_BHPN: Tensor, carry_BHPN: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same by what the states before and after the span say, that of v without e^{s_end − s_s}; and the
        gradient of the state before in place of that of the state after."""
        work, groups = self.scan.work, self.scan.groups
        grad_drive_BGCRP = chunk.through_state("across", chunk.B_BGCN, carry_BHPN)
        arriving_BGRC = work.dot(grad_BGCRP, read_BGCRP).mT * chunk.from_start_BGRC
        leaving_BGRC = work.dot(grad_drive_BGCRP, chunk.drive_BGCRP).mT * chunk.to_end_BGRC
        passing_BH = work.dot(carry_BHPN.flatten(2), state_BHPN.flatten(2))
        flow_BGRC = _from_here_on(arriving_BGRC) + leaving_BGRC.cumsum(dim=-1, dtype=torch.float64) - leaving_BGRC
        flow_BGRC += passing_BH.unflatten(1, (groups, -1)).unsqueeze(-1) * chunk.from_start_BGRC[..., -1:]

        grad_read_BGCRP = work("grad_read", *grad_BGCRP.shape)
        torch.mul(grad_BGCRP, by_token(chunk.from_start_BGRC), out=grad_read_BGCRP)
        grad_B_BGCN = chunk.driven_BGCRP.flatten(3) @ by_group(carry_BHPN, groups)
        grad_C_BGCN = grad_read_BGCRP.flatten(3) @ by_group(state_BHPN, groups)
        chunk.decay_and_add(carry_BHPN, carry_BHPN, grad_read_BGCRP, chunk.C_BGCN)
        return grad_drive_BGCRP, flow_BGRC, grad_B_BGCN, grad_C_BGCN

    def _store(self, chunk: Chunk, span: Span, grad_BGCRP: Tensor, grad_drive_BGCRP: Tensor) -> None:
        """The gradients of x, of Δ by way of v, and of D from those of h_t C_t + D x_t and v."""
        scan, rows, time = self.scan, span.rows, span.time
        self.delta_BGRT[rows, :, :, time] = scan.work.dot(grad_drive_BGCRP, chunk.x_BGCRP).mT
        grad_x_BGCRP = grad_drive_BGCRP.mul_(by_token(chunk.delta_BGRC))
        if scan.D_G1R1 is not None:
            self.D_BGRT[rows, :, :, time] = scan.work.dot(grad_BGCRP, chunk.x_BGCRP).mT
            grad_x_BGCRP.addcmul_(grad_BGCRP, scan.D_G1R1)
        scan.split(self.x)[rows, :, time] = grad_x_BGCRP


def _from_here_on(x_BGRC: Tensor) -> Tensor:
    """The sum over each token and the later ones, in float64."""
    return x_BGRC.flip(-1).cumsum(dim=-1, dtype=torch.float64).flip(-1)
