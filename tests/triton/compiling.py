"""Compiling kernels for a GPU that is not there: launches of the real host functions on meta tensors.

Run in a process of its own (`python -m tests.triton.compiling TARGET LAUNCH …`), because a driver is chosen once and
the interpreter must be off. Prints one JSON line for each kernel that a launch compiles.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from tests.triton.launches import Launch, all_launches, faulty_launches

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Resources:
    """What one kernel of one launch takes of a target; registers and spills count for each thread."""

    target: str
    op: str
    launch: str
    kernel: str
    registers: int
    spills: int
    shared: int


class AbsentDriver(DriverBase):
    """The driver of a GPU that is not there: it says which one to compile for, and launches nothing."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__()
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("kernels that are compiled ahead of time choose their blocks without a benchmark")


class Compiler:
    """Compiles every launch for one target instead of running it, once for the process."""

    def __init__(self, target: str) -> None:
        self.target, self.compiled = target, list[tuple[str, Any]]()
        triton.runtime.driver.set_active(AbsentDriver(TARGETS[target]))
        run = JITFunction.run

        def compile_only(function: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            sizes = grid(options) if callable(grid) else grid
            assert all(0 < size < 2**31 for size in sizes[:1]), f"{function.__name__} has grid {sizes}"
            assert all(0 < size < 2**16 for size in sizes[1:]), f"{function.__name__} has grid {sizes}"
            kernel = run(function, *args, grid=grid, warmup=True, **options)
            self.compiled.append((function.__name__, kernel))
            return kernel

        JITFunction.run = compile_only

    def kernels(self, launch: Launch) -> Iterator[Resources]:
        """Compile what the launch launches; a kernel launched twice in the same form is told once."""
        self.compiled.clear()
        launch.run()
        assert self.compiled, f"{launch} launches no kernel"
        for name, kernel in {kernel.hash: (name, kernel) for name, kernel in self.compiled}.values():
            registers, spills = usage(kernel)
            yield Resources(self.target, launch.op, launch.name, name, registers, spills, kernel.metadata.shared)


def usage(kernel: Any) -> tuple[int, int]:
    """The registers of a compiled kernel, and what it spills to memory: bytes of stack, or registers on an AMD GPU.

    Scalar registers that do not fit are no spills: an AMD GPU keeps them in lanes of vector registers.
    """
    if "cubin" not in kernel.asm:
        text = kernel.asm["amdgcn"]
        (registers, *spills) = (
            int(re.search(rf"^\s*\.{field}:\s*(\d+)", text, re.MULTILINE)[1])
            for field in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        return registers, sum(spills)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{field}:(\d+)", text)[1]) for field in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def main(target: str, names: list[str]) -> None:
    compiler = Compiler(target)
    for launch in [*all_launches(), *faulty_launches()]:
        if str(launch) in names:
            for resources in compiler.kernels(launch):
                print(json.dumps(asdict(resources)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
