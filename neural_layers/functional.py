"""The public door to the ops: `import neural_layers.functional as F`."""

from neural_layers.kernels.causal_conv1d import causal_conv1d
from neural_layers.kernels.flash_attention import flash_attention
from neural_layers.kernels.geglu import geglu
from neural_layers.kernels.rms_norm import rms_norm
from neural_layers.kernels.rotary import apply_rotary
from neural_layers.kernels.selective_scan import selective_scan
from neural_layers.kernels.selective_scan_step import selective_scan_step
from neural_layers.kernels.swiglu import swiglu

__all__ = [
    "apply_rotary",
    "causal_conv1d",
    "flash_attention",
    "geglu",
    "rms_norm",
    "selective_scan",
    "selective_scan_step",
    "swiglu",
]
