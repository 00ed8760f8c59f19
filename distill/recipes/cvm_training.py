"""Training one translator: the teacher, the student, or the student without its teacher."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from neural_layers.distill.data.batches import TranslationCollator, TranslationDataset
from neural_layers.distill.data.feed import ExampleFeed
from neural_layers.distill.gate import QualityGate
from neural_layers.distill.losses import DistillationLoss
from neural_layers.distill.presets import CVMPreset, Training
from neural_layers.distill.progress import ProgressBar
from neural_layers.distill.recipes.arguments import exact_arguments
from neural_layers.distill.recipes.cvm_options import CVMOptions
from neural_layers.distill.recipes.recipe_run import RecipeRun
from neural_layers.distill.recipes.splits import Splits
from neural_layers.distill.recipes.trained import mixed_precision
from neural_layers.distill.tasks import Seq2SeqTask
from neural_layers.distill.teacher_cache import TeacherCache, build_cache
from neural_layers.distill.tracking import add_statistics, tracker_names, tracking_arguments
from neural_layers.distill.trainer import DistillationTrainer
from neural_layers.distill.validation import (
    BertScore,
    Resampling,
    TranslationOptions,
    TranslationScorer,
    TranslationValidator,
)
from neural_layers.distill.validation.words import word_counts


class CVMData:
    """What all trainings of a run share: encoded pairs, and how translations are scored."""

    def __init__(
        self, splits: Splits, tokenizer: Any, preset: CVMPreset, options: CVMOptions, scoring: TranslationOptions
    ) -> None:
        self.splits, self.tokenizer, self.preset, self.options = splits, tokenizer, preset, options
        self.scoring = scoring
        self.train = TranslationDataset(splits.train, tokenizer, preset.max_length)
        self.collate = TranslationCollator(tokenizer)

    def feed(self, batch_size: int) -> ExampleFeed:
        """Training batches of pairs of like length."""
        lengths = [len(row["input_ids"]) for row in (self.train[i] for i in range(len(self.train)))]
        return ExampleFeed(self.train, self.collate, batch_size=batch_size, seed=self.options.seed, lengths=lengths)


def scoring_of(options: CVMOptions, splits: Splits) -> TranslationOptions:
    """How translations are scored and analysed, in validations and on the test set.

    Raises InputError for an encoder that cannot be read, and for a language whose words cannot be found.
    """
    encoder = None if options.bertscore is None else BertScore(options.bertscore, options.bertscore_layers)
    if encoder is not None:
        encoder.f1(["a"], ["a"])  # whether it can be read
    for pairs in (splits.valid, splits.test):
        TranslationScorer([pair.target for pair in pairs], options.language)
    return TranslationOptions(
        language=options.language,
        encoder=encoder,
        seen=word_counts(pair.source for pair in splits.train),
        resampling=Resampling(options.samples, options.confidence),
    )


def build_trainer(
    name: str,
    model: PreTrainedModel,
    data: CVMData,
    run: RecipeRun,
    training: Training,
    *,
    teacher: PreTrainedModel | None = None,
    gate: QualityGate | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> DistillationTrainer:
    """The trainer of `model`: by distillation where there is a teacher, by hard labels without.

    Validations go to `validation/` for the student and to `validation/<name>/` for another model.
    """
    preset, folder = data.preset, run.path / "validation" if name == "student" else run.path / "validation" / name
    pairs = data.splits.valid[: preset.eval_sentences]
    validate = TranslationValidator(pairs, data.tokenizer, folder, teacher=teacher, options=data.scoring)
    task = Seq2SeqTask(model)
    teaches = teacher if teacher is None or data.options.teacher_cache is None else _cached(teacher, data, task)
    trainer = DistillationTrainer(
        model=model,
        args=_arguments(data, run, name, training),
        feed=data.feed(training.batch_size),
        task=task,
        teacher=teaches,
        loss=_loss(data, training, model, teacher),
        validate=validate,
        gate=gate,
        callbacks=[ProgressBar(name, run, data.options.metric), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    add_statistics(trainer, data.options.statistics)
    return trainer


def _loss(data: CVMData, training: Training, model: Any, teacher: Any) -> DistillationLoss:
    if teacher is None:
        return DistillationLoss(alpha=0.0, beta=1.0, label_smoothing=training.label_smoothing)
    preset, options = data.preset, data.options
    states = None
    if options.cosine:
        states = last_states(model, teacher, options.seed)
    return DistillationLoss.cvm(
        temperature=preset.temperature,
        alpha=preset.alpha,
        beta=preset.beta,
        divergence=options.divergence,
        label_smoothing=options.label_smoothing,
        cosine=options.cosine,
        mse=options.mse,
        states=states,
    )


def last_states(student: Any, teacher: Any, seed: int) -> Any:
    """The alignment of the last decoder states, token by token."""
    from neural_layers.distill.losses import StateAlignment

    torch.manual_seed(seed)  # of the projection
    return StateAlignment(student_dim=student.config.hidden_size, teacher_dim=teacher.config.hidden_size)


def _cached(teacher: PreTrainedModel, data: CVMData, task: Seq2SeqTask) -> TeacherCache:
    folder, temperature = data.options.teacher_cache, data.preset.temperature
    assert folder is not None
    with tqdm(total=len(data.train), desc="teacher cache", unit="pair") as bar:
        return build_cache(
            folder,
            task,
            teacher,
            data.train,
            data.collate,
            k=data.options.top_k,
            temperature=temperature.start,
            progress=lambda done, whole: bar.update(done - bar.n),
        )


def _arguments(data: CVMData, run: RecipeRun, name: str, training: Training) -> TrainingArguments:
    preset, options = data.preset, data.options
    steps = min(preset.eval_steps, training.steps)
    return exact_arguments(
        run.checkpoints(name),
        steps=training.steps,
        eval_steps=steps,
        save_steps=preset.save_steps if steps % preset.save_steps == 0 else steps,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        lr_scheduler_type=training.schedule,
        **mixed_precision(options.precision),
        metric_for_best_model=options.metric,
        greater_is_better=True,
        seed=options.seed,
        **tracking_arguments(tracker_names(options.report_to), run.path, name),
    )
