"""Where Triton's kernels run in these tests: on the GPU where there is one, otherwise in Triton's interpreter."""

import pytest
import torch


@pytest.fixture(params=["interpreter", "cuda"], scope="session")
def device(request) -> str:
    """The device whose tensors the kernels are given; a process has the interpreter or the GPU, not both."""
    pytest.importorskip("triton", reason="triton is not installed; pip install 'neural-layers[triton]'")
    from neural_layers.kernels.triton_support import interpreting

    if request.param == "cuda":
        if interpreting():
            has_gpu = "TRITON_INTERPRET is set" if torch.cuda.is_available() else "there is no GPU here"
            pytest.skip(f"kernels do not run natively: {has_gpu}")
        return "cuda"
    if not interpreting():
        pytest.skip("kernels run natively; TRITON_INTERPRET=1 would interpret them")
    from tests.triton.interpreter import repair

    repair()
    return "cpu"
