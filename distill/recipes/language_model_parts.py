"""What the recipe of a language model is made of; a training of another kind replaces some of it."""

from typing import Any

from neural_layers.distill.recipes.language_model_building import build_model
from neural_layers.distill.recipes.language_model_options import LanguageModelOptions
from neural_layers.distill.recipes.language_model_run import LanguageModelRun
from neural_layers.distill.recipes.language_model_trainer import LanguageModelTrainer


class LanguageModelParts:
    """The parts of a training of all weights.

    title: of the report. run: the folder. trainer: with the arguments of `LanguageModelTrainer`.
    """

    title = "language model"
    run: type[LanguageModelRun] = LanguageModelRun
    trainer: type[LanguageModelTrainer] = LanguageModelTrainer

    def build(self, options: LanguageModelOptions, tokenizer: Any) -> Any:
        """The model that the training begins with. Raises InputError for what a person can mend."""
        return build_model(options, tokenizer)

    def begin(self, trainer: LanguageModelTrainer, run: LanguageModelRun) -> None:
        """Called before the first step of this process, where a run is continued too."""

    def report(self, trainer: LanguageModelTrainer, run: LanguageModelRun) -> dict[str, Any]:
        """What the report has besides, after the last step."""
        return {}
