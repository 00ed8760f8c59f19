"""Side-by-side benchmarks: every backend of an op and its peers, interleaved in one process.

`python -m benchmarks` in a checkout, `neural-layers bench` where the package is installed.
"""

from neural_layers.benchmarks.cases import CASES, default_ops, ops
from neural_layers.benchmarks.run import run_benchmarks

__all__ = ["CASES", "default_ops", "ops", "run_benchmarks"]
