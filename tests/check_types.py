"""mypy on the unpacked wheel: the checkout's layout is not the package's, and mypy would name files twice.

Run as `python -m tests.check_types`.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def source_files(*patterns: str) -> list[Path]:
    """The checkout's files, relative to its root: those that git tracks, and new ones that it does not ignore."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [Path(line) for line in listed if (ROOT / line).is_file()]


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the checkout's files, with the build tools that are installed.

    A copy, because setuptools takes what an earlier build left in `build/` into the wheel.
    """
    source = folder / "source"
    for path in source_files():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, source / path)
    if (ROOT / "build" / "kernels").is_dir():
        # What is compiled already need not be compiled again.
        shutil.copytree(ROOT / "build" / "kernels", source / "build" / "kernels")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the wheel does not build:\n{done.stdout}{done.stderr}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack_wheel(folder: Path) -> Path:
    """Build the wheel and unpack it below `folder`; return the folder to put on the path."""
    site = folder / "site"
    with zipfile.ZipFile(build_wheel(folder)) as wheel:
        wheel.extractall(site)
    return site


def main() -> int:
    """Check the package's types; the exit status of mypy."""
    with tempfile.TemporaryDirectory() as temporary:
        site = unpack_wheel(Path(temporary))
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "neural_layers"]
        return subprocess.run(command, cwd=site, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
