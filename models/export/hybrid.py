"""The hybrid language model as one graph that reads a prompt, continues and decodes.

Letters: B batch, T length, P tokens seen before, D width, V vocabulary.
"""

from typing import Any

from onnx import ModelProto, TensorProto

from neural_layers.models.export.attention import Shared, rms_norm
from neural_layers.models.export.block import block
from neural_layers.models.export.graph import Graph
from neural_layers.models.export.state import States, StateTensor
from neural_layers.models.export.weights import Weights


def hybrid_graph(model: Any, quantize: str | None = None) -> tuple[ModelProto, list[StateTensor]]:
    """The graph of a `HybridForCausalLM`, and its state tensors in order.

    Inputs:  input_ids (batch, length) int64
             attention_mask (batch, total) int64: 1 for a token that counts, with a column for each of the P seen
                before and of the new ones
             position_ids (batch, length) int64: where each token stands; only with rotary embeddings
             keep (1,): for how many of the last tokens logits are wanted, at least 1
             past.<layer>.<kind>: the state, zeros or empty at the start
    Outputs: logits (batch, kept, V) and new.<layer>.<kind>
    """
    g, weights, decoder = Graph(), Weights(model, quantize), model.model
    ids = g.input("input_ids", TensorProto.INT64, ("batch", "length"))
    mask = g.input("attention_mask", TensorProto.INT64, ("batch", "total"))
    has_rotary = any(getattr(layer.mixer.inner, "rotary", None) is not None for layer in decoder.layers)
    positions = g.input("position_ids", TensorProto.INT64, ("batch", "length")) if has_rotary else None
    keep = g.input("keep", TensorProto.INT64, (1,))
    shared, states = Shared(g, ids, mask, positions), States(g)
    x = weights.embed(g, ids, decoder.embed_tokens)
    for i, layer in enumerate(decoder.layers):
        states.layer = i
        x = block(g, weights, layer, x, shared, states)
    x = g.tail_of(x, keep, 1)
    x = rms_norm(g, weights, decoder.norm, x)
    logits = weights.head(g, x, model.lm_head, decoder.embed_tokens)
    g.output(logits, "logits", TensorProto.FLOAT, ("batch", "kept", model.config.vocab_size), first=True)
    return g.model("hybrid"), states.tensors
