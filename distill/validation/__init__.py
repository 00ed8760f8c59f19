"""Validation by translating."""

from neural_layers.distill.validation.metrics import Quality, translation_quality
from neural_layers.distill.validation.translation import TranslationValidator, translate

__all__ = ["Quality", "TranslationValidator", "translate", "translation_quality"]
