"""Settings that every test shares."""

import os

# Before torch is imported: a run of the suite uses the cores for its workers, not for threads inside a test.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("repository", deadline=None, derandomize=True, database=None, max_examples=10)
settings.load_profile("repository")
torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Without a GPU, Triton's kernels run in its interpreter. Triton reads this when a kernel is decorated, its own
    # functions included, so it is set here, before any test imports triton. torch.compile on the CPU does not mind.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def poisoned_memory():
    """Fill fresh memory with NaN, so that an output element that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
