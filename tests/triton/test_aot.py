"""Compiling kernels ahead of time: the launches that matter most, for one target, and that faults are found.

`make aot` compiles every launch for every target.
"""

import pytest

pytest.importorskip("triton", reason="triton is not installed; pip install 'neural-layers[triton]'")

from tests.triton.aot import QUICK_TARGET, SHARED_LIMIT, compile_launches, fault, launch_names
from tests.triton.launches import all_launches


def test_quick_launches_compile_without_spills_and_within_shared_memory() -> None:
    names = launch_names([], quick=True)
    resources = list(compile_launches(QUICK_TARGET, names))
    assert {f"{r['op']}: {r['launch']}" for r in resources} == set(names)
    assert not {f"{r['op']}: {r['launch']}: {r['kernel']}": fault(r) for r in resources if fault(r)}


def test_every_op_with_kernels_has_a_quick_launch_and_names_are_unique() -> None:
    launches = all_launches()
    assert {launch.op for launch in launches} == {launch.op for launch in launches if launch.quick}
    assert len({str(launch) for launch in launches}) == len(launches)


def test_a_planted_spill_is_found() -> None:
    (resources,) = compile_launches(QUICK_TARGET, ["faulty: spills"])
    assert "spills" in fault(resources)


def test_a_kernel_that_does_not_compile_is_told() -> None:
    with pytest.raises(RuntimeError, match="compiling for sm_90 failed:(.|\n)*sum_of_a_pointer"):
        list(compile_launches(QUICK_TARGET, ["faulty: no sum of a pointer"]))


def test_shared_memory_up_to_the_limit_is_no_fault() -> None:
    resources = {"target": "gfx942", "shared": SHARED_LIMIT["gfx942"], "spills": 0}
    assert fault(resources) is None
    assert fault(resources | {"shared": SHARED_LIMIT["gfx942"] + 1}) == (
        "takes 65537 bytes of shared memory; a block may have 65536"
    )
