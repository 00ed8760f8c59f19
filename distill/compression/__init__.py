"""What becomes of a student that is made smaller: its quality, size, speed and memory in each form.

`check_variants` reads names, `compress` makes the forms, `measure_compressed` measures them and puts them through the
gate's threshold.
"""

from neural_layers.distill.compression.compress import Compressed, compress, predictor
from neural_layers.distill.compression.measure import Threshold, measure_compressed
from neural_layers.distill.compression.variants import DESCRIPTIONS, check_variants

__all__ = [
    "DESCRIPTIONS",
    "Compressed",
    "Threshold",
    "check_variants",
    "compress",
    "measure_compressed",
    "predictor",
]
