"""The language model recipe: text to tokens, training that can be killed at any moment, a model ready to use."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from neural_layers.distill.files import save_json
from neural_layers.distill.recipes.language_model_arguments import training_arguments
from neural_layers.distill.recipes.language_model_data import (
    LanguageData,
    OpenData,
    find_data,
    make_tokenizer,
    open_data,
)
from neural_layers.distill.recipes.language_model_options import LanguageModelOptions
from neural_layers.distill.recipes.language_model_parts import LanguageModelParts
from neural_layers.distill.recipes.language_model_progress import LanguageModelProgress
from neural_layers.distill.recipes.language_model_run import LanguageModelRun
from neural_layers.distill.recipes.language_model_trainer import LanguageModelTrainer
from neural_layers.distill.recipes.versions import git_revision, versions
from neural_layers.distill.text.feed import BatchPlan
from neural_layers.distill.text.tokenizing import load_text_tokenizer
from neural_layers.distill.tracking import add_statistics, tracker_names
from neural_layers.distill.validation.language import LanguageValidator
from neural_layers.errors import InputError
from neural_layers.models.loading import check_model_folder


def train_language_model(
    options: LanguageModelOptions,
    command: str = "",
    callbacks: Sequence[TrainerCallback] = (),
    parts: LanguageModelParts | None = None,
) -> dict[str, Any]:
    """Run the recipe, or continue it; return the content of `report.json`. `callbacks` go to the trainer; `parts` are
    those of a training of another kind than that of all weights.

    Raises InputError for input that a person can mend, FloatingPointError where training diverges, OSError where a file
    cannot be written; the last checkpoint is good in each case, and the same call continues from it.
    """
    started = time.perf_counter()
    parts = LanguageModelParts() if parts is None else parts
    options.check()
    tracker_names(options.report_to)
    if options.model is not None:
        check_model_folder(options.model)
    data = find_data(options)
    validates = bool(data.valid) or options.valid_fraction is not None
    if options.patience is not None and not validates:
        raise InputError("--patience needs a validation text; give one with --valid")
    run = parts.run(options)
    if run.is_finished:
        tqdm.write(f"{run.path} is finished; this is its report")
        return run.report()
    arguments = training_arguments(options, run, validates)
    if run.config is not None and run.config["threads"] != torch.get_num_threads():
        before, now = run.config["threads"], torch.get_num_threads()
        _tell(f"the run began with {before} threads and goes on with {now}: its last bits may differ; see --threads")
    plan = _plan(options, arguments)
    with arguments.main_process_first(desc="the data"):
        if arguments.process_index == 0:
            run.prepare()
        tokenizer = _tokenizer(options, run, data)
        opened = open_data(options, data, tokenizer, plan, _tell if arguments.process_index == 0 else lambda line: None)
    set_seed(options.seed)
    model = parts.build(options, tokenizer)
    if arguments.process_index == 0:
        run.begin({**_config(options), "data": opened.described, "parameters": model.num_parameters()})
    trainer = _trainer(options, run, arguments, model, opened, plan, parts.trainer)
    for callback in callbacks:
        trainer.add_callback(callback)
    parts.begin(trainer, run)
    _train(trainer, run)
    described = {"title": parts.title, "command": command, **parts.report(trainer, run)}
    return _finish(options, run, trainer, opened, started, described)


def _tell(line: str) -> None:
    tqdm.write(line)


def _plan(options: LanguageModelOptions, arguments: TrainingArguments) -> BatchPlan:
    world = arguments.world_size
    if options.batch % world:
        raise InputError(
            f"--batch {options.batch} cannot be divided over {world} processes; give a multiple of {world}"
        )
    if options.fsdp and world < 2:
        raise InputError("--fsdp splits the model over processes and there is one; run by torchrun, or leave it out")
    return BatchPlan(options.batch, options.accumulate, arguments.process_index, world)


def _tokenizer(options: LanguageModelOptions, run: LanguageModelRun, data: LanguageData) -> Any:
    """The run's tokenizer: made once, and found again when the run is continued."""
    if (run.tokenizer / "tokenizer_config.json").is_file():
        return load_text_tokenizer(run.tokenizer)
    tokenizer = make_tokenizer(options, data)
    run.save_tokenizer(tokenizer)
    return tokenizer


def _trainer(
    options: LanguageModelOptions,
    run: LanguageModelRun,
    arguments: TrainingArguments,
    model: Any,
    opened: OpenData,
    plan: BatchPlan,
    kind: type[LanguageModelTrainer],
) -> LanguageModelTrainer:
    validate = None
    is_main = plan.rank == 0
    if opened.valid is not None:
        validate = LanguageValidator(
            opened.valid,
            options.context,
            max(plan.own, 4096 // options.context),
            model.config.vocab_size,
            arguments.device,
            plan.rank,
            plan.world,
            folder=run.path / "validation" if is_main else None,
        )
    progress = LanguageModelProgress(run, plan.step * options.context, "tensorboard" in options.report_to)
    trainer = kind(
        model=model,
        args=arguments,
        feed=opened.feed,
        validate=validate,
        label_smoothing=options.label_smoothing,
        patience=options.patience,
        keep=options.keep,
        fsdp=options.fsdp,
        callbacks=[progress] if is_main else [],
    )
    trainer.remove_callback(PrinterCallback)
    add_statistics(trainer, options.statistics)
    if plan.rank:
        torch.manual_seed(options.seed + plan.rank)  # dropout of its own; the weights are equal by now
    return trainer


def _train(trainer: LanguageModelTrainer, run: LanguageModelRun) -> None:
    """Train to the end, from the last checkpoint where there is one."""
    checkpoint = run.checkpoint
    try:
        if checkpoint is None or not checkpoint.state["is_last"]:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.folder))
        else:
            trainer.restore_finished(checkpoint)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, LanguageModelProgress):
                callback.close()


def _finish(
    options: LanguageModelOptions,
    run: LanguageModelRun,
    trainer: LanguageModelTrainer,
    opened: OpenData,
    started: float,
    described: dict[str, Any],
) -> dict[str, Any]:
    step = trainer.state.global_step
    if options.patience is not None:
        step = trainer.best_step() or step
    weights = trainer.weights_of(step)
    history = trainer.state.log_history
    report: dict[str, Any] = {
        **described,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "steps": trainer.state.global_step,
        "step": step,
        "data": opened.described,
        "train_loss": next((entry["loss"] for entry in reversed(history) if "loss" in entry), None),
        "validation": {k.removeprefix("eval_"): v for k, v in _validation(history, step).items()},
        "seconds": round(time.perf_counter() - started, 1),
        "model": str(run.model),
    }
    if trainer.is_world_process_zero():
        run.save_result(trainer.model, weights)
        save_json(run.path / "report.json", report)
    trainer.accelerator.wait_for_everyone()
    return report


def _validation(history: list[dict[str, Any]], step: int) -> dict[str, float]:
    found = [entry for entry in history if "eval_loss" in entry and entry["step"] == step]
    return {k: v for k, v in found[-1].items() if k.startswith("eval_")} if found else {}


def _config(options: LanguageModelOptions) -> dict[str, Any]:
    return {
        "options": options.record(),
        "versions": versions(),
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "git_revision": git_revision(),
    }
