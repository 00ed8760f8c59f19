"""The schemes: what each makes of a linear layer and of an embedding, and how a quantized module is told again."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from neural_layers.frozen_bits import FrozenBits
from neural_layers.kernels.four_bit import BLOCK_SIZES as BLOCKS_4BIT
from neural_layers.kernels.int4 import BLOCK_SIZES as BLOCKS_INT4
from neural_layers.linear_4bit import Linear4bit
from neural_layers.linear_int4 import LinearInt4
from neural_layers.linear_int8 import LinearInt8
from neural_layers.quantized_embedding import Embedding4bit, EmbeddingInt4, EmbeddingInt8
from neural_layers.wrappers.quantization.half import DTYPES, EmbeddingHalf, LinearHalf
from neural_layers.wrappers.quantization.qat import FakeQuantizedEmbedding, FakeQuantizedLinear

FOUR_BIT = ("nf4", "fp4")
INT8 = ("int8_dynamic", "int8_static")
SCHEMES = (*DTYPES, *INT8, "int8_qat", "int4", *FOUR_BIT)
_BLOCKS = dict.fromkeys(FOUR_BIT, BLOCKS_4BIT) | {"int4": BLOCKS_INT4}


@dataclass(frozen=True)
class Format:
    """A scheme with its settings; `block_size` and `double_quant` are None where the scheme has none.

    Raises ValueError for a scheme that there is not, and for a setting that it does not take.
    """

    scheme: str
    block_size: int | None = None
    double_quant: bool | None = None

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme={self.scheme!r} must be one of {', '.join(map(repr, SCHEMES))}, or a Plan")
        sizes = _BLOCKS.get(self.scheme)
        if sizes is None and self.block_size is not None:
            raise ValueError(f"block_size={self.block_size}: {self.scheme!r} has no blocks; leave it out")
        if sizes is not None and self.block_size is None:
            object.__setattr__(self, "block_size", 64)
        if sizes is not None and (type(self.block_size) is not int or self.block_size not in sizes):
            known = ", ".join(map(str, sizes))
            raise ValueError(f"block_size={self.block_size!r} must be one of {known} for {self.scheme!r}")
        if self.double_quant not in (None, True, False):
            raise ValueError(f"double_quant={self.double_quant!r} must be True or False")
        if self.double_quant and self.scheme not in FOUR_BIT:
            raise ValueError(f"double_quant=True: {self.scheme!r} has no scales to quantize; 'nf4' and 'fp4' have")
        object.__setattr__(self, "double_quant", bool(self.double_quant) if self.scheme in FOUR_BIT else None)

    def entry(self) -> dict[str, Any]:
        """As a plan has it: a dict without what the scheme does not take."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def of(self, layer: nn.Module) -> nn.Module:
        """The quantized module with the weight of an `nn.Linear` or `nn.Embedding`; on the meta device, empty."""
        if isinstance(layer, nn.Embedding):
            return self._embedding(layer)
        assert isinstance(layer, nn.Linear)
        return self._linear(layer)

    def _linear(self, layer: nn.Linear) -> nn.Module:
        if self.scheme in DTYPES:
            return LinearHalf.from_linear(layer, DTYPES[self.scheme])
        if self.scheme in INT8:
            made = LinearInt8.from_linear(layer)
            if self.scheme == "int8_static":
                made.calibrate(1.0, 128)  # the measured ones take their place
            return made
        if self.scheme == "int8_qat":
            return FakeQuantizedLinear.from_linear(layer)
        assert self.block_size is not None
        if self.scheme == "int4":
            return LinearInt4.from_linear(layer, self.block_size)
        return Linear4bit.from_linear(layer, self.scheme, self.block_size, bool(self.double_quant))

    def _embedding(self, layer: nn.Embedding) -> nn.Module:
        if self.scheme in DTYPES:
            return EmbeddingHalf.from_embedding(layer, DTYPES[self.scheme])
        if self.scheme in INT8:
            return EmbeddingInt8.from_embedding(layer)
        if self.scheme == "int8_qat":
            return FakeQuantizedEmbedding.from_embedding(layer)
        assert self.block_size is not None
        if self.scheme == "int4":
            return EmbeddingInt4.from_embedding(layer, self.block_size)
        return Embedding4bit.from_embedding(layer, self.scheme, self.block_size, bool(self.double_quant))


def format_of(module: nn.Module) -> Format | None:
    """The format of a quantized module, None for any other. A table in int8 has no input, and counts as dynamic."""
    if isinstance(module, (Linear4bit, Embedding4bit)):
        return Format(module.quant_type, module.block_size, module.nested_absmax is not None)
    if isinstance(module, (LinearInt4, EmbeddingInt4)):
        return Format("int4", module.block_size)
    if isinstance(module, (LinearInt8, EmbeddingInt8)):
        return Format("int8_static" if isinstance(module, LinearInt8) and module.static else "int8_dynamic")
    if isinstance(module, (LinearHalf, EmbeddingHalf)):
        return Format("float16" if module.weight.dtype == torch.float16 else "bfloat16")
    if isinstance(module, (FakeQuantizedLinear, FakeQuantizedEmbedding)):
        return Format("int8_qat")
    return None


def share(module: nn.Module, owner: nn.Module) -> None:
    """Make the weight of a quantized `module` that of `owner`, quantized in the same format of the same weight."""
    if isinstance(module, FrozenBits) and isinstance(owner, FrozenBits):
        kind = type(owner)
        module._share(owner, kind)
        if isinstance(module, (Linear4bit, Embedding4bit)) and isinstance(owner, (Linear4bit, Embedding4bit)):
            module._set_format(owner.quantized)
    else:
        # Prepared for training, both still hold the one parameter.
        assert module.weight is owner.weight


def shared_with(module: nn.Module) -> nn.Module | None:
    """The module whose bits a quantized module shares, None where they are its own."""
    others = module._shared_with if isinstance(module, FrozenBits) else ()
    return others[0] if others else None
