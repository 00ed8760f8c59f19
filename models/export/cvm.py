"""The CVM translator as two graphs: the encoder, which also computes what the decoder attends to, and the decoder.

Letters: B batch, S source length, T target length, D width, G key/value heads, K head width.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, TensorProto

from neural_layers.models.export.attention import FLOAT, Shared, context_keys, rms_norm
from neural_layers.models.export.block import block
from neural_layers.models.export.calibration import decoder_feed
from neural_layers.models.export.graph import Graph
from neural_layers.models.export.reference import Tolerance
from neural_layers.models.export.session import PAST, Encoder, StateSession
from neural_layers.models.export.state import States
from neural_layers.models.export.verify import BEFORE, Check, check_equal, lengths
from neural_layers.models.export.weights import Weights, array

CROSS = "cross."


def cvm_graphs(model: Any, quantize: str | None = None) -> tuple[ModelProto, ModelProto]:
    """The graphs of a `CVMForConditionalGeneration`.

    Encoder: input_ids (batch, source), attention_mask (batch, source) → cross.<layer>.keys and .values (B, G, S, K) for
             every layer of the decoder
    Decoder: input_ids (batch, length), attention_mask (batch, total) of ones, position_ids, keep (1,), context_mask
             (batch, source), cross.…, past.<layer>.keys and .values → logits (batch, kept, V), new.…
    """
    return _encoder(model, quantize).model("cvm_encoder"), _decoder(model, quantize).model("cvm_decoder")


def _encoder(model: Any, quantize: str | None) -> Graph:
    g, weights, encoder = Graph(), Weights(model, quantize), model.encoder
    ids = g.input("input_ids", TensorProto.INT64, ("batch", "source"))
    mask = g.input("attention_mask", TensorProto.INT64, ("batch", "source"))
    positions = g.op("Expand", g.op("Range", 0, g.op("Squeeze", g.dim(ids, 1), [0]), 1), g.op("Shape", ids))
    shared = Shared(g, ids, mask, positions)
    embedded = g.op("Mul", weights.embed(g, ids, model.shared), float(model.config.hidden_size**0.5))
    x = embedded
    for layer in encoder.layers:
        x = block(g, weights, layer, x, shared, None)
    x = rms_norm(g, weights, encoder.norm, x)
    if encoder.merge is not None:
        x = _merge(g, weights, encoder.merge, x, embedded, ids, mask)
    for i, layer in enumerate(model.decoder.layers):
        cross = layer.cross_attention.inner
        shape = ("batch", cross.num_kv_heads, "source", cross.head_dim)
        for kind, value in zip(("keys", "values"), context_keys(g, weights, cross, x), strict=True):
            g.output(value, f"{CROSS}{i}.{kind}", FLOAT, shape)
    return g


def _merge(g: Graph, weights: Weights, merge: Any, x: str, embedded: str, ids: str, mask: str) -> str:
    """states + gate · proj(norm(Σ_s log(1 + count_s) / count_s · embedding_s))."""
    kept = g.op("Cast", mask, to=FLOAT)
    same = g.op("Cast", g.op("Equal", g.op("Unsqueeze", ids, [2]), g.op("Unsqueeze", ids, [1])), to=FLOAT)
    count = g.op("Squeeze", g.op("MatMul", same, g.op("Unsqueeze", kept, [2])), [2])
    weight = g.op("Div", g.op("Log", g.op("Add", count, 1.0)), g.op("Max", count, 1.0))
    weight_B1S = g.op("Unsqueeze", g.op("Mul", weight, kept), [1])
    summary = rms_norm(g, weights, merge.norm, g.op("MatMul", weight_B1S, embedded))
    gate = g.weight(f"{weights.name(merge)}.gate", array(merge.gate))
    return g.op("Add", x, g.op("Mul", weights.linear(g, summary, merge.proj), gate))


def _decoder(model: Any, quantize: str | None) -> Graph:
    g, weights, decoder = Graph(), Weights(model, quantize), model.decoder
    ids = g.input("input_ids", TensorProto.INT64, ("batch", "length"))
    mask = g.input("attention_mask", TensorProto.INT64, ("batch", "total"))
    positions = g.input("position_ids", TensorProto.INT64, ("batch", "length"))
    keep = g.input("keep", TensorProto.INT64, (1,))
    context = g.input("context_mask", TensorProto.INT64, ("batch", "source"))
    shared, states = Shared(g, ids, mask, positions), States(g)
    bias = shared.padding_bias(context)
    x = g.op("Mul", weights.embed(g, ids, model.shared), float(model.config.hidden_size**0.5))
    for i, layer in enumerate(decoder.layers):
        states.layer = i
        cross = layer.cross_attention.inner
        shape = ("batch", cross.num_kv_heads, "source", cross.head_dim)
        keys, values = (g.input(f"{CROSS}{i}.{kind}", FLOAT, shape) for kind in ("keys", "values"))
        x = block(g, weights, layer, x, shared, states, ((keys, values), bias))
    x = g.tail_of(x, keep, 1)
    logits = weights.head(g, rms_norm(g, weights, decoder.norm, x), model.lm_head, model.shared)
    g.output(logits, "logits", FLOAT, ("batch", "kept", model.config.vocab_size), first=True)
    return g


def cvm_feeds(
    encoder: ModelProto, decoder: ModelProto, batches: Sequence[dict[str, np.ndarray]]
) -> tuple[list[dict[str, np.ndarray]], Iterator[dict[str, np.ndarray]]]:
    """Inputs of both graphs for calibration batches: the decoder attends to what the encoder's graph computes."""
    feeds = [{"input_ids": b["input_ids"], "attention_mask": b["attention_mask"]} for b in batches]

    def targets() -> Iterator[dict[str, np.ndarray]]:
        import onnxruntime

        session = onnxruntime.InferenceSession(encoder.SerializeToString(), providers=["CPUExecutionProvider"])
        names = [made.name for made in session.get_outputs()]
        for batch, feed in zip(batches, feeds, strict=True):
            cross = dict(zip(names, session.run(names, feed), strict=True))
            mask = np.ones_like(batch["decoder_input_ids"])
            ids, context = batch["decoder_input_ids"], batch["attention_mask"]
            yield decoder_feed(decoder, ids, mask, context_mask=context, **cross)

    return feeds, targets()


