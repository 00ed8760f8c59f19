"""Numbers as a reader wants them: thousands separators, about three digits, no unit (that stands in the header)."""

import math

BYTES_PER_MB = 1e6


def count(value: int) -> str:
    """A whole number with thousands separators: 61234 -> "61,234"."""
    return f"{value:,}"


def digits(value: float) -> str:
    """Three significant digits, never fewer than the whole part has: 0.01234 -> "0.0123", 12345.6 -> "12,346"."""
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def megabytes(size_bytes: int) -> str:
    """Bytes as megabytes of 10^6 bytes."""
    return digits(size_bytes / BYTES_PER_MB)


def score(value: float) -> str:
    """A BLEU, chrF or TER with one decimal."""
    return f"{value:.1f}"


def percent(ratio: float) -> str:
    """A ratio in percent with one decimal."""
    return f"{100 * ratio:.1f}"


def times(ratio: float) -> str:
    """A factor: one decimal below 100, none from there on."""
    return f"{ratio:,.1f}" if ratio < 99.95 else f"{ratio:,.0f}"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}:{minutes:02}:{rest:02}"
