"""Decoding with a hybrid model of 6 Mamba and 2 attention layers, and with transformers' Jamba of its shape."""

import copy
import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neural_layers.benchmarks.case import Call, Case, Inputs, Maker, Peer, Size, sweep

MODELS = "pip install 'neural-layers[models]'"
ONNX = "pip install 'neural-layers[models,onnx]'"


def make(size: Size, maker: Maker) -> Inputs:
    """An initialised model, as its weights do not change its speed; P tokens of a prompt; T to decode."""
    from neural_layers.models.hybrid import HybridConfig, HybridForCausalLM

    torch.manual_seed(0)
    config = HybridConfig.preset(
        "slm-20m", hidden_size=size["D"], intermediate_size=size["F"], num_hidden_layers=size["layers"],
        num_attention_heads=size["H"], num_key_value_heads=size["G"], vocab_size=size["V"],
    )  # fmt: skip
    model = HybridForCausalLM(config).eval().to(maker.device, maker.dtype)
    return {"model": model, "prompt": maker.integers(size["V"], 1, size["P"]), "tokens": size["T"]}


def count(tokens: Tensor) -> Tensor:
    """How many were decoded. The models differ, and so do their tokens."""
    return torch.tensor(tokens.shape, dtype=torch.float32)


def _decode(model: Any, cache: Any, first: Tensor, tokens: int) -> Tensor:
    made, token = [], first
    for _ in range(tokens):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        made.append(token)
    return torch.cat(made, dim=1)


def _read(model: Any, inputs: Inputs) -> tuple[Any, Tensor]:
    with torch.no_grad():
        output = model(inputs["prompt"], use_cache=True)
    return output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)


def eager(inputs: Inputs) -> Call:
    """The model's own forward, a token at a time, the likeliest each time."""
    cache, first = _read(inputs["model"], inputs)
    return Call(lambda: _decode(inputs["model"], cache.fork(), first, inputs["tokens"]), compare=count)


def onnx(inputs: Inputs, quantize: str | None) -> Call:
    """The exported model in ONNX Runtime."""
    from neural_layers.models.export import OnnxModel, export_onnx
    from neural_layers.models.export.stepper import Stepper

    with tempfile.TemporaryDirectory() as folder:
        export_onnx(inputs["model"], folder, quantize=quantize, verify=False)
        model = OnnxModel(folder, threads=torch.get_num_threads())
    logits, state = model.forward(inputs["prompt"].cpu().numpy(), keep=1)
    first = logits[:, -1].argmax(-1, keepdims=True)

    def run() -> Tensor:
        step, made, token = Stepper(model.session, state), [], first
        for _ in range(inputs["tokens"]):
            token = step(token).argmax(-1, keepdims=True)
            made.append(token)
        return torch.from_numpy(np.concatenate(made, axis=1))

    return Call(run, compare=count)


def jamba_of(config: Any) -> Any:
    """transformers' Jamba: as many layers of either kind in the same places, of the same widths, without experts."""
    from transformers import JambaConfig, JambaForCausalLM

    mixers = config.mixers
    return JambaForCausalLM(
        JambaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads, mamba_d_state=config.mamba_d_state,
            mamba_d_conv=config.mamba_d_conv, mamba_expand=config.mamba_expand, tie_word_embeddings=True,
            attn_layer_period=len(mixers) // mixers.count("attention"), attn_layer_offset=mixers.index("attention"),
            num_experts=1, num_experts_per_tok=1, expert_layer_period=2, expert_layer_offset=1, pad_token_id=0,
        )
    )  # fmt: skip


def jamba(inputs: Inputs) -> Call:
    """transformers' Jamba, a token at a time."""
    model = jamba_of(inputs["model"].config).eval().to(inputs["prompt"].device, inputs["model"].dtype)
    cache, first = _read(model, inputs)
    # Its cache is written in place.
    return Call(lambda: _decode(model, copy.deepcopy(cache), first, inputs["tokens"]), compare=count)


_ONNX = "onnxruntime"
_SHAPE = {"P": 32, "D": 384, "F": 1024, "H": 6, "G": 2, "V": 8192, "layers": 8}
_TINY = {"P": 3, "D": 32, "F": 64, "H": 4, "G": 2, "V": 64, "layers": 4}

CASES = (
    Case(
        name="decode",
        op="decode",
        about="T tokens one by one behind a prompt of P, with state; 19 M parameters",
        axis="T",
        make=make,
        leaves=(),
        tiny=sweep(T=(2, 3), **_TINY),
        quick=sweep(T=(32,), **_SHAPE),
        full=sweep(T=(32, 256), **_SHAPE),
        ours=(
            Peer("eager", eager, "transformers", MODELS, call="HybridForCausalLM(token, past_key_values=cache)"),
            Peer("ONNX Runtime float32", lambda inputs: onnx(inputs, None), _ONNX, ONNX, "cpu"),
            Peer("ONNX Runtime int8", lambda inputs: onnx(inputs, "int8"), _ONNX, ONNX, "cpu"),
            Peer("ONNX Runtime int4", lambda inputs: onnx(inputs, "int4"), _ONNX, ONNX, "cpu"),
        ),
        peers=(
            Peer("transformers Jamba", jamba, "transformers.models.jamba.modeling_jamba", MODELS,
                 call="JambaForCausalLM(token, past_key_values=cache)"),
        ),
        dtypes={"cpu": torch.float32, "cuda": torch.float32},
    ),
)  # fmt: skip
