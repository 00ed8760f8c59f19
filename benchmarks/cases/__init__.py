"""The table of all benchmarks. A file here holds those of an op or of a family of ops, as `CASES`."""

import neural_layers.functional as F
from neural_layers.benchmarks.case import Case
from neural_layers.benchmarks.cases import (
    apply_rotary,
    causal_conv1d,
    decode,
    flash_attention,
    four_bit,
    gates,
    linear,
    linear_cross_entropy,
    linear_int4,
    linear_int8,
    linear_kl_div,
    lora,
    quantized_models,
    rms_norm,
    selective_scan,
    ssd_scan,
    train_step,
)
from neural_layers.errors import InputError

_FILES = (
    selective_scan, ssd_scan, causal_conv1d, flash_attention, apply_rotary, rms_norm, gates, four_bit, linear_int8,
    linear_int4, linear, linear_cross_entropy, linear_kl_div, decode, train_step, quantized_models, lora,
)  # fmt: skip

CASES: dict[str, Case] = {case.name: case for file in _FILES for case in file.CASES}


def ops() -> tuple[str, ...]:
    """The ops, and what models do, that have a benchmark, in the table's order."""
    return tuple(dict.fromkeys(case.op for case in CASES.values()))


def default_ops() -> tuple[str, ...]:
    """Those of `ops` that run where none is named: what models do takes long, and is named."""
    return tuple(op for op in ops() if op in F.__all__)


def cases_of(op: str) -> tuple[Case, ...]:
    """The benchmarks of an op; raises InputError for an op that has none."""
    if op not in ops():
        raise InputError(f"there is no benchmark of {op!r}; there are {', '.join(ops())}")
    return tuple(case for case in CASES.values() if case.op == op)
