"""The recipe of an adapter: a trained model, frozen and perhaps quantized, and a few numbers that learn a text."""

import json
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from neural_layers.distill.checkpoint import WEIGHTS, Checkpoint
from neural_layers.distill.files import replacing, save_json
from neural_layers.distill.recipes.adapt_options import AdaptOptions, quantized
from neural_layers.distill.recipes.language_model import train_language_model
from neural_layers.distill.recipes.language_model_building import build_model
from neural_layers.distill.recipes.language_model_parts import LanguageModelParts
from neural_layers.distill.recipes.language_model_run import LanguageModelRun
from neural_layers.distill.recipes.language_model_trainer import LanguageModelTrainer
from neural_layers.errors import InputError
from neural_layers.wrappers.lora import CoverageReport, apply_lora, save_adapter
from neural_layers.wrappers.lora.peft_files import CONFIG

RECIPE = "adapter"


def train_adapter(options: AdaptOptions, command: str = "") -> dict[str, Any]:
    """Run the recipe, or continue it; return the content of `report.json`. Raises as `train_language_model`."""
    return train_language_model(options, command, parts=AdapterParts())


class AdapterRun(LanguageModelRun):
    """As a language model's run, with `adapter/` (PEFT's files and the tokenizer) in the place of `model/`, and
    `before.json`, the validation of the model as it was."""

    name = RECIPE

    @property
    def model(self) -> Path:
        """Where the adapter is."""
        return self.path / "adapter"

    @property
    def is_finished(self) -> bool:
        return (self.model / CONFIG).is_file() and (self.path / "report.json").is_file()

    def save_result(self, model: Any, weights: Any) -> None:
        """Write the adapter of these weights (None for those that the model has)."""
        if weights is not None:
            _load(model, weights, self.path)
        with replacing(self.model) as beside:
            save_adapter(model, beside)
            shutil.copytree(self.tokenizer, beside, dirs_exist_ok=True)


class AdapterTrainer(LanguageModelTrainer):
    """A `LanguageModelTrainer` whose checkpoints hold what trains: the rest comes from the model's own folder."""

    def _tensors(self) -> tuple[dict[str, Tensor] | None, dict[str, Any], dict[str, dict[str, Tensor]]]:
        _, optimizer, others = super()._tensors()
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}, optimizer, others

    def _load_weights(self, checkpoint: Checkpoint) -> None:
        _load(self.model, load_file(checkpoint.folder / WEIGHTS), checkpoint.folder)


def _load(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise InputError(f"the adapter in {folder} is of another model: {str(error).splitlines()[0]}") from error
    if differing := sorted(trained ^ weights.keys()):
        raise InputError(f"the adapter in {folder} is of another model ({differing[0]} does not fit)")


class AdapterParts(LanguageModelParts):
    """The parts of a training that leaves the model's own weights alone."""

    title = "adapter"
    run = AdapterRun
    trainer = AdapterTrainer

    def __init__(self) -> None:
        self.coverage: CoverageReport | None = None

    def build(self, options: Any, tokenizer: Any) -> Any:
        model = build_model(options, tokenizer)
        if options.quantize is not None:
            quantized(model, options.quantize, options.double_quant)
        if options.checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        self.coverage = apply_lora(model, options.config())
        tqdm.write(str(self.coverage))
        return model

    def begin(self, trainer: LanguageModelTrainer, run: LanguageModelRun) -> None:
        if trainer.validate is None or run.checkpoint is not None:
            return
        model: Any = trainer.model
        model.to(trainer.args.device).eval()
        before = trainer.validate(model, 0)
        model.train()
        if trainer.is_world_process_zero():
            save_json(run.path / "before.json", before)
            tqdm.write(f"before: loss {before['loss']:.4f}, perplexity {before['perplexity']:.4f}")

    def report(self, trainer: LanguageModelTrainer, run: LanguageModelRun) -> dict[str, Any]:
        assert self.coverage is not None
        before = run.path / "before.json"
        return {
            "trainable": self.coverage.trainable,
            "base_and_adapter": self.coverage.total,
            "share": self.coverage.share,
            "peak_memory_mib": round(_peak_memory() / 2**20, 1),
            "before": json.loads(before.read_text(encoding="utf-8")) if before.is_file() else {},
        }


def _peak_memory() -> int:
    """Bytes, the most that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
