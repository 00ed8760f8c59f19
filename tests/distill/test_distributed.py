"""Two processes under torchrun train to the loss of one: DDP and FSDP2, on the CPU with gloo."""

import json
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")

from safetensors.torch import load_file

from neural_layers.distill.recipes.language_model import train_language_model
from tests.distill.language_runs import log_of, small_options, start, weights_of, write_corpus

# One after another in the same two processes, as torchrun takes long to start. Tells at every checkpoint how the model
# is wrapped and how much of it this process holds: what falls back to DDP would train to the same loss.
PROGRAM = """
import json, shutil, sys
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
from neural_layers.distill.recipes.language_model import train_language_model
from neural_layers.distill.recipes.language_model_options import LanguageModelOptions
from neural_layers.distill.recipes.language_model_trainer import LanguageModelTrainer
from neural_layers.errors import InputError

real, wrapped = LanguageModelTrainer._save_checkpoint, []
def save(self, model, trial):
    own = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
    wrapped.append([type(model).__name__, own / sum(p.numel() for p in model.parameters())])
    real(self, model, trial)
LanguageModelTrainer._save_checkpoint = save

told = []
for record in json.loads(Path(sys.argv[1]).read_text()):
    paths = {name: Path(record[name]) for name in ("out", "cache")}
    options = LanguageModelOptions(**{**record, **paths, "data": tuple(record["data"])})
    try:
        train_language_model(options)
        told.append(wrapped[-1])
        if options.out.name.startswith("resumed"):
            # Go on from the middle; what it ended with is kept aside.
            if torch.distributed.get_rank() == 0:
                (options.out / "model").rename(options.out.with_name(options.out.name + " whole"))
                shutil.rmtree(options.out / "checkpoints" / "checkpoint-4")
                (options.out / "report.json").unlink()
            torch.distributed.barrier()
            train_language_model(options)
    except InputError as error:
        told.append(str(error))
if torch.distributed.get_rank() == 0:
    Path(sys.argv[2]).write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Any:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    write_corpus(folder / "data")
    options = small_options(folder, steps=4, accumulate=2, eval_steps=2, save_steps=2)
    train_language_model(options)
    return options


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory) -> Any:
    """Runs of two processes: the options of each, and what was told of it."""
    folder = tmp_path_factory.mktemp("together")
    runs = {
        "ddp": replace(alone, out=folder / "ddp"),
        "fsdp2": replace(alone, out=folder / "fsdp2", fsdp=True),
        "resumed ddp": replace(alone, out=folder / "resumed ddp", dropout=0.1),
        "resumed fsdp2": replace(alone, out=folder / "resumed fsdp2", fsdp=True, dropout=0.1),
        "odd batch": replace(alone, out=folder / "odd", batch=3),
    }
    order = list(runs)
    (folder / "program.py").write_text(PROGRAM)
    (folder / "runs.json").write_text(json.dumps([runs[name].record() for name in order]))
    program = [str(folder / name) for name in ("program.py", "runs.json", "told.json")]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    process = start([*torchrun, "--rdzv-endpoint", "localhost:0", *program])
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    told = json.loads((folder / "told.json").read_text())
    return runs, dict(zip(order, told, strict=True))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_to_the_loss_of_one(alone, together, kind: str) -> None:
    runs, _ = together
    options = runs[kind]
    for name in ("loss", "eval_loss", "grad_norm"):
        expected = [record[name] for record in log_of(alone.out) if name in record]
        assert [record[name] for record in log_of(options.out) if name in record] == pytest.approx(expected, rel=1e-4)
    one, two = (load_file(run.out / "model" / "model.safetensors") for run in (alone, options))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert (value - two[name]).abs().max() < 1e-4, name


def test_each_process_holds_all_of_the_model_under_ddp_and_half_of_it_under_fsdp2(together) -> None:
    _, told = together
    assert told["ddp"] == ["DistributedDataParallel", 1.0]
    name, share = told["fsdp2"]
    assert name.startswith("FSDP")
    assert share == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("kind", ["resumed ddp", "resumed fsdp2"])
def test_a_run_of_two_processes_resumes_to_the_same_bits(together, kind: str) -> None:
    out = together[0][kind].out
    assert weights_of(out) == (out.with_name(f"{kind} whole") / "model.safetensors").read_bytes()


def test_a_batch_that_does_not_divide_is_told(together) -> None:
    assert together[1]["odd batch"] == "--batch 3 cannot be divided over 2 processes; give a multiple of 2"
