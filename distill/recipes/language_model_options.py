"""What a person can choose for the training of a language model, and what is refused."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from neural_layers.distill.recipes.recipe_options import RecipeOptions
from neural_layers.errors import InputError

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class LanguageModelOptions(RecipeOptions):
    """The options of `neural-layers train`.

    data:    sources, `SOURCE` or `SOURCE=WEIGHT`, as `parse_sources` takes them
    valid:   a source to validate on; valid_fraction: the share of every source, at its end, that is held out for it
    out:     the run's folder: new, empty, or of a run with the same options, which is then continued
    model:   a folder with a hybrid model to go on from, instead of `preset` and the sizes
    preset:  "tiny", "slm-20m" or "slm-130m"; mixers: hybrid, samba, the name of one mixer, or a list with commas
    layers, width, heads, kv_heads, ff, dropout: sizes, instead of the preset's
    context: tokens of a training sequence; max_context: the most that the trained model takes, by default as many
    tokenizer: "char", "bpe:VOCABULARY" or a folder; by default that of `model`, else char
    batch:   sequences of a forward pass over all processes; accumulate: forward passes of an optimiser step
    lr, min_lr, warmup, schedule: the learning rate rises over `warmup` steps (by default a tenth of all, at most 100)
             and falls to `min_lr` (by default a tenth of `lr`)
    eval_steps, save_steps: steps between validations and between checkpoints; keep: checkpoints that stay
    patience: validations without a better loss after which training stops; the best weights are then the result
    streaming: never hold the data or its tokens, in memory or on disk
    separator: what divides `.txt` files into documents
    report_to: trackers with commas between, or "none"; statistics: steps between norms of gradients and weights
    """

    free: ClassVar[tuple[str, ...]] = ("out", "resume", "cache", "keep", "report_to", "statistics")

    data: tuple[str, ...]
    out: Path
    valid: str | None = None
    valid_fraction: float | None = None
    model: Path | None = None
    preset: str = "tiny"
    mixers: str = "hybrid"
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    ff: int | None = None
    dropout: float = 0.0
    context: int = 256
    max_context: int | None = None
    tokenizer: str | None = None
    text_field: str = "text"
    document_separator: str | None = None
    steps: int = 2000
    batch: int = 12
    accumulate: int = 1
    lr: float = 1e-3
    min_lr: float | None = None
    warmup: int | None = None
    schedule: str = "cosine"
    weight_decay: float = 0.1
    beta2: float = 0.99
    clip: float = 1.0
    label_smoothing: float = 0.0
    bf16: bool = False
    fsdp: bool = False
    patience: int | None = None
    eval_steps: int = 250
    save_steps: int = 250
    keep: int = 2
    seed: int = 0
    streaming: bool = False
    cache: Path | None = None
    report_to: str = "tensorboard"
    statistics: int | None = None
    resume: bool = False

    @property
    def warmup_steps(self) -> int:
        """`warmup`, or its default."""
        return min(100, self.steps // 10) if self.warmup is None else self.warmup

    def check(self) -> None:
        """Raise InputError for a value that cannot be, naming the option."""
        whole = ("steps", "batch", "accumulate", "eval_steps", "save_steps", "keep")
        sizes = ("layers", "width", "heads", "kv_heads", "ff", "patience", "statistics")
        for name in whole + sizes:
            value = getattr(self, name)
            if value is not None and value < (0 if name == "ff" else 1):
                raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if self.context < 2:
            raise InputError(f"--context {self.context} must be at least 2: one token predicts the next")
        if self.max_context is not None and self.max_context < self.context:
            raise InputError(f"--max-context {self.max_context} must be at least --context {self.context}")
        for name in ("lr", "min_lr", "weight_decay", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"--{name.replace('_', '-')} {value} must be a finite number that is not negative")
        for name in ("label_smoothing", "dropout", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} must lie in [0, 1)")
        if not 0 <= self.warmup_steps <= self.steps:
            raise InputError(f"--warmup {self.warmup} must lie between 0 and --steps {self.steps}")
        if self.schedule not in SCHEDULES:
            raise InputError(f"--schedule {self.schedule} must be one of {', '.join(SCHEDULES)}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed {self.seed} is out of range; give one from 0 to {2**32 - 1}")
        if self.valid_fraction is not None:
            if not 0 < self.valid_fraction < 1:
                raise InputError(f"--valid-fraction {self.valid_fraction} must lie between 0 and 1")
            if self.valid is not None or self.streaming:
                other = "--valid" if self.valid is not None else "--streaming"
                raise InputError(f"--valid-fraction does not go with {other}; leave one of them out")
        if self.document_separator == "":
            raise InputError("--document-separator is empty; leave it out to take each .txt file as one document")
        if self.patience is not None and self.eval_steps % self.save_steps:
            raise InputError(
                f"--save-steps {self.save_steps} must divide --eval-steps {self.eval_steps} with --patience: the best "
                "validation must have a checkpoint"
            )
        self._check_model()

    def _check_model(self) -> None:
        sizes = [name for name in ("layers", "width", "heads", "kv_heads", "ff") if getattr(self, name) is not None]
        if self.max_context is not None:
            sizes.append("max_context")
        if self.model is not None and sizes:
            raise InputError(f"--{sizes[0].replace('_', '-')} changes the model of --model; leave one of them out")
