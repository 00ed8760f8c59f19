"""Losses of distillation: divergences from a teacher, hidden states, hard labels."""

from neural_layers.distill.losses.distillation import DistillationLoss
from neural_layers.distill.losses.outputs import Outputs
from neural_layers.distill.losses.schedule import Schedule
from neural_layers.distill.losses.states import StateAlignment
from neural_layers.distill.losses.top_k import TopK

__all__ = ["DistillationLoss", "Outputs", "Schedule", "StateAlignment", "TopK"]
