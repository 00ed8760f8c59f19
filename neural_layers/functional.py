"""The public door to the ops: `import neural_layers.functional as F`."""

from neural_layers.kernels.geglu import geglu
from neural_layers.kernels.rms_norm import rms_norm
from neural_layers.kernels.rotary import apply_rotary
from neural_layers.kernels.swiglu import swiglu

__all__ = ["apply_rotary", "geglu", "rms_norm", "swiglu"]
