"""What a quantization did, layer by layer."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerReport:
    """name, scheme; parameters: how many weights; bytes_before, bytes_after: of the weight with its scales, 0 where it
    is that of another layer."""

    name: str
    scheme: str
    parameters: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantizationReport:
    """layers: what was quantized. skipped: the reason of each layer with a weight matrix that was not.
    bytes_before, bytes_after: of all parameters and buffers of the model, shared memory once. `str()` is a table."""

    layers: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """bytes_before / bytes_after."""
        return self.bytes_before / max(self.bytes_after, 1)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "scheme", "weights", "bytes before", "after", "ratio")]
        for layer in self.layers:
            # A layer that shares its weight has hardly any bytes of its own.
            ratio = f"{layer.bytes_before / layer.bytes_after:.2f}" if layer.bytes_after else "shared"
            numbers = [f"{n:,}" for n in (layer.parameters, layer.bytes_before, layer.bytes_after)]
            rows.append((layer.name, layer.scheme, *numbers, ratio))
        total = [f"{n:,}" for n in (self.bytes_before, self.bytes_after)]
        rows.append(("model", "", f"{sum(layer.parameters for layer in self.layers):,}", *total, f"{self.ratio:.2f}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                [
                    *(cell.ljust(w) for cell, w in zip(row[:2], widths[:2], strict=True)),
                    *(cell.rjust(w) for cell, w in zip(row[2:], widths[2:], strict=True)),
                ]
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *(f"left as it is: {name} ({why})" for name, why in self.skipped.items())])
