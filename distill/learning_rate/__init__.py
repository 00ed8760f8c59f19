"""A learning rate found by a range test (arXiv 1506.01186) on any `transformers.Trainer`."""

from neural_layers.distill.learning_rate.curve import LearningRateCurve
from neural_layers.distill.learning_rate.finder import DEFAULT_STEPS, find_learning_rate

__all__ = ["DEFAULT_STEPS", "LearningRateCurve", "find_learning_rate"]
