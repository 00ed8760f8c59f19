"""Softmax attention that never builds a (T, S) matrix."""

from functools import partial

import torch
from torch import Tensor

from neural_layers.kernels import c_library
from neural_layers.kernels.arguments import FLOATS, check_devices, check_floats, check_seq_idx, match_shapes
from neural_layers.kernels.dispatch import Backend, Op
from neural_layers.kernels.flash_attention.fused import flash_attention_fused
from neural_layers.kernels.flash_attention.native import native_avoid, native_obstacle
from neural_layers.kernels.flash_attention.reference import flash_attention_reference, reference_obstacle
from neural_layers.kernels.flash_attention.sdpa import flash_attention_sdpa, sdpa_avoid, sdpa_obstacle
from neural_layers.kernels.flash_attention.triton_choice import triton_avoid, triton_obstacle


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    key_padding_mask: Tensor | None,
    seq_idx: Tensor | None,
    dropout_p: float,
    chunk_size: int | None,
) -> None:
    plain = alibi_slopes is sinks is seq_idx is None and _hides_keys_of(k, key_padding_mask)
    if not plain or not _plainly_right(q, k, v):
        _check_tensors(q, k, v, alibi_slopes, sinks, key_padding_mask, seq_idx)
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1, which lets a query see itself; None is no window")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be positive; None is no cap")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p} must lie in [0, 1)")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1; None lets the backend choose")


def _hides_keys_of(k: Tensor, mask: Tensor | None) -> bool:
    """Whether the mask, where there is one, passes `_check_tensors`."""
    if mask is None:
        return True
    return mask.dtype == torch.bool and mask.device == k.device and k.ndim == 4 and mask.shape == k.shape[:2]


def _plainly_right(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q, k and v pass `_check_tensors`, which takes longer than a short call itself."""
    if not (q.ndim == k.ndim == v.ndim == 4 and q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        return False
    (B, _, H, K), (_, S, G, _) = q.shape, k.shape
    same = k.shape[0] == v.shape[0] == B and k.shape[3] == K and v.shape[1] == S and v.shape[2] == G
    return same and K > 0 and G > 0 and H % G == 0 and q.dtype in FLOATS


def _check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_padding_mask: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    check_floats(q=q, k=k, v=v, alibi_slopes=alibi_slopes, sinks=sinks)
    check_devices(
        q=q, k=k, v=v, alibi_slopes=alibi_slopes, sinks=sinks, key_padding_mask=key_padding_mask, seq_idx=seq_idx
    )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; expected one dtype")
    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask has dtype {key_padding_mask.dtype}; expected torch.bool")
    sizes: dict[str, int] = {}
    match_shapes(sizes, "BTHK", q=q)
    match_shapes(sizes, "BSGK", k=k)
    match_shapes(sizes, "BSGV", v=v)
    match_shapes(sizes, "H", alibi_slopes=alibi_slopes, sinks=sinks)
    match_shapes(sizes, "BS", key_padding_mask=key_padding_mask, seq_idx=seq_idx)
    if sizes["K"] < 1:
        raise ValueError("the head width K of q and k is 0; expected at least 1")
    if sizes["G"] < 1 or sizes["H"] % sizes["G"]:
        raise ValueError(f"the heads of q, H={sizes['H']}, must be a multiple of the heads of k and v, G={sizes['G']}")
    check_seq_idx(seq_idx, sizes["B"], sizes["S"])
    if seq_idx is not None and sizes["S"] < sizes["T"]:
        raise ValueError(
            f"seq_idx covers S={sizes['S']} keys; with it there must be no more queries than that, T={sizes['T']}"
        )


_OP = Op(
    "flash_attention",
    check=_check,
    backends=(
        Backend(
            "native",
            partial(flash_attention_fused, implementation="native"),
            native_obstacle,
            native_avoid,
            missing=c_library.MISSING,
            describe=c_library.describe,
        ),
        Backend("triton", partial(flash_attention_fused, implementation="triton"), triton_obstacle, triton_avoid),
        Backend("sdpa", flash_attention_sdpa, sdpa_obstacle, sdpa_avoid),
        Backend("torch", partial(flash_attention_fused, implementation="torch")),
        Backend("reference", flash_attention_reference, reference_obstacle),
    ),
)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dropout_p: float = 0.0,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention in memory linear in T and S (FlashAttention-2, arXiv 2307.08691).

    score_ts = softcap · tanh(scale · q_t·k_s / softcap) − slope · |i − s|,  with i = t + S − T the position of query t
    out_t = Σ_s P_ts · v_s,  P_ts = exp(score_ts) / (Σ_s exp(score_ts) + exp(sink)),  s over the keys that t sees

    The queries are aligned with the end of the keys, so that the last one stands at the last key; where T > S the
    early ones stand before the first key. A query that sees no key gives zeros.

    q: (B, T, H, K); k: (B, S, G, K); v: (B, S, G, V), of one dtype, float64 to float16; H is a multiple of G, and query
        head h uses key/value head h // (H / G)
    causal: a query sees no key after its own position
    window: a query sees itself, the window − 1 keys before it and, without causal, the window − 1 after it
    alibi_slopes: (H,), ALiBi (arXiv 2108.12409), subtracted after scale and softcap; differentiable
    scale: None is K ** −0.5
    softcap: bound on the scaled scores, as in Gemma 2 (arXiv 2408.00118)
    sinks: (H,), a learned logit of each head that joins the denominator only, as in gpt-oss; differentiable
    key_padding_mask: (B, S) bool, True for a key that counts. Hidden keys and values may hold any
        number whose products stay finite
    seq_idx: (B, S) int32 or int64, the document of each key; where it changes from one key to the next, another
        document begins, and a query sees keys of its own alone. A number that comes back later is a new document. The
        queries take the last T columns, so S ≥ T
    dropout_p: dropped share of P, the rest scaled by 1 / (1 − dropout_p); follows torch.manual_seed. Each backend
        draws its own mask, and that of `torch` also depends on the block length
    chunk_size: queries and keys of a block of backend `torch`, which bounds its memory; None takes a measured length.
        The other backends have no such blocks, and refuse it

    Scores and sums are kept in float32 for half inputs, in the dtype of q otherwise. Returns (B, T, H, V) in that of q.
    Backends `native`, `triton` and `torch` differentiate once (a second derivative raises NotImplementedError),
    `reference` to any order. The result of `native` does not depend on the number of threads, and `triton` gives the
    same bits each time; `scale` and `softcap` are constants of its kernels, which each new value compiles again.

    Raises ValueError for shapes that do not fit, H not a multiple of G, seq_idx with S < T, or a window, softcap,
    dropout_p or chunk_size out of range; TypeError for a wrong dtype; BackendError for a backend that cannot run.
    """
    out: Tensor = _OP(
        backend,
        q,
        k,
        v,
        causal=causal,
        window=window,
        alibi_slopes=alibi_slopes,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        key_padding_mask=key_padding_mask,
        seq_idx=seq_idx,
        dropout_p=dropout_p,
        chunk_size=chunk_size,
    )
    return out
