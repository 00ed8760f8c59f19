"""The table of benchmarks: every op has one, its sizes are complete, and all contenders compute the same."""

import pytest
import torch

import neural_layers.functional as F
from neural_layers.benchmarks.case import Case, Maker, sweep
from neural_layers.benchmarks.cases import CASES, cases_of, ops
from neural_layers.benchmarks.contenders import backends, ours, prepare
from neural_layers.benchmarks.timing import forward_backward
from neural_layers.errors import InputError

EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def test_every_op_has_a_benchmark() -> None:
    assert {case.op for case in CASES.values() if not case.ours} == set(F.__all__)
    assert all(case.op == op for op in ops() for case in cases_of(op))


def test_an_op_without_benchmark_is_named_with_those_that_have_one() -> None:
    with pytest.raises(InputError, match=r"no benchmark of 'softmax'; there are selective_scan, .*rms_norm"):
        cases_of("softmax")


@EVERY_CASE
def test_all_sizes_name_the_same_dimensions_and_differ_in_the_axis_alone(case: Case) -> None:
    assert len(case.tiny) == 2
    assert case.full
    for sizes in (case.tiny, case.quick, case.full, case.cuda):
        for size in sizes:
            assert list(size) == list(case.full[0])
            assert {**size, case.axis: 0} == {**sizes[0], case.axis: 0}
    for effort in ("tiny", "quick", "full"):
        assert case.sizes(effort, "cpu") == getattr(case, effort)
    assert case.sizes("quick", "cuda") == (case.cuda or case.quick)


@EVERY_CASE
def test_all_contenders_compute_the_same_and_give_gradients(case: Case) -> None:
    for size in case.tiny:
        inputs = case.inputs(size, "cpu")
        present = [peer.name for peer in case.peers if peer.absence("cpu", "quick") is None]
        timed = backends(case, inputs, "cpu").timed
        assert timed
        expected = None
        for name in [*map(ours, timed), *present]:
            call = prepare(case, inputs, name)
            with torch.no_grad():
                output = call.compare(call.run()).float()
            expected = output if expected is None else expected
            error = (output - expected).abs().max() / expected.abs().max()
            assert error <= case.largest_difference["cpu"], name
            # a layer's own weights may train besides
            assert len(call.leaves) >= len(case.leaves), name
            assert bool(call.leaves) == bool(case.leaves), name
            if call.leaves:
                _, grads = forward_backward(call)()
                assert [grad.shape for grad in grads] == [leaf.shape for leaf in call.leaves], name


@EVERY_CASE
def test_a_limit_is_a_call_that_runs(case: Case) -> None:
    if case.limit is None:
        pytest.skip("no limit is known")
    if case.name == "selective_scan" and F.selective_scan.__module__ and not _has_c_library():
        pytest.skip("the C kernels are not built")
    forward, both = case.limit.prepare(case.inputs(case.tiny[0], "cpu"))
    assert forward is not None
    forward()
    if both is not None:
        both()


def _has_c_library() -> bool:
    from neural_layers.kernels import c_library

    return c_library.obstacle() is None


def test_inputs_are_the_same_each_time_and_ask_for_the_gradients_that_are_measured() -> None:
    case = CASES["rms_norm"]
    first, second = (case.inputs(case.tiny[0], "cpu") for _ in range(2))
    torch.testing.assert_close(first["x"], second["x"], rtol=0, atol=0)
    assert first["x"].requires_grad
    assert first["weight"].requires_grad
    assert Maker("cpu", torch.bfloat16).normal(2).dtype == torch.bfloat16


def test_a_sweep_gives_a_size_for_each_value() -> None:
    assert sweep(T=(1, 2), E=3) == ({"T": 1, "E": 3}, {"T": 2, "E": 3})
