"""Where and when a measurement was made: all that a reader needs to judge it."""

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import neural_layers

PACKAGES = (
    "numpy", "transformers", "triton", "mambapy", "bitsandbytes", "mamba-ssm", "causal-conv1d", "flash-attn",
    "liger-kernel", "onnxruntime", "matplotlib",
)  # fmt: skip
# Of a processor's flags, those that say how wide and on what types it computes.
_FLAGS = re.compile(r"sse4_2|avx.*|fma|f16c|amx.*|asimd.*|sve.*|bf16|i8mm")
_VARIABLES = (
    "NEURAL_LAYERS_CPU", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_AFFINITY", "GOMP_CPU_AFFINITY", "GLIBC_TUNABLES",
    "LD_PRELOAD",
)  # fmt: skip
_ROOT = Path(__file__).resolve().parent.parent


def describe_environment(device: str, threads: int) -> dict[str, Any]:
    """The machine, the versions and the moment, as JSON can hold them."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "kind": device,
        "cpu": {"name": cpu_name(), "flags": cpu_flags(), "cores": _cores()},
        "threads": threads,
        "load": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "native": _native_variant(),
        "platform": platform.platform(),
        "versions": _versions(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def machine_slug(device: str) -> str:
    """The folder's name for this machine's results, e.g. `amd-epyc-avx512-2-cores` or `nvidia-h200`."""
    if device == "cuda":
        return _slug(torch.cuda.get_device_name())
    flags = " ".join(cpu_flags())
    widest = next((name for name in ("avx512", "avx2", "sve", "asimd") if name in flags), platform.machine())
    return _slug(f"{cpu_name()} {widest} {_cores()} cores")


def commit() -> str | None:
    """The checkout's commit, with `+changes` where files differ from it; None outside a checkout."""
    if not (_ROOT / ".git").exists():
        return None
    revision = _git("rev-parse", "--short=12", "HEAD")
    # What a recording itself writes is no change to what was measured.
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs")
    return revision and f"{revision}{'+changes' if changed else ''}"


def cpu_name() -> str:
    """The processor's model name."""
    found = _cpuinfo("model name") or platform.processor() or platform.machine()
    return re.sub(r"\s+", " ", re.sub(r"\((R|TM)\)|CPU|@.*|\d+-Core Processor", "", found, flags=re.I)).strip()


def cpu_flags() -> list[str]:
    """The vector instructions that the processor has, where the system tells."""
    listed = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    return sorted(flag for flag in listed if _FLAGS.fullmatch(flag))


def _cpuinfo(key: str) -> str | None:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return None
    lines = (line.partition(":") for line in path.read_text().splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), None)


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _native_variant() -> str | None:
    """The variant of the C kernels, or None where they are not built."""
    from neural_layers.kernels import c_library

    return c_library.VARIANT or None


def _versions() -> dict[str, str]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "neural_layers": neural_layers.__version__,
    }
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
