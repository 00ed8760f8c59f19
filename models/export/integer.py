"""INT8 by ONNX Runtime's own quantizers: `quantize="int8_dynamic"` and `"int8_static"` of the export.

Each linear layer's weight gets a scale for each output. Dynamic: in every call the input of a layer gets one scale and
zero point for all rows of the call (`DynamicQuantizeLinear`, `MatMulInteger`), so that what a token computes depends,
within that rounding, on what else is in the batch. Static: QuantizeLinear and DequantizeLinear stand around each
product, with ranges that calibration data had; ONNX Runtime makes one product of integers of them. Outputs, and all
that is no linear layer, stay float32. Embeddings are stored in 8 bits with a scale for each row, and tied heads once.

Letters: K inputs, N outputs.
"""

import copy
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import GraphProto, ModelProto, NodeProto, helper, load_model, numpy_helper
from torch import Tensor, nn

from neural_layers.linear_int8 import LinearInt8
from neural_layers.models.export.adapters import base_of
from neural_layers.models.export.blocks import FEWEST
from neural_layers.quantized_embedding import EmbeddingInt8
from neural_layers.wrappers.modules import replace_module

SCHEMES = ("int8_dynamic", "int8_static")
HEAD = ".head"  # behind the name of a table: the weight of the head that is tied to it, until `_tie`
_QUANTIZED = "_quantized"  # behind the name of a weight, as ONNX Runtime names its codes
# Tells ONNX Runtime's quantizers that shapes need no inference by a tool of theirs, which knows fewer operators.
_READY = "onnx.quant.pre_process", "onnxruntime.quant"


def quantize_graph(
    proto: ModelProto, scheme: str, feeds: Iterable[Mapping[str, np.ndarray]] | None = None
) -> ModelProto:
    """A float32 graph with its linear layers in int8.

    scheme: "int8_dynamic" or "int8_static"; feeds: for the latter, inputs of the graph to measure ranges on.
    """
    from onnxruntime import quantization as ort

    proto = copy.deepcopy(proto)  # its weights would be moved to a file
    names = _products(proto)
    entry = proto.metadata_props.add()
    entry.key, entry.value = _READY
    common = {"op_types_to_quantize": ["MatMul"], "nodes_to_quantize": names, "per_channel": True}
    with tempfile.TemporaryDirectory(prefix="neural-layers-") as folder:
        path = str(Path(folder, "model.onnx"))
        common |= {"weight_type": ort.QuantType.QInt8, "use_external_data_format": True}
        if scheme == "int8_static":
            ort.quantize_static(
                proto, path, _reader(feeds or ()), quant_format=ort.QuantFormat.QDQ,
                activation_type=ort.QuantType.QUInt8,
                extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]}, **common,
            )  # fmt: skip
        else:
            ort.quantize_dynamic(proto, path, extra_options={"MatMulConstBOnly": True}, **common)
        made = load_model(path)
    del made.metadata_props[:]
    for table in [name for name in _sizes(made) if name + HEAD + _QUANTIZED in _sizes(made)]:
        _tie(made, table)
    return made


