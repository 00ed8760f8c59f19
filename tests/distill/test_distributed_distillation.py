"""Two processes under torchrun distil as one does, and go back together."""

import json

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from safetensors.torch import load_file

from tests.distill.gated_runs import STEPS, spiked_run
from tests.distill.language_runs import start

PROGRAM = """
import json, os, sys
from pathlib import Path
from tests.distill.gated_runs import spiked_run
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
trainer = spiked_run(Path(sys.argv[1]), rank=rank, world=world, is_plain=True)
told = {"wrapped": type(trainer.model_wrapped).__name__, "history": trainer.state.log_history, "rank": rank}
told["rollbacks"] = [rollback.as_dict() for rollback in trainer.rollbacks]
Path(sys.argv[1], f"told-{rank}.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What each of two processes tells of a run with a planted degradation, and the run's folder."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "program.py").write_text(PROGRAM)
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    process = start([*torchrun, "--rdzv-endpoint", "localhost:0", str(folder / "program.py"), str(folder)])
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    return folder, [json.loads((folder / f"told-{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_distil_to_the_loss_of_one_and_go_back_together(together, tmp_path) -> None:
    folder, told = together
    alone = spiked_run(tmp_path, is_plain=True)
    assert len(alone.rollbacks) == 1
    for one in told:
        assert one["wrapped"] == "DistributedDataParallel"
        (rollback,) = one["rollbacks"]
        assert (rollback["step"], rollback["to"]) == (alone.rollbacks[0].step, alone.rollbacks[0].to)
        for name in ("loss", "kl", "hard", "grad_norm", "eval_accuracy", "learning_rate"):
            expected = [entry[name] for entry in alone.state.log_history if name in entry]
            assert len(expected) >= 5
            assert [entry[name] for entry in one["history"] if name in entry] == pytest.approx(expected, rel=2e-3)
    weights = [load_file(path / "model" / "model.safetensors") for path in (tmp_path, folder)]
    for name, value in weights[0].items():
        assert (value - weights[1][name]).abs().max() < 5e-3, name
    assert alone.state.global_step == STEPS