def verify_cvm(
    model: Any, allowed: Tolerance, encoder: Any, decoder: StateSession, tell: Callable[[Check], None]
) -> list[Check]:
    """Compare the keys and values of the source, the logits and the decoder's cache with the model: sources and targets
    of each of `lengths`, targets in one piece and continued, for 1 row and for 3 with sources of different lengths.

    Raises VerificationError at the first output that differs.
    """
    checks = []
    for length in lengths(model.config.max_position_embeddings, ()):
        for batch in (1, 3):
            past = min(BEFORE, model.config.max_position_embeddings - length)
            for before in dict.fromkeys((0, past)):
                case = Check(length, before, batch, 0.0)
                checks.append(_compare(model, Encoder(encoder), decoder, case, allowed))
                tell(checks[-1])
    return checks


@torch.no_grad()
def _compare(model: Any, encoder: Encoder, decoder: StateSession, case: Check, allowed: Tolerance) -> Check:
    from transformers import DynamicCache, EncoderDecoderCache

    random = torch.Generator().manual_seed(case.length)
    vocab, total = model.config.vocab_size, case.past + case.length
    source = torch.randint(vocab, (case.batch, case.length), generator=random)
    target = torch.randint(vocab, (case.batch, total), generator=random)
    mask = torch.ones_like(source)
    for row in range(case.batch):
        mask[row, max(case.length - 2 * row, 1) :] = 0
    context = encoder.run(source.numpy(), mask.numpy())
    encoded, state = model.encoder(source, mask), decoder.start(case.batch)
    cache, worst = EncoderDecoderCache(DynamicCache(), DynamicCache()), 0.0
    for begin, end in ((0, case.past), (case.past, total)):
        if begin == end:
            continue
        part = target[:, begin:end]
        expected = model(
            attention_mask=mask, decoder_input_ids=part, encoder_outputs=encoded, past_key_values=cache, use_cache=True
        )
        logits, state = decoder.run(part.numpy(), np.ones(part.shape, np.int64), state, end - begin, **context)
        where = f"at length {end - begin}, {begin} tokens before it, batch {case.batch}, source of {case.length}"
        sources, states = [], []
        for i, layer in enumerate(cache.self_attention_cache.layers):
            for kind in ("keys", "values"):
                own, cross = getattr(layer, kind), getattr(cache.cross_attention_cache.layers[i], kind)
                found = context[f"{CROSS}{i}.{kind}"].numpy().swapaxes(1, 2)
                sources.append((f"the source's {kind} for layer {i}", found, cross.transpose(1, 2), mask.numpy()))
                states.append((f"the {kind} of layer {i}", state.tensors[f"{PAST}{i}.{kind}"].numpy(), own, None))
        # In the order in which they are computed: the first that differs tells where the fault is.
        for name, found, wanted, counts in (*sources, *states, ("logits", logits, expected.logits, None)):
            worst = max(worst, check_equal(name, found, wanted.float().numpy(), counts, allowed, where))
    return Check(case.length, case.past, case.batch, worst)
