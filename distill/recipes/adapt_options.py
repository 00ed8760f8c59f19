"""What a person can choose for the training of an adapter, and what is refused."""

from dataclasses import dataclass
from typing import Any

from neural_layers.distill.recipes.language_model_options import LanguageModelOptions
from neural_layers.errors import InputError
from neural_layers.wrappers.lora import LoRAConfig
from neural_layers.wrappers.lora.config import ALL_LINEAR
from neural_layers.wrappers.quantization import quantize

SCHEMES = ("nf4", "fp4", "int4", "int8_dynamic")


@dataclass(frozen=True)
class AdaptOptions(LanguageModelOptions):
    """The options of `neural-layers lora train`: those of `train` with `model`, and

    r, alpha, lora_dropout, dora, rslora: of `LoRAConfig`
    targets:  patterns of modules with commas between, or all-linear; lora_layers: indices of layers with commas between
    ranks:    "PATTERN=R" for modules with another rank
    quantize: the scheme that the frozen weights are quantized by first (nf4, fp4, int4, int8_dynamic), None for none
    double_quant: whether the scales of nf4 and fp4 are quantized too
    checkpointing: compute the layers' activations again in the backward pass instead of keeping them
    """

    lr: float = 2e-3
    weight_decay: float = 0.0
    r: int = 8
    alpha: float = 16
    lora_dropout: float = 0.0
    targets: str = ALL_LINEAR
    lora_layers: str | None = None
    ranks: tuple[str, ...] = ()
    dora: bool = False
    rslora: bool = False
    quantize: str | None = None
    double_quant: bool = False
    checkpointing: bool = True

    def check(self) -> None:
        super().check()
        if self.model is None:
            raise InputError("an adapter is trained on a model; name its folder")
        if self.quantize not in (None, *SCHEMES):
            raise InputError(f"--quantize {self.quantize} must be one of {', '.join(SCHEMES)}")
        if self.double_quant and self.quantize not in ("nf4", "fp4"):
            raise InputError("--double-quant is for --quantize nf4 and fp4; leave it out, or give one of them")
        if self.fsdp:
            raise InputError("--fsdp splits what is trained, which is small here; leave it out")
        self.config()

    def config(self) -> LoRAConfig:
        """What the adapter is to be. Raises InputError for values that cannot be."""
        return lora_config(self)


def quantized(model: Any, scheme: str, double_quant: bool) -> None:
    """Quantize a model in place, as a person has asked for it. Raises InputError where it cannot be."""
    try:
        quantize(model, scheme, double_quant=double_quant)
    except ValueError as error:
        raise InputError(f"--quantize {scheme}: {error}") from error


def lora_config(options: Any) -> LoRAConfig:
    """The config that options of the command line ask for. Raises InputError for values that cannot be."""
    return LoRAConfig(
        r=options.r,
        alpha=options.alpha,
        dropout=getattr(options, "lora_dropout", 0.0),
        target_modules=ALL_LINEAR if options.targets == ALL_LINEAR else _names(options.targets),
        rank_pattern=dict(_rank(given) for given in options.ranks),
        use_rslora=options.rslora,
        use_dora=options.dora,
        layers=None if options.lora_layers is None else tuple(map(_index, _names(options.lora_layers))),
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _index(text: str) -> int:
    if not text.isdigit():
        raise InputError(f"--layers {text!r} is no index; give numbers with commas between, such as 0,1,2")
    return int(text)


def _rank(text: str) -> tuple[str, int]:
    pattern, equals, r = text.rpartition("=")
    if not equals or not r.isdigit():
        raise InputError(f"--rank {text!r} must be PATTERN=R, such as conv1d=4")
    return pattern, int(r)
