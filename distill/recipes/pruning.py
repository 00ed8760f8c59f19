"""A language model made smaller: pruned or shrunken, trained on, and compared with what it was."""

import itertools
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from neural_layers.distill.files import replacing, save_json
from neural_layers.distill.pruning import PruningCallback
from neural_layers.distill.recipes.language_model import train_language_model
from neural_layers.distill.recipes.language_model_evaluation import EvaluationOptions, evaluate_language_model
from neural_layers.distill.recipes.language_model_options import LanguageModelOptions
from neural_layers.distill.text.reading import ReadingOptions
from neural_layers.distill.text.sources import parse_sources
from neural_layers.distill.text.store import default_cache, open_store
from neural_layers.distill.validation.language import batched, windows
from neural_layers.errors import InputError
from neural_layers.models.loading import load_language_model
from neural_layers.timing import measure_latency
from neural_layers.wrappers.pruning import (
    PruningSchedule,
    measured_scores,
    plan_shrink,
    prune,
    restore_masks,
    shrink,
    sparsity,
)
from neural_layers.wrappers.pruning.saving import noted_without_masks

_ROUNDS = 30  # of the measured time
_BATCHES = 16  # of 8 sequences, that units are scored on


@dataclass(frozen=True)
class PruningOptions:
    """The options of `neural-layers prune`.

    model:  a folder with a hybrid language model and its tokenizer. out: the folder to write to
    method, amount, scope, pattern, include, exclude: of `wrappers.pruning.prune`
    remove: instead of `method`, shares of units by kind, of `wrappers.pruning.shrink`; multiple_of: as there
    scores: what chooses the units, "norms" of weights, or "data": `measured_scores` of the training's first text
    times, shape, recovery: of the `PruningSchedule` in the course of `training`; by default a third of its steps is
            recovery behind the last pruning
    training: the training that follows, whose `model` and `out` are filled in here; None for none
    seed:   of method "random"
    """

    model: Path
    out: Path
    method: str = "l1"
    amount: float | None = None
    scope: str | None = None
    pattern: tuple[int, int] | None = None
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    remove: dict[str, float] | None = None
    multiple_of: int = 1
    scores: str = "norms"
    times: int = 10
    shape: str = "cubic"
    recovery: int | None = None
    training: LanguageModelOptions | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise InputError for options that do not go together."""
        if self.remove and (self.amount is not None or self.scope or self.pattern):
            raise InputError(
                "--remove takes units out, --amount, --scope and --pattern prune weights; run one, then the other"
            )
        if self.scores not in ("norms", "data") or (self.scores == "data" and not (self.remove and self.training)):
            raise InputError(f"--scores {self.scores} must be norms, or data, which needs --remove and --data")
        if not self.remove and self.amount is None and self.method != "n:m":
            raise InputError("give --amount, the share of weights to prune, or --remove KIND=SHARE")
        if self.out.resolve() == self.model.resolve():
            raise InputError(f"--out {self.out} is the model's own folder; give another")
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"--out {self.out} is a file; give a new folder")


def prune_language_model(options: PruningOptions, command: str = "") -> dict[str, Any]:
    """Prune or shrink the model, train it on where the options say so, and return what `pruning.json` holds.

    Written to `out`: `start/`, the model pruned at once; with training `training/`, its run, whose `model/` is the
    result; `pruning.json`. The same call continues a training that was interrupted.
    Raises InputError for input that a person can mend.
    """
    options.check()
    asked = json.loads(json.dumps(asdict(options), default=str))
    noted = options.out / "options.json"
    if noted.is_file() and json.loads(noted.read_text()) != asked:
        raise InputError(f"{options.out} holds a run with other options; give those, or another folder")
    if not noted.is_file() and options.out.is_dir() and any(options.out.iterdir()):
        raise InputError(f"{options.out} is not empty; give a new folder")
    try:
        schedule = _schedule(options)
        start, result = options.out / "start", _at_once(options)
    except ValueError as error:
        raise InputError(str(error)) from error
    save_json(noted, asked)
    models = {"as given": options.model, "pruned at once": start}
    if options.training is not None:
        is_gradual = schedule is not None and not options.remove
        callbacks = (
            [PruningCallback(schedule, options.method, **_selection(options))] if is_gradual and schedule else []
        )
        run = options.out / "training"
        given = {**vars(options.training), "model": options.model if is_gradual else start, "out": run}
        train_language_model(LanguageModelOptions(**given), command, callbacks)
        models["trained on"] = run / "model"
        data = options.training.valid or options.training.data[0]
        result["scores"] = _scores(models, data, options.training.context)
    result |= {"command": command, "models": {name: str(folder) for name, folder in models.items()}}
    save_json(options.out / "pruning.json", result)
    return result


def _schedule(options: PruningOptions) -> PruningSchedule | None:
    if options.training is None or options.remove:
        return None
    steps = options.training.steps
    recovery = max(steps // 3, 1) if options.recovery is None else options.recovery
    times = 1 if options.method == "n:m" else options.times
    every = max((steps - recovery) // max(times - 1, 1), 1)
    amount = options.amount
    if options.method == "n:m":
        n, m = options.pattern or (2, 4)
        amount = 1 - n / m
    schedule = PruningSchedule(amount or 0.0, times, every, shape=options.shape, recovery=recovery)
    if schedule.steps > steps:
        raise InputError(
            f"--times {times} and --recovery {recovery} need {schedule.steps} steps, more than --steps {steps}"
        )
    return schedule


def _selection(options: PruningOptions) -> dict[str, Any]:
    given: dict[str, Any] = {"scope": options.scope, "pattern": options.pattern, "include": options.include}
    if options.method == "random":
        given["seed"] = options.seed
    return {**{name: value for name, value in given.items() if value is not None}, "exclude": options.exclude}


def _at_once(options: PruningOptions) -> dict[str, Any]:
    """Prune or shrink, write `start/`, and tell what was done."""
    model, tokenizer = load_language_model(options.model)
    before = model.num_parameters()
    if noted_without_masks(model):
        restore_masks(model)
    if options.remove:
        plan = plan_shrink(
            model,
            options.remove,
            multiple_of=options.multiple_of,
            scores=_data_scores(options, model, tokenizer) if options.scores == "data" else None,
            include=options.include,
            exclude=options.exclude,
        )
        report: Any = shrink(model, plan)
        told = {"config": report.config}
    else:
        report = prune(model, options.method, options.amount, **_selection(options))
        told = {"sparsity": report.sparsity, "of_parameters": report.of_parameters}
    tqdm.write(str(report))
    start = options.out / "start"
    if not start.is_dir():
        options.out.mkdir(parents=True, exist_ok=True)
        with replacing(start) as beside:
            model.save_pretrained(beside)
            for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
                if (options.model / name).is_file():
                    shutil.copy(options.model / name, beside / name)
    return {"parameters": {"before": before, "after": model.num_parameters()}, **told}


def _data_scores(options: PruningOptions, model: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
    training = options.training
    assert training is not None
    source = parse_sources(training.data)[0]
    reading = ReadingOptions(training.text_field, training.document_separator)
    store = open_store(source.parts, tokenizer, reading, training.cache or default_cache())
    read = batched(windows(store, training.context, training.context - 1), 8)
    batches = [{"input_ids": batch["input_ids"]} for batch in itertools.islice(read, _BATCHES)]
    return measured_scores(model, list(options.remove or ()), batches)


def _scores(models: dict[str, Path], data: str, context: int) -> dict[str, dict[str, Any]]:
    scores = {name: _score(folder, data, context) for name, folder in models.items()}
    # They take turns, because a busy machine slows them all.
    loaded = {name: load_language_model(folder)[0] for name, folder in models.items()}
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(model.config.vocab_size for model in loaded.values())
    examples = [torch.randint(0, vocabulary, (8, context), generator=generator) for _ in range(_ROUNDS)]
    with torch.inference_mode():
        found = measure_latency({name: model.forward for name, model in loaded.items()}, examples)
    return {name: {**score, "milliseconds": found[name]["p50"]} for name, score in scores.items()}


def _score(folder: Path, data: str, context: int) -> dict[str, Any]:
    found = evaluate_language_model(EvaluationOptions(folder, data, context=context))
    model, _ = load_language_model(folder)
    size = (folder / "model.safetensors").stat().st_size
    return {
        "loss": found["loss"],
        "perplexity": found["perplexity"],
        "sparsity": sparsity(model).sparsity,
        "parameters": model.num_parameters(),
        "bytes": size,
    }
