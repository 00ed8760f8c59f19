"""What a gate has decided, on disk: a run that is killed at any moment goes on as if it had not been."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neural_layers.distill.checkpoint import remove_newer
from neural_layers.distill.files import save_json
from neural_layers.distill.gate import Rollback
from neural_layers.errors import InputError

_FILE = "gate.json"


@dataclass
class GateState:
    """The rollbacks of a training, kept in `folder`/gate.json beside its checkpoints.

    folder:      of the checkpoints
    validations: the folder of `step-N.json`, where a rollback puts what it takes back into `rollback-K/`
    rollbacks:   the decisions; they count from the moment that they are written
    stopped_at:  the step whose degradation ended the training, None while it goes on
    carried_out: how many rollbacks are done: all later checkpoints and validations away
    """

    folder: Path
    validations: Path | None = None
    rollbacks: list[Rollback] = field(default_factory=list)
    stopped_at: int | None = None
    carried_out: int = 0

    @classmethod
    def open(cls, folder: Path, validations: Path | None) -> "GateState":
        """What is on disk, with a rollback that was cut off carried out. Raises InputError where it cannot be read."""
        state = cls(folder, validations, **_read(folder))
        state.carry_out()
        return state

    def begin(self) -> None:
        """Forget what another training has left here."""
        (self.folder / _FILE).unlink(missing_ok=True)

    def add(self, rollback: Rollback) -> None:
        """Decide for a rollback, and carry it out."""
        self.rollbacks.append(rollback)
        self._write()
        self.carry_out()

    def stop(self, step: int) -> None:
        """Decide that the training ends."""
        self.stopped_at = step
        self._write()

    def carry_out(self) -> None:
        """Take away what the decided rollbacks leave behind; nothing where that is done."""
        while self.carried_out < len(self.rollbacks):
            rollback = self.rollbacks[self.carried_out]
            remove_newer(self.folder, rollback.to)
            self._set_aside(rollback.to, self.carried_out + 1)
            self.carried_out += 1
            self._write()

    def factor(self, checkpoint: dict[str, Any], lr_factor: float) -> float:
        """What the learning rate of a checkpoint's schedule is still to be multiplied by."""
        return float(lr_factor ** (len(self.rollbacks) - checkpoint.get("rollbacks", 0)))

    def _set_aside(self, step: int, number: int) -> None:
        if self.validations is None:
            return
        for file in self.validations.glob("step-*.json"):
            if int(file.stem.removeprefix("step-")) > step:
                aside = self.validations / f"rollback-{number}"
                aside.mkdir(exist_ok=True)
                file.replace(aside / file.name)

    def _write(self) -> None:
        rollbacks = [rollback.as_dict() for rollback in self.rollbacks]
        content = {"rollbacks": rollbacks, "stopped_at": self.stopped_at, "carried_out": self.carried_out}
        save_json(self.folder / _FILE, content)


def decided(folder: Path) -> tuple[int, int | None]:
    """How many rollbacks the training in `folder` has decided for, and the step at which it ended by its gate.

    Raises InputError where that cannot be read.
    """
    found = _read(folder)
    return len(found.get("rollbacks", [])), found.get("stopped_at")


def _read(folder: Path) -> dict[str, Any]:
    file = folder / _FILE
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        rollbacks = [Rollback(**entry) for entry in found["rollbacks"]]
        return {"rollbacks": rollbacks, "stopped_at": found["stopped_at"], "carried_out": found["carried_out"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no gate's record ({error}); give another --out") from error
