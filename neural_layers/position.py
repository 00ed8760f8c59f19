"""Positions: rotary tables with the usual scalings, and ALiBi slopes."""

import math
from typing import Any

import torch
from torch import Tensor, nn

_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_OPTIONAL = {"yarn": ("beta_fast", "beta_slow", "attention_factor")}


class RotaryEmbedding(nn.Module):
    """The cosines and sines of RoPE (arXiv 2104.09864): angle[t, i] = position[t] · base^(−2i/K).

    head_dim: K, even. base: the wavelength base.
    scaling:  None, or a dict with the fields of transformers' `rope_parameters` less `rope_theta`, which is `base`:
              `rope_type` one of "default" (none),
              "linear"  (positions divided by `factor`),
              "dynamic" (NTK: the base grows once positions pass `original_max_position_embeddings`),
              "yarn"    (arXiv 2309.00071; optional `beta_fast`, `beta_slow`, `attention_factor`),
              "llama3"  (`factor`, `low_freq_factor`, `high_freq_factor`, `original_max_position_embeddings`).

    forward(position_ids (T,) or (B, T), dtype) → cos, sin of shape (T, K/2) or (B, T, K/2).

    There is no buffer to lose when a model is built on the meta device: the tables are computed in float64 on every
    call and rounded once, so that far positions keep their digits. With "dynamic", the angles of a token depend on the
    longest position of the call, so that a cached prefix is not recomputed when the sequence outgrows the original
    length; that is the method, not an error here.
    Raises ValueError for an odd head_dim, an unknown rope_type, and missing or unknown fields.
    """

    def __init__(self, head_dim: int, base: float = 10000.0, scaling: dict[str, Any] | None = None) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim} must be even")
        if scaling == {"rope_type": "default"}:
            scaling = None
        if scaling is not None:
            _check_scaling(scaling)
            if scaling["rope_type"] == "dynamic" and head_dim < 4:
                raise ValueError(f"head_dim={head_dim} must be at least 4 for rope_type='dynamic'")
        self.head_dim, self.base, self.scaling = head_dim, base, scaling

    def forward(self, position_ids: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        position = position_ids.double().unsqueeze(-1)
        angle, factor = position * self._frequencies(position), self._attention_factor()
        return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)

    def _frequencies(self, position: Tensor) -> Tensor:
        """The angular frequency of each pair, (K/2,), in float64."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=position.device) / self.head_dim
        if self.scaling is None:
            return self.base**-exponent
        kind, s = self.scaling["rope_type"], self.scaling
        if kind == "linear":
            return self.base**-exponent / s["factor"]
        if kind == "dynamic":
            return self._dynamic_frequencies(exponent, position)
        return (self._yarn if kind == "yarn" else self._llama3)(self.base**-exponent)

    def _dynamic_frequencies(self, exponent: Tensor, position: Tensor) -> Tensor:
        s = self.scaling or {}
        factor, original = s["factor"], s["original_max_position_embeddings"]
        # Kept a tensor, so that a compiled model does not wait for the value.
        length = (position.amax() + 1).clamp_min(original) if position.numel() else position.new_tensor(original)
        growth = factor * length / original - (factor - 1)
        return (self.base * growth ** (self.head_dim / (self.head_dim - 2))) ** -exponent

    def _yarn(self, frequency: Tensor) -> Tensor:
        s = self.scaling or {}

        def pair_with(rotations: float) -> float:
            """The (fractional) pair that turns `rotations` times within the original length."""
            wavelength = s["original_max_position_embeddings"] / (rotations * 2 * math.pi)
            return self.head_dim * math.log(wavelength) / (2 * math.log(self.base))

        low = max(math.floor(pair_with(s.get("beta_fast") or 32)), 0)
        high = min(math.ceil(pair_with(s.get("beta_slow") or 1)), self.head_dim - 1)
        pair = torch.arange(self.head_dim // 2, dtype=torch.float64, device=frequency.device)
        interpolated = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
        return frequency / s["factor"] * interpolated + frequency * (1 - interpolated)

    def _llama3(self, frequency: Tensor) -> Tensor:
        s = self.scaling or {}
        rotations = s["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        kept = ((rotations - low) / (high - low)).clamp(0, 1)
        return frequency * kept + frequency / s["factor"] * (1 - kept)

    def _attention_factor(self) -> float:
        s = self.scaling
        if s is None or s["rope_type"] != "yarn":
            return 1.0
        given = s.get("attention_factor")
        return given if given is not None else (0.1 * math.log(s["factor"]) + 1.0 if s["factor"] > 1 else 1.0)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base}" + (f", scaling={self.scaling}" if self.scaling else "")


def _check_scaling(scaling: dict[str, Any]) -> None:
    kind = scaling.get("rope_type")
    if kind not in _REQUIRED:
        raise ValueError(f"scaling has rope_type={kind!r}; known are {', '.join(_REQUIRED)}")
    missing = [field for field in _REQUIRED[kind] if field not in scaling]
    if missing:
        raise ValueError(f"scaling of rope_type={kind!r} lacks {', '.join(missing)}")
    known = {"rope_type", *_REQUIRED[kind], *_OPTIONAL.get(kind, ())}
    unknown = sorted(set(scaling) - known)
    if unknown:
        raise ValueError(f"scaling of rope_type={kind!r} does not know {', '.join(unknown)}; it takes {sorted(known)}")


def alibi_slopes(num_heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The slope of each head for ALiBi (arXiv 2108.12409), (H,).

    For a power of two H: 2^(−8i/H), i = 1 … H. Otherwise those of the power of two below, then every other one of the
    power of two above, as the paper's code does.
    Raises ValueError for num_heads < 1.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads} must be at least 1")
    below = 2 ** math.floor(math.log2(num_heads))
    exponents = [-8 * i / below for i in range(1, below + 1)]
    exponents += [-4 * i / below for i in range(1, 2 * (num_heads - below), 2)]
    return torch.tensor([2.0**exponent for exponent in exponents], dtype=dtype)
