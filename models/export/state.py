"""The state of a model as inputs and outputs of its graph."""

from dataclasses import dataclass

from neural_layers.models.export.graph import Graph, Shape
from neural_layers.models.export.session import NEW, PAST

FLOAT = 1


@dataclass(frozen=True)
class StateTensor:
    """One tensor that goes in as `past.<name>` and comes out as `new.<name>`.

    kind: keys, values, conv, mamba, mamba2. layer: whose it is. window: of attention that keeps its last keys only.
    """

    name: str
    kind: str
    layer: int
    window: int | None = None


class States:
    """The state tensors of a graph, declared as its layers ask for them.

    A layer takes its past tensor and, before it asks for another, gives the new one; several that are open are given in
    the order in which they were taken.
    """

    def __init__(self, g: Graph) -> None:
        self.g, self.tensors, self.layer = g, list[StateTensor](), 0
        self._open: list[tuple[str, Shape]] = []

    def take(self, kind: str, shape: Shape, *, dim: str | None = None, window: int | None = None) -> str:
        """The past tensor (batch, *shape) as an input of the graph. A dimension that grows has a name there; on the
        way out it is called `dim`."""
        name = f"{self.layer}.{kind}"
        self.tensors.append(StateTensor(name, kind, self.layer, window))
        new = tuple(dim if isinstance(size, str) and dim else size for size in shape)
        self._open.append((name, ("batch", *new)))
        return self.g.input(PAST + name, FLOAT, ("batch", *shape))

    def give(self, value: str) -> None:
        """The new tensor of the one that was taken first among those not yet given."""
        name, shape = self._open.pop(0)
        self.g.output(value, NEW + name, FLOAT, shape)
