"""Choosing backends, and telling why."""

import pytest
import torch

import neural_layers.functional as F
from neural_layers import BackendError, SlowBackendWarning, explain, use_backend
from neural_layers.kernels import dispatch
from neural_layers.kernels.dispatch import OPS, Backend, Op

X = torch.ones(2, 3)


@pytest.fixture
def op():
    def refuse_long(x: torch.Tensor, scale: float = 1.0) -> str | None:
        return "x has more than four elements" if x.numel() > 4 else None

    def check(x: torch.Tensor, scale: float = 1.0) -> None:
        if scale == 0:
            raise ValueError("scale=0 must not be zero")

    def plain(x: torch.Tensor, scale: float = 1.0) -> str:
        return "plain"

    def fast(x: torch.Tensor, scale: float = 1.0) -> str:
        return "fast"

    backends = (Backend("fast", fast, refuse_long), Backend("plain", plain, slow="about 9 times slower"))
    yield Op("sample", check=check, backends=backends)
    del OPS["sample"]
    dispatch._warned.clear()


def test_auto_takes_the_first_backend_that_can(op) -> None:
    assert op("auto", torch.ones(4)) == "fast"


def test_a_slow_fallback_warns_once_and_says_what_would_be_faster(op) -> None:
    with pytest.warns(SlowBackendWarning, match="'plain', about 9 times slower: 'fast' cannot: x has more than four"):
        assert op("auto", torch.ones(5)) == "plain"
    assert op("auto", torch.ones(5)) == "plain"  # a second warning would be an error


def test_no_warning_where_the_slow_backend_was_asked_for_or_only_explained(op) -> None:
    assert op("plain", torch.ones(5)) == "plain"
    with use_backend(sample="plain"):
        assert op("auto", torch.ones(5)) == "plain"
    assert explain("sample", torch.ones(5)).backend == "plain"


def test_a_backend_asked_for_that_cannot_raises_with_the_reason(op) -> None:
    with pytest.raises(BackendError, match="'fast' of sample cannot run: x has more than four elements"):
        op("fast", torch.ones(5))


def test_an_unknown_backend_raises_with_the_names_there_are(op) -> None:
    with pytest.raises(BackendError, match="no backend 'trition'; it has 'auto', 'fast', 'plain'"):
        op("trition", torch.ones(5))


def test_arguments_are_checked_before_a_backend_is_chosen(op) -> None:
    with pytest.raises(ValueError, match="scale=0"):
        op("auto", torch.ones(4), scale=0)


def test_explain_gives_the_choice_and_a_reason_against_each_other(op) -> None:
    long = explain("sample", torch.ones(5))
    assert (long.backend, long.reasons) == ("plain", {"fast": "x has more than four elements"})
    assert explain("sample", torch.ones(4)).reasons == {"plain": "could run; slower here"}
    assert explain("sample", torch.ones(4), backend="plain").reasons == {"fast": "could run; 'plain' was asked for"}
    assert "fast   x has more" in str(long)


def test_explain_of_an_unknown_op_lists_the_ops() -> None:
    with pytest.raises(ValueError, match="no op 'softmax'; there are .*flash_attention.*rms_norm"):
        explain("softmax", X)


def test_explain_checks_the_arguments_as_the_op_does() -> None:
    with pytest.raises(ValueError, match="weight has shape"):
        explain("rms_norm", X, torch.ones(4))


def test_use_backend_forces_and_restores(op) -> None:
    with use_backend(sample="plain"):
        assert op("auto", torch.ones(4)) == "plain"
        assert op("fast", torch.ones(4)) == "fast"  # named by the caller
        with use_backend(sample="auto"):
            assert op("auto", torch.ones(4)) == "fast"
        assert op("auto", torch.ones(4)) == "plain"
    assert op("auto", torch.ones(4)) == "fast"


def test_use_backend_refuses_what_does_not_exist() -> None:
    with pytest.raises(ValueError, match="no op 'rmsnorm'"), use_backend(rmsnorm="torch"):
        pass
    with pytest.raises(BackendError, match="no backend 'cuda'"), use_backend(rms_norm="cuda"):
        pass


def test_use_backend_reaches_a_compiled_function() -> None:
    compiled = torch.compile(lambda x: F.rms_norm(x, torch.ones(3)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), X)
    with use_backend(rms_norm="reference"):
        torch.testing.assert_close(compiled(X), X)


@pytest.mark.parametrize("name", F.__all__)
def test_every_public_op_is_registered_with_a_reference_last(name) -> None:
    assert OPS[name].backends[-1].name == "reference"
