"""A 4-bit weight as the tensors of a checkpoint, under the names and in the bits of bitsandbytes.

Beside the packed weight stand `absmax`, `quant_map` (the values of the codes), where double-quantized `nested_absmax`
and `nested_quant_map`, and `quant_state.bitsandbytes__nf4` (or `fp4`): a JSON text, as bytes, with the rest.
"""

import json
from typing import Any

import torch
from torch import Tensor

from neural_layers.kernels.four_bit import CODES, DYNAMIC_MAP, NESTED_BLOCK, Quantized4bit, check_quantized

_HEADER = "quant_state.bitsandbytes__"


def to_state(quantized: Quantized4bit) -> dict[str, Tensor]:
    """The tensors beside the packed weight, by name."""
    device = quantized.absmax.device
    header: dict[str, Any] = {
        "quant_type": quantized.quant_type,
        "blocksize": quantized.block_size,
        "dtype": str(quantized.dtype).removeprefix("torch."),
        "shape": quantized.shape,
    }
    state = {"absmax": quantized.absmax, "quant_map": _table(CODES[quantized.quant_type], device)}
    if quantized.offset is not None and quantized.nested_absmax is not None:
        state |= {"nested_absmax": quantized.nested_absmax, "nested_quant_map": _table(DYNAMIC_MAP, device)}
        # On the meta device there is no value, and the text stands for its key.
        offset = 0.0 if quantized.offset.is_meta else quantized.offset.item()
        header |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    text = list(json.dumps(header).encode())
    return state | {_HEADER + quantized.quant_type: torch.tensor(text, dtype=torch.uint8, device="cpu")}


def from_state(packed: Tensor, state: dict[str, Tensor]) -> Quantized4bit:
    """The record of a packed weight and the tensors beside it.

    Raises ValueError where they are of another format than the one this library computes, and TypeError and ValueError
    where they do not fit each other.
    """
    headers = [name for name in state if name.startswith(_HEADER)]
    if len(headers) != 1:
        raise ValueError(f"expected one {_HEADER}nf4 or {_HEADER}fp4; there are {headers or 'none'}")
    header = _parse(state[headers[0]])
    nested = "nested_absmax" in state
    _require(state, "absmax", "quant_map", *(["nested_quant_map"] if nested else []))
    quant_type = header["quant_type"]
    if quant_type not in CODES:
        raise ValueError(f"quant_type={quant_type!r} must be 'nf4' or 'fp4'")
    _check_table("quant_map", state["quant_map"], CODES[quant_type])
    offset = None
    if nested:
        _check_table("nested_quant_map", state["nested_quant_map"], DYNAMIC_MAP)
        if header.get("nested_blocksize") != NESTED_BLOCK or "nested_offset" not in header:
            raise ValueError(
                f"nested blocks of {header.get('nested_blocksize')} with an offset; expected {NESTED_BLOCK}"
            )
        offset = torch.tensor(header["nested_offset"], dtype=torch.float32, device=state["absmax"].device)
    quantized = Quantized4bit(
        # Stored in wider elements the bytes are the same.
        packed if packed.dtype == torch.uint8 else packed.contiguous().view(torch.uint8).view(-1, 1),
        state["absmax"],
        quant_type,
        header["blocksize"],
        tuple(header["shape"]),
        getattr(torch, header["dtype"]),
        offset,
        state["nested_absmax"] if nested else None,
    )
    check_quantized(quantized)
    return quantized


def _parse(text: Tensor) -> dict[str, Any]:
    try:
        header = json.loads(bytes(text.tolist()))
        return {**header, **{name: header[name] for name in ("quant_type", "blocksize", "dtype", "shape")}}
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"the quant_state is not the JSON text of a 4-bit weight: {problem!r}") from problem


def _require(state: dict[str, Tensor], *names: str) -> None:
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"the 4-bit weight lacks {', '.join(missing)}")


def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _check_table(name: str, given: Tensor, values: tuple[float, ...]) -> None:
    table = _table(values, given.device)
    if given.shape != table.shape or not (given.is_meta or torch.allclose(given.float(), table, rtol=0, atol=1e-6)):
        raise ValueError(f"{name} holds other values than those of the format; only these can be computed with")
