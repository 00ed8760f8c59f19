"""The public door to the ops: `import neural_layers.functional as F`."""

from neural_layers.kernels.causal_conv1d import causal_conv1d
from neural_layers.kernels.dequantize_4bit import dequantize_4bit
from neural_layers.kernels.dequantize_int4 import dequantize_int4
from neural_layers.kernels.flash_attention import flash_attention
from neural_layers.kernels.geglu import geglu
from neural_layers.kernels.linear import linear
from neural_layers.kernels.linear_4bit import linear_4bit
from neural_layers.kernels.linear_cross_entropy import linear_cross_entropy
from neural_layers.kernels.linear_int4 import linear_int4
from neural_layers.kernels.linear_int8 import linear_int8
from neural_layers.kernels.linear_kl_div import linear_kl_div
from neural_layers.kernels.quantize_4bit import quantize_4bit
from neural_layers.kernels.quantize_int4 import quantize_int4
from neural_layers.kernels.rms_norm import rms_norm
from neural_layers.kernels.rotary import apply_rotary
from neural_layers.kernels.selective_scan import selective_scan
from neural_layers.kernels.selective_scan_step import selective_scan_step
from neural_layers.kernels.ssd_scan import ssd_scan
from neural_layers.kernels.swiglu import swiglu

__all__ = [
    "apply_rotary",
    "causal_conv1d",
    "dequantize_4bit",
    "dequantize_int4",
    "flash_attention",
    "geglu",
    "linear",
    "linear_4bit",
    "linear_cross_entropy",
    "linear_int4",
    "linear_int8",
    "linear_kl_div",
    "quantize_4bit",
    "quantize_int4",
    "rms_norm",
    "selective_scan",
    "selective_scan_step",
    "ssd_scan",
    "swiglu",
]
