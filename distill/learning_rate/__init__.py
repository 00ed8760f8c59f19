"""A learning rate found by a range test (arXiv 1506.01186) on any `transformers.Trainer`."""

from neural_layers.distill.learning_rate.curve import LearningRateCurve
from neural_layers.distill.learning_rate.finder import find_learning_rate

__all__ = ["LearningRateCurve", "find_learning_rate"]
