"""Validation: scores, their comparison by the paired bootstrap, and where the errors are."""

from neural_layers.distill.validation.bertscore import BertScore
from neural_layers.distill.validation.bootstrap import Comparison, paired_bootstrap, ratio_interval
from neural_layers.distill.validation.classification import ClassificationOptions, ClassificationValidator
from neural_layers.distill.validation.measures import Measure
from neural_layers.distill.validation.metrics import Quality, TranslationScorer, translation_quality
from neural_layers.distill.validation.recording import Resampling
from neural_layers.distill.validation.translation import TranslationOptions, TranslationValidator, translate

__all__ = [
    "BertScore",
    "ClassificationOptions",
    "ClassificationValidator",
    "Comparison",
    "Measure",
    "Quality",
    "Resampling",
    "TranslationOptions",
    "TranslationScorer",
    "TranslationValidator",
    "paired_bootstrap",
    "ratio_interval",
    "translate",
    "translation_quality",
]
