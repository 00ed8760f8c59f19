"""Writing an ONNX graph node by node.

The graphs are written from the modules' weights and not traced. Tracing (`torch.onnx.export`) needs each op taken apart
first, freezes what it sees (a length, a branch), and leaves an order of dimensions that suits training. Written, a
Mamba layer is 20 nodes, its state lies as the scan reads it, and the file is the same whatever torch traces like.
"""

from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

# RMSNormalization, RotaryEmbedding and Attention are operators from 23 on.
OPSET = 23
IR_VERSION = 11
CONTRIB = "com.microsoft"
END = np.iinfo(np.int64).max

# What a node takes: the name of a value, a number or list of numbers (a constant), or None for an input left out.
Value = str | int | float | list[int] | np.ndarray | None
Shape = tuple[int | str, ...]


class Graph:
    """Nodes in order, with names that are unique in the whole model; weights and constants belong to the outermost.

    g.op("Add", x, 1.0) appends a node and returns the name of its output. A whole number or a list of them becomes an
    int64 constant, a real number a float32 one.
    """

    def __init__(self, parent: "Graph | None" = None) -> None:
        self.root: Graph = self if parent is None else parent.root
        self.nodes: list[NodeProto] = []
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.domains: set[str] = set()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count = 0

    def op(self, kind: str, *inputs: Value, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output; returns its name."""
        return self.ops(kind, *inputs, count=1, domain=domain, **attributes)[0]

    def ops(self, kind: str, *inputs: Value, count: int, domain: str = "", **attributes: Any) -> list[str]:
        """Append a node with `count` outputs; returns their names."""
        self.root.domains.add(domain)
        outputs = [self.fresh(kind) for _ in range(count)]
        names = [self._name(value) for value in inputs]
        self.nodes.append(helper.make_node(kind, names, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs

    def fresh(self, kind: str) -> str:
        """A name that nothing else in the model has."""
        self.root._count += 1
        return f"{kind}_{self.root._count}"

    def weight(self, name: str, array: np.ndarray) -> str:
        """Store a weight once under `name`; returns the name."""
        if name not in self.root.initializers:
            self.root.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def constant(self, array: np.ndarray) -> str:
        """Store a small constant, once for all equal ones; returns its name."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.root._constants:
            self.root._constants[key] = self.weight(self.fresh("constant"), array)
        return self.root._constants[key]

    def input(self, name: str, kind: int, shape: Shape | None) -> str:
        """Declare an input of the graph; a dimension is a number or, where it may vary, a name."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, value: str, name: str, kind: int, shape: Shape | None, *, first: bool = False) -> None:
        """Declare `value` an output of the graph, called `name`; the first or the last of them.

        A value that a node of this graph makes is renamed: inner graphs must not use it.
        """
        if any(value in node.output for node in self.nodes):
            for node in self.nodes:
                for names in (node.input, node.output):
                    for i, used in enumerate(names):
                        if used == value:
                            names[i] = name
        else:
            self.nodes.append(helper.make_node("Identity", [value], [name], name=self.fresh("Identity")))
        self.outputs.insert(0 if first else len(self.outputs), helper.make_tensor_value_info(name, kind, shape))

    def child(self) -> "Graph":
        """A graph for the body of a node; its nodes may use the values of this one."""
        return Graph(self)

    def proto(self, name: str) -> GraphProto:
        """The graph as ONNX keeps it; inner graphs have no weights of their own."""
        weights = list(self.initializers.values())
        return helper.make_graph(self.nodes, name, self.inputs, self.outputs, weights)

    def model(self, name: str) -> ModelProto:
        """The whole model, which says so where it uses operators of ONNX Runtime's own."""
        opsets = [helper.make_opsetid("", OPSET)] + [helper.make_opsetid(CONTRIB, 1)] * (CONTRIB in self.domains)
        return helper.make_model(
            self.proto(name), opset_imports=opsets, ir_version=IR_VERSION, producer_name="neural_layers"
        )

    def dim(self, value: str, axis: int) -> str:
        """The size of one dimension, as a list of one number."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def tail(self, value: str, count: int, axis: int) -> str:
        """The last `count` entries along an axis, or all where there are fewer."""
        return self.op("Slice", value, [-count] if count else [END], [END], [axis])

    def tail_of(self, value: str, count: str, axis: int) -> str:
        """The last `count` (1,) entries along an axis."""
        return self.op("Slice", value, self.op("Neg", count), [END], [axis])

    def concat(self, *values: Value, axis: int = 0) -> str:
        return self.op("Concat", *values, axis=axis)

    def _name(self, value: Value) -> str:
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        if isinstance(value, np.ndarray):
            return self.constant(value)
        return self.constant(np.array(value, np.float32 if isinstance(value, float) else np.int64))
