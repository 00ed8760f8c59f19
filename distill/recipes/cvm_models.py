"""The teacher, the student and the tokenizer of a translator's distillation."""

from typing import Any

from transformers import set_seed

from neural_layers.distill.data.tokenizer import train_tokenizer
from neural_layers.distill.presets import CVMPreset
from neural_layers.distill.recipes.cvm_options import CVMOptions
from neural_layers.distill.recipes.loading import load_teacher, load_tokenizer
from neural_layers.distill.recipes.recipe_run import RecipeRun
from neural_layers.distill.recipes.splits import Splits
from neural_layers.distill.recipes.trained import device
from neural_layers.errors import InputError
from neural_layers.models.cvm import CVMConfig, CVMForConditionalGeneration


def given_models(options: CVMOptions, preset: CVMPreset) -> tuple[CVMForConditionalGeneration | None, Any]:
    """The teacher and the tokenizer that the options name, checked against each other and against the preset."""
    tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
    if options.teacher is None:
        return None, tokenizer
    teacher, tokenizer = load_teacher(options.teacher, tokenizer)
    limit = teacher.config.max_position_embeddings
    if limit < preset.max_length:
        raise InputError(
            f"the teacher in {options.teacher} takes {limit} tokens, and preset {options.preset!r} has sentences of up "
            f"to {preset.max_length}; give the preset that it was trained with"
        )
    placed: Any = teacher
    return placed.to(device()), tokenizer


def run_tokenizer(given: Any, run: RecipeRun, splits: Splits, preset: CVMPreset) -> Any:
    """The run's tokenizer: given, or trained once and found again when the run is continued."""
    if (run.tokenizer / "tokenizer.json").is_file():
        return load_tokenizer(run.tokenizer)
    tokenizer = train_tokenizer(splits.train, preset.vocab_size) if given is None else given
    run.save_tokenizer(tokenizer)
    return tokenizer


def new_model(preset: CVMPreset, sizes: dict[str, Any], tokenizer: Any, seed: int) -> CVMForConditionalGeneration:
    """A model with fresh weights, the same for the same seed."""
    set_seed(seed)
    config = CVMConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=2 * preset.max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        **sizes,
    )
    return CVMForConditionalGeneration(config)
