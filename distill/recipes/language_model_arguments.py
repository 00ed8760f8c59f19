"""The settings of transformers' Trainer for the training of a language model."""

import os

import torch
from transformers import TrainingArguments

from neural_layers.distill.recipes.language_model_options import LanguageModelOptions
from neural_layers.distill.recipes.language_model_run import LanguageModelRun
from neural_layers.distill.tracking import tracker_names, tracking_arguments


def training_arguments(options: LanguageModelOptions, run: LanguageModelRun, validates: bool) -> TrainingArguments:
    """Those that the options ask for; `validates` is whether there is a text to validate on."""
    is_cpu = not torch.cuda.is_available()
    is_distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1  # torchrun sets it
    trackers = tracker_names(options.report_to)
    schedule, extra = options.schedule, {}
    if schedule == "cosine":
        schedule, extra = (
            "cosine_with_min_lr",
            {"min_lr": options.lr / 10 if options.min_lr is None else options.min_lr},
        )
    elif schedule == "constant":
        schedule = "constant_with_warmup"
    return TrainingArguments(
        output_dir=str(run.checkpoint_folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.lr,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=extra,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        adam_beta2=options.beta2,
        max_grad_norm=options.clip,
        optim="adamw_torch" if options.fsdp else "adamw_torch_fused",
        bf16=options.bf16,
        eval_strategy="steps" if validates else "no",
        eval_steps=options.eval_steps,
        metric_for_best_model="loss",
        greater_is_better=False,
        save_strategy="steps",
        save_steps=options.save_steps,
        logging_steps=max(1, min(options.steps // 100, 50)),
        logging_nan_inf_filter=False,
        seed=options.seed,
        ignore_data_skip=True,
        # TensorBoard is written with the log.
        **tracking_arguments(tuple(name for name in trackers if name != "tensorboard"), run.path, run.path.name),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        use_cpu=is_cpu,
        ddp_backend="gloo" if is_cpu and is_distributed else None,
    )
