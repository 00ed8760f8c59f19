"""Kill a run of `neural-layers distill cvm` at random moments, and continue it: `python -m tests.chaos [--kills N]`.

The run is short but has everything: a teacher, a student whose learning rate is too high, so that its gate goes back to
an earlier checkpoint, validations, checkpoints every other step. It is done once without a disturbance. Then it is
started, killed by SIGKILL, and started again, until it was killed so often; most kills come while it trains, validates
or saves, every fifth while it starts. Then it may end. Weights, optimiser state, validations and rollbacks of both runs
must be equal to the last bit, and nothing half written may be left. Exits with 1 where they are not.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm.auto import tqdm

DEGRADED = 3  # the student of so few steps keeps too little; the run is whole nonetheless
RUN = [
    *("--preset", "tiny", "--teacher-steps", "16", "--steps", "120", "--batch", "8", "--lr", "0.05", "--warmup", "4"),
    *("--eval-steps", "8", "--save-steps", "2", "--eval-sentences", "8", "--metric", "chrf", "--max-drop", "0.01"),
    *("--confidence", "0.5", "--samples", "50", "--gate-patience", "4", "--threads", "1"),
]
WHILE_RUNNING = 4.0  # seconds after the first sign of life within which a run is killed


def start(out: Path) -> subprocess.Popen[bytes]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "neural_layers", "distill", "cvm", "--out", str(out), *RUN]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def contents(out: Path) -> dict[str, str]:
    """The files that must be equal, with their hashes."""
    kept = [*out.rglob("*.safetensors"), *out.glob("validation/**/*.json"), *out.rglob("gate.json")]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def last_change(out: Path) -> float:
    """When a file in the run's folder was last written; 0 for none."""
    times = [0.0]
    for folder, _, names in os.walk(out):  # which passes over folders that are renamed meanwhile
        for name in names:
            try:
                times.append(os.stat(os.path.join(folder, name)).st_mtime)
            except FileNotFoundError:
                continue
    return max(times)


def kill_once(out: Path, number: int, startup: float, chance: random.Random) -> bool:
    """Start the run and kill it; False where it was over before."""
    begun = time.time()
    process = start(out)
    if number % 5 == 0:
        pause = chance.uniform(0, startup)
    else:
        while last_change(out) < begun and process.poll() is None:
            time.sleep(0.02)
        pause = chance.uniform(0, WHILE_RUNNING)
    try:
        process.wait(timeout=pause)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def measure_startup(out: Path) -> float:
    """Seconds until a new run writes its first file."""
    begun, process = time.time(), start(out)
    while not last_change(out) and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    return time.time() - begun


def finish(out: Path) -> None:
    """Let the run end."""
    process = start(out)
    _, said = process.communicate()
    if process.returncode not in (0, DEGRADED):
        raise SystemExit(f"the run ended with status {process.returncode}: {said.decode()[-2000:]}")


def main() -> int:
    """0 where the disturbed run ended as the other."""
    parser = argparse.ArgumentParser(description="Kill a distillation at random moments.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        quiet, disturbed = Path(folder) / "quiet", Path(folder) / "disturbed"
        startup = measure_startup(Path(folder) / "startup")
        begun = time.time()
        finish(quiet)
        wanted = contents(quiet)
        rollbacks = len(list(quiet.glob("validation/rollback-*")))
        print(f"undisturbed: {time.time() - begun:.0f} s, {rollbacks} rollbacks, {len(wanted)} files to compare")
        if not rollbacks:
            raise SystemExit("the gate never went back, so that kills around a rollback are not tried")
        killed, runs = 0, 1
        with tqdm(total=options.kills, unit="kill") as bar:
            while killed < options.kills:
                was_killed = kill_once(disturbed, killed, startup, chance)
                killed += was_killed
                bar.update(was_killed)
                if (disturbed / "student").is_dir() and killed < options.kills:
                    # What is left is the test, which writes nothing before its end: on to another run.
                    finish(disturbed)
                    check(disturbed, wanted)
                    runs += 1
                    disturbed = Path(folder) / f"disturbed-{runs}"
        finish(disturbed)
        check(disturbed, wanted)
    print(f"{killed} kills in {runs} runs: every file is the same, and nothing is left half written")
    return 0


def check(out: Path, wanted: dict[str, str]) -> None:
    """Exit with 1 where the run's files are not those of the undisturbed one."""
    found = contents(out)
    different = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if different:
        raise SystemExit(f"{len(different)} files differ from the undisturbed run's: {', '.join(different[:5])}")
    left = [*out.rglob("*.part"), *out.rglob("*.old")]
    if left:
        raise SystemExit(f"{left[0]} was left")


if __name__ == "__main__":
    sys.exit(main())
