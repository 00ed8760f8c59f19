"""The one table of tolerances. Errors are relative to the largest magnitude of the float64 reference.

A change to this table states the measurement that asks for it.
"""

import torch

# Forward: a few roundings of the dtype (unit roundoff 1.1e-16, 6e-8, 3.9e-3, 4.9e-4). Gradients sum over more terms.
FORWARD = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
GRADIENT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# linear_4bit with 8-bit activations (backend native_int8), normal x and W: the error is 0.7 % of the root mean square,
# measured at 4096², and at its largest 1 % of the largest output; half precision rounds once more.
INT8 = {torch.float32: 1.5e-2, torch.bfloat16: 2e-2, torch.float16: 1.5e-2}
