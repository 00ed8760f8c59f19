"""The arguments of an `ExactTrainer`, as far as all recipes share them."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments


def exact_arguments(folder: Path, *, steps: int, eval_steps: int, save_steps: int, **own: Any) -> TrainingArguments:
    """`TrainingArguments` for `steps` steps with checkpoints in `folder`, and what is the recipe's own.

    Batches come from a feed, progress is shown by callbacks of ours, and a loss that is not finite is told.
    """
    shared: dict[str, Any] = {
        "optim": "adamw_torch_fused",
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "logging_steps": max(1, steps // 100),
        "logging_nan_inf_filter": False,
        "ignore_data_skip": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "use_cpu": not torch.cuda.is_available(),
    }
    lengths = {"max_steps": steps, "eval_steps": eval_steps, "save_steps": save_steps}
    return TrainingArguments(output_dir=str(folder), **{**shared, **lengths, **own})
