"""mypy on the unpacked wheel: the checkout's layout is not the package's, and mypy would name files twice.

Run as `python -m tests.check_types`.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build_wheel(folder: Path) -> Path:
    """Build the wheel of the checkout into `folder`, with the build tools that are installed."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
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
