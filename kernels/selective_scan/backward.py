"""The gradients of the selective scan, chunk by chunk from the last to the first.

With g_t the gradient of h_t and G_t the gradient of C_t·h_t + D u_t:

    g_t = C_t G_t + exp(Δ_{t+1} A) g_{t+1}                     dC_t = Σ_E G_t h_t      dB_t = Σ_E g_t Δ_t u_t
    dΔ_t = Σ_N g_t exp(Δ_t A) h_{t−1} A + u_t Σ_N g_t B_t      dA = Σ_t g_t exp(Δ_t A) h_{t−1} Δ_t
    du_t = Δ_t Σ_N g_t B_t + D G_t

The states h_t come from running the chunk again. Dimension letters are those of chunks.py.
"""

import torch
from torch import Tensor

from neural_layers.kernels.selective_scan.chunks import Chunk, Scan, times


class Backward:
    """The gradients in the making: sums over time in the accumulation dtype, the others in their inputs' dtypes."""

    def __init__(self, scan: Scan, grad_y: Tensor, grad_final_state: Tensor | None) -> None:
        self.scan, self.grad_y = scan, grad_y
        self.u, self.delta, self.B, self.C = (x.new_empty(x.shape) for x in (scan.u, scan.delta, scan.B, scan.C))
        self.z = None if scan.z is None else scan.z.new_empty(scan.z.shape)
        self.A_NE = torch.zeros_like(scan.A_NE)
        self.D_E = None if scan.D_E is None else torch.zeros_like(scan.D_E)
        self.bias_E = None if scan.bias_E is None else torch.zeros_like(scan.bias_E)
        self.work_CBNE = torch.empty_like(scan.decay_CBNE)
        # What the later chunks say about the state after this one.
        self.carry_BNE = scan.new_state(grad_final_state)

    def results(self) -> list[Tensor]:
        """The gradients of the float arguments that were given, in the order of the public function."""
        scan = self.scan
        gradients = [self.u, self.delta, self.A_NE.mT.to(scan.A.dtype), self.B, self.C]
        if scan.D is not None and self.D_E is not None:
            gradients.append(self.D_E.to(scan.D.dtype))
        if self.z is not None:
            gradients.append(self.z)
        if scan.delta_bias is not None and self.bias_E is not None:
            gradients.append(self.bias_E.to(scan.delta_bias.dtype))
        if scan.initial_state is not None:
            gradients.append(self.carry_BNE.mT.to(scan.initial_state.dtype))
        return [gradient.contiguous() for gradient in gradients]

    def run(self, t0: int, t1: int, state_BNE: Tensor) -> None:
        """Add the part of steps t0…t1, given the state before them."""
        chunk = self.scan.run(t0, t1, state_BNE)
        grad_CBE = self._through_gate(chunk, t0, t1)
        _store(self.C, t0, t1, times(chunk.states_CBNE[1:], grad_CBE.unsqueeze(3)).squeeze(3))

        state_grads_CBNE = self._state_gradients(chunk, grad_CBE)
        drive_CBE = chunk.delta_CBE * chunk.u_CBE
        _store(self.B, t0, t1, times(state_grads_CBNE, drive_CBE.unsqueeze(3)).squeeze(3))
        grad_drive_CBE = times(chunk.B_CBN.unsqueeze(2), state_grads_CBNE).squeeze(2)
        grad_delta_CBE = self._through_decay(chunk, state_grads_CBNE).addcmul_(grad_drive_CBE, chunk.u_CBE)

        if self.scan.delta_softplus:
            grad_delta_CBE *= torch.sigmoid(chunk.raw_CBE)
        if self.bias_E is not None:
            self.bias_E += grad_delta_CBE.sum(dim=(0, 1))
        _store(self.delta, t0, t1, grad_delta_CBE)
        grad_u_CBE = grad_drive_CBE * chunk.delta_CBE
        if self.D_E is not None and self.scan.D_E is not None:
            self.D_E += (grad_CBE * chunk.u_CBE).sum(dim=(0, 1))
            grad_u_CBE.addcmul_(grad_CBE, self.scan.D_E)
        _store(self.u, t0, t1, grad_u_CBE)

    def _through_gate(self, chunk: Chunk, t0: int, t1: int) -> Tensor:
        """The gradient of C·h + D u, and that of z on the way."""
        grad_CBE = self.scan.load(self.grad_y, t0, t1)
        if self.z is None or chunk.z_CBE is None:
            return grad_CBE
        sigmoid_CBE = torch.sigmoid(chunk.z_CBE)
        silu_CBE = chunk.z_CBE * sigmoid_CBE
        slope_CBE = sigmoid_CBE * (1 + chunk.z_CBE * (1 - sigmoid_CBE))
        _store(self.z, t0, t1, grad_CBE * self.scan.ungated(chunk) * slope_CBE)
        return grad_CBE * silu_CBE

    def _state_gradients(self, chunk: Chunk, grad_CBE: Tensor) -> Tensor:
        """g_t, the gradient of each state after a step."""
        steps = len(chunk.borders)
        grads_CBNE = torch.mul(chunk.C_CBN.unsqueeze(3), grad_CBE.unsqueeze(2), out=self.work_CBNE[:steps])
        decays, grads = chunk.decay_CBNE.unbind(0), grads_CBNE.unbind(0)
        grads[-1].add_(self.carry_BNE)
        for c in range(steps - 1, 0, -1):
            border = chunk.borders[c]
            if border is None:
                grads[c - 1].addcmul_(decays[c], grads[c])
            else:
                grads[c - 1].add_((decays[c] * grads[c]).masked_fill_(border, 0))
        return grads_CBNE

    def _through_decay(self, chunk: Chunk, state_grads_CBNE: Tensor) -> Tensor:
        """The gradient of Δ through exp(Δ A), and those of A and of the state before the chunk on the way.

        Overwrites the decays and the gradients of the states.
        """
        grads_CBNE = torch.mul(state_grads_CBNE, chunk.decay_CBNE, out=chunk.decay_CBNE)
        self.carry_BNE.copy_(grads_CBNE[0])
        for c, border in enumerate(chunk.borders):
            if border is not None:
                chunk.states_CBNE[c].masked_fill_(border, 0)
        if chunk.borders[0] is not None:
            self.carry_BNE.masked_fill_(chunk.borders[0], 0)
        grads_CBNE *= chunk.states_CBNE[:-1]
        grad_delta_CBE = torch.mul(grads_CBNE, self.scan.A_NE, out=state_grads_CBNE).sum(dim=2)
        grads_CBNE *= chunk.delta_CBE.unsqueeze(2)
        self.A_NE += grads_CBNE.sum(dim=(0, 1))
        return grad_delta_CBE


def _store(x: Tensor, t0: int, t1: int, steps: Tensor) -> None:
    """Write steps (C, B, …) to t0…t1 of (B, T, …), in its dtype."""
    x[:, t0:t1] = steps.transpose(0, 1)
