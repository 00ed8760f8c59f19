"""Training one classifier: the teacher, the student, or the student without its teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from neural_layers.distill.classification import ClassBalance, MedicalTextAugmenter
from neural_layers.distill.classification.data import ClassificationData
from neural_layers.distill.classification.examples import TextCollator, TextExamples
from neural_layers.distill.data.feed import ExampleFeed
from neural_layers.distill.gate import QualityGate
from neural_layers.distill.losses import DistillationLoss
from neural_layers.distill.progress import ProgressBar
from neural_layers.distill.recipes.arguments import exact_arguments
from neural_layers.distill.recipes.ntmm_options import NTMMOptions
from neural_layers.distill.recipes.recipe_run import RecipeRun
from neural_layers.distill.recipes.trained import mixed_precision
from neural_layers.distill.tasks import ClassificationTask
from neural_layers.distill.tracking import add_statistics, tracker_names, tracking_arguments
from neural_layers.distill.trainer import DistillationTrainer
from neural_layers.distill.validation import ClassificationOptions, ClassificationValidator, Resampling
from neural_layers.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """How long and how fast one model is trained."""

    steps: int
    learning_rate: float
    eval_steps: int


class NTMMData:
    """What all trainings of a run share: token ids of the splits, the class balance, and what is done about it."""

    def __init__(self, data: ClassificationData, tokenizer: Any, options: NTMMOptions) -> None:
        augmenter = None
        if options.augment:
            augmenter = MedicalTextAugmenter(options.synonyms, options.abbreviations, seed=options.seed)
        self.data, self.tokenizer, self.options = data, tokenizer, options
        limit = options.max_length
        self.train = TextExamples(data.train.texts, data.train.labels, tokenizer, limit, augmenter)
        self.valid = TextExamples(data.valid.texts, data.valid.labels, tokenizer, limit)
        self.collate = TextCollator(tokenizer)
        self.balance = ClassBalance.of(data.train.labels, data.classes)

    @property
    def class_weights(self) -> torch.Tensor | None:
        """Of the loss of the hard labels, where imbalance is met so."""
        return torch.tensor(self.balance.weights) if self.options.imbalance == "weights" else None

    def feed(self) -> ExampleFeed:
        """The training batches."""
        options = self.options
        sampled = options.imbalance == "sampling"
        step = options.batch * options.accumulate
        if step > len(self.train):
            raise InputError(
                f"--batch {options.batch} × --accumulate {options.accumulate} is more than the {len(self.train)} "
                "training texts; make one of them smaller"
            )
        return ExampleFeed(
            self.train,
            self.collate,
            batch_size=options.batch,
            accumulate=options.accumulate,
            seed=options.seed,
            lengths=self.train.lengths,
            weights=self.balance.example_weights(self.data.train.labels) if sampled else None,
        )

    def schedule(self, steps: int | None, epochs: float, learning_rate: float) -> Schedule:
        """Steps, or as many as `epochs` take; a validation after each epoch unless the options say otherwise."""
        epoch = max(1, len(self.train) // (self.options.batch * self.options.accumulate))
        steps = max(1, round(epochs * epoch)) if steps is None else steps
        return Schedule(steps, learning_rate, min(steps, self.options.eval_steps or epoch))


def build_trainer(
    name: str,
    model: PreTrainedModel,
    shared: NTMMData,
    run: RecipeRun,
    schedule: Schedule,
    *,
    teacher: PreTrainedModel | None = None,
    loss: DistillationLoss,
    gate: QualityGate | None = None,
) -> DistillationTrainer:
    """The trainer of `model`, by distillation where there is a teacher; its validations go to `validation/` for the
    student and to `validation/<name>/` for another."""
    data, options = shared.data, shared.options
    folder = run.path / "validation" if name == "student" else run.path / "validation" / name
    validate = ClassificationValidator(
        shared.valid,  # type: ignore[arg-type]  # `len` and `[i]` are all that is asked of them
        shared.collate,
        folder,
        classes=data.classes,
        teacher=teacher,
        texts=data.valid.texts,
        options=ClassificationOptions(resampling=Resampling(options.samples, options.confidence)),
    )
    trainer = DistillationTrainer(
        model=model,
        args=_arguments(options, run, name, schedule),
        feed=shared.feed(),
        task=ClassificationTask(),
        teacher=teacher,
        loss=loss,
        validate=validate,
        gate=gate,
        keeps_best=True,
        patience=options.patience or None,
        callbacks=[ProgressBar(name, run, options.metric)],
    )
    trainer.remove_callback(PrinterCallback)
    add_statistics(trainer, options.statistics)
    return trainer


def _arguments(options: NTMMOptions, run: RecipeRun, name: str, schedule: Schedule) -> TrainingArguments:
    return exact_arguments(
        run.checkpoints(name),
        steps=schedule.steps,
        eval_steps=schedule.eval_steps,
        save_steps=schedule.eval_steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(options.warmup * schedule.steps),
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        **mixed_precision(options.precision),
        metric_for_best_model=options.metric,
        greater_is_better=True,
        logging_steps=max(1, min(schedule.steps // 100, 20)),
        seed=options.seed,
        **tracking_arguments(tracker_names(options.report_to), run.path, name),
    )


def tell(lines: Sequence[str]) -> None:
    """Print lines without breaking a progress bar."""
    for line in lines:
        tqdm.write(line)