def _reader(feeds: Iterable[Mapping[str, np.ndarray]]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        rest = iter(feeds)

        def get_next(self) -> Any:
            return next(self.rest, None)

    return Reader()


def _sizes(proto: ModelProto) -> dict[str, Any]:
    return {tensor.name: tensor.dims for tensor in proto.graph.initializer}


def _products(proto: ModelProto) -> list[str]:
    """The names of the nodes that multiply by a weight that is to be quantized, each with an input of its own: ONNX
    Runtime would round for other readers too, as the skip connection of a Mamba layer, what one of them has rounded."""
    sizes, made = _sizes(proto), list[NodeProto]()
    readers = Counter(name for node in proto.graph.node for name in node.input)
    names = []
    for node in proto.graph.node:
        if node.op_type == "MatMul" and len(sizes.get(node.input[1], ())) == 2 and sizes[node.input[1]][0] >= FEWEST:
            names.append(node.name)
            if readers[node.input[0]] > 1:
                own = f"{node.name}_input"
                made.append(helper.make_node("Identity", [node.input[0]], [own], name=own))
                node.input[0] = own
        made.append(node)
    graph = GraphProto(node=made)  # a copy, as what is removed is gone
    del proto.graph.node[:]
    proto.graph.node.extend(graph.node)
    return names


def _tie(proto: ModelProto, table: str) -> None:
    """Let the table's rows be read from the codes that the head multiplies with, stored once, as rows.

    They are the table's own, but where a weight lies between two codes and ONNX Runtime divides where we multiply.
    """
    head, graph = table + HEAD, proto.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    pairs = [(head + _QUANTIZED, table), (f"{head}_scale", f"{table}.scale")]
    found, own = ([numpy_helper.to_array(stored[pair[i]]) for pair in pairs] for i in (0, 1))
    codes = np.ascontiguousarray(found[0].T)
    used = codes.any(axis=1)  # a row of zeros, as that of the padding, has any scale
    is_same = codes.shape == own[0].shape and np.allclose(found[1][used], own[1][used], rtol=1e-6, atol=0)
    if not is_same or np.abs(codes.astype(np.int16) - own[0]).max(initial=0) > 1:
        return  # rounded in another way by another version: right as well, and larger
    stored[table].CopyFrom(numpy_helper.from_array(codes, table))
    for pair in pairs:
        graph.initializer.remove(stored[pair[0]])
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == pairs[1][0]:
                node.input[i] = pairs[1][1]
    turned = helper.make_node("Transpose", [table], [head + _QUANTIZED], name=head + _QUANTIZED, perm=[1, 0])
    graph.node.insert(0, turned)


def int8_reference(model: Any, protos: Iterable[ModelProto]) -> Any:
    """A copy of a float model that computes as the graphs that `quantize_graph` made of it, as nearly as floats do."""
    made = copy.deepcopy(model).to("cpu", torch.float32)
    ranges = {name: given for proto in protos for name, given in _input_ranges(proto)}
    tables: dict[int, EmbeddingInt8] = {}
    for name, module in list(made.named_modules(remove_duplicate=False)):
        if isinstance(module, nn.Embedding) and module.embedding_dim >= FEWEST:
            replace_module(made, name, tables.setdefault(id(module), EmbeddingInt8.from_embedding(module)))
        if not isinstance(module, nn.Linear):
            continue
        own = HEAD if module is base_of(made.get_output_embeddings()) and HEAD in ranges else _outer(name)
        if own in ranges:
            given, layer = ranges[own], LinearInt8.from_linear(module)
            if given is not None:
                layer.calibrate(*given)
            replace_module(made, name, layer if given is not None else _Dynamic(layer))
    return made.eval()


def _outer(name: str) -> str:
    return name.removesuffix(".base_layer")


def _input_ranges(proto: ModelProto) -> Iterator[tuple[str, tuple[float, int] | None]]:
    """Of each linear layer in int8 its name, HEAD for a tied one, and its input's scale and zero point, where there."""
    made = {output: node for node in proto.graph.node for output in node.output}
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type not in ("MatMul", "MatMulInteger"):
            continue
        weight, given = str(node.input[1]), None
        if node.op_type == "MatMul":
            source = made.get(weight)
            if source is None or source.op_type != "DequantizeLinear":
                continue
            weight = str(source.input[0])
            scale, zero = (numpy_helper.to_array(stored[name]).item() for name in made[node.input[0]].input[1:3])
            given = scale, zero
        weight = weight.removesuffix(_QUANTIZED)
        names = [HEAD] if weight.endswith(HEAD) else weight.removesuffix(".weight").split("+")
        yield from ((name, given) for name in names)


class _Dynamic(nn.Module):
    """x Wᵀ + b with x rounded as `DynamicQuantizeLinear` rounds it: 0 … 255 over the range of the whole tensor."""

    def __init__(self, layer: LinearInt8) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
        scale = (high - low) / 255
        zero = (-low / scale).round().clamp(0, 255)
        codes = ((x / scale).round() + zero).clamp(0, 255)
        return F.linear((codes - zero) * scale, self.layer.dense_weight(), self.layer.bias)
