"""The laws that every sequence mixer obeys, as a check for ours and for anybody's."""

from neural_layers.testing.check import LawReport, LawResult, check_mixer
from neural_layers.testing.laws import LAWS

__all__ = ["LAWS", "LawReport", "LawResult", "check_mixer"]
