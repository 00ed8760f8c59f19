"""Pruning: weights that become zero and stay zero, and units that are removed.

`prune` sets weights to zero by a mask, which holds through training, saving and loading; `shrink` takes feed-forward
units, heads and recurrent channels out of their matrices, which is what makes a model smaller and faster.
"""

from neural_layers.wrappers.pruning.activations import measured_scores
from neural_layers.wrappers.pruning.masks import apply_masks, mask_of, masks
from neural_layers.wrappers.pruning.plan import ShrinkPlan, plan_shrink, unit_scores
from neural_layers.wrappers.pruning.prune import prune
from neural_layers.wrappers.pruning.report import LayerSparsity, PruningReport, sparsity
from neural_layers.wrappers.pruning.saving import load_masks, restore_masks, save_masks, unprune
from neural_layers.wrappers.pruning.schedule import PruningSchedule
from neural_layers.wrappers.pruning.shrink import ShrinkReport, mask_units, shrink

__all__ = [
    "LayerSparsity",
    "PruningReport",
    "PruningSchedule",
    "ShrinkPlan",
    "ShrinkReport",
    "apply_masks",
    "load_masks",
    "mask_of",
    "mask_units",
    "masks",
    "measured_scores",
    "plan_shrink",
    "prune",
    "restore_masks",
    "save_masks",
    "shrink",
    "sparsity",
    "unit_scores",
    "unprune",
]
