"""Training one translator of the CVM recipe."""

import time
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from neural_layers.distill.data.batches import TranslationCollator, TranslationDataset
from neural_layers.distill.losses import DistillationLoss
from neural_layers.distill.presets import CVMPreset, Training
from neural_layers.distill.progress import ProgressBar
from neural_layers.distill.recipes.splits import Splits
from neural_layers.distill.run_folder import RunFolder
from neural_layers.distill.trainer import DistillationTrainer
from neural_layers.distill.validation import TranslationValidator


@dataclass(frozen=True)
class TrainedModel:
    """What a training leaves beside the model: its validations, its log and the time it took."""

    steps: int
    seconds: float
    validations: list[dict[str, float]]
    log: list[dict[str, float | None]]


def train_translator(
    name: str,
    model: PreTrainedModel,
    tokenizer: Any,
    splits: Splits,
    preset: CVMPreset,
    training: Training,
    run: RunFolder,
    seed: int,
    teacher: PreTrainedModel | None = None,
    loss: DistillationLoss | None = None,
) -> TrainedModel:
    """Train `model` on the pairs: by distillation with `teacher` and `loss`, by hard labels without.

    Validations go to `validation/` for the student and `validation/<name>/` for another model. At the end the model has
    the weights of its best validation by BLEU.
    """
    started = time.perf_counter()
    folder = run.path / "validation" if name == "student" else run.path / "validation" / name
    validate = TranslationValidator(splits.valid[: preset.eval_sentences], tokenizer, folder, teacher=teacher)
    progress = ProgressBar(name, run)
    dataset = TranslationDataset(splits.train, tokenizer, preset.max_length)
    if dataset.dropped:
        longer = f"a side of more than {preset.max_length} tokens"
        tqdm.write(f"{name}: {dataset.dropped} of {len(splits.train)} pairs have {longer} and are left out")
    if loss is None:
        loss = DistillationLoss(alpha=0.0, beta=1.0, label_smoothing=training.label_smoothing)
    trainer = DistillationTrainer(
        model=model,
        args=_arguments(run, name, preset, training, seed),
        train_dataset=dataset,
        data_collator=TranslationCollator(tokenizer),
        callbacks=[progress],
        validate=validate,
        teacher=teacher,
        loss=loss,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    log = [record for record in progress.records if "loss" in record]
    return TrainedModel(training.steps, round(time.perf_counter() - started, 1), validate.history, log)


def _arguments(run: RunFolder, name: str, preset: CVMPreset, training: Training, seed: int) -> TrainingArguments:
    eval_steps = min(preset.eval_steps, training.steps)
    return TrainingArguments(
        output_dir=str(run.path / "checkpoints" / name),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        optim="adamw_torch_fused",
        warmup_steps=training.warmup_steps,
        lr_scheduler_type=training.schedule,
        train_sampling_strategy="group_by_length",
        eval_strategy="steps",
        eval_steps=eval_steps,
        save_strategy="steps",
        save_steps=eval_steps,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_bleu",
        logging_steps=max(1, training.steps // 100),
        logging_nan_inf_filter=False,
        seed=seed,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
