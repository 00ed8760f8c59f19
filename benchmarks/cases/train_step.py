"""A training step of a hybrid language model: forward, backward and AdamW, and transformers' models of its size."""

from typing import Any

import torch
from torch import Tensor

from neural_layers.benchmarks.case import Call, Case, Inputs, Maker, Peer, Size, sweep
from neural_layers.benchmarks.cases.decode import MODELS, jamba_of

_SHAPE = {"B": 1, "D": 384, "F": 1024, "H": 6, "G": 2, "V": 8192, "layers": 8}
_TINY = {"B": 1, "D": 32, "F": 64, "H": 4, "G": 2, "V": 64, "layers": 4}


def make(size: Size, maker: Maker) -> Inputs:
    """The config of the preset slm-20m at these sizes, and a batch of tokens (B, T)."""
    from neural_layers.models.hybrid import HybridConfig

    config = HybridConfig.preset(
        "slm-20m", hidden_size=size["D"], intermediate_size=size["F"], num_hidden_layers=size["layers"],
        num_attention_heads=size["H"], num_key_value_heads=size["G"], vocab_size=size["V"],
    )  # fmt: skip
    return {"config": config, "tokens": maker.integers(size["V"], size["B"], size["T"])}


def training(model: Any, tokens: Tensor) -> Call:
    """Steps of AdamW on one batch."""
    model = model.to(tokens.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> Tensor:
        with torch.enable_grad():
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    # The weights are drawn anew for each model: the losses are near log V and not the same.
    return Call(step, compare=lambda loss: torch.ones_like(loss))


def hybrid(inputs: Inputs) -> Call:
    """Our model."""
    from neural_layers.models.hybrid import HybridForCausalLM

    return training(HybridForCausalLM(inputs["config"]), inputs["tokens"])


def jamba(inputs: Inputs) -> Call:
    """transformers' Jamba, of the same shape."""
    return training(jamba_of(inputs["config"]), inputs["tokens"])


def mamba(inputs: Inputs) -> Call:
    """transformers' Mamba of the same width, with as many layers as give it about the same number of parameters."""
    from transformers import MambaConfig, MambaForCausalLM

    config = inputs["config"]
    model = MambaForCausalLM(
        MambaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, state_size=config.mamba_d_state,
            num_hidden_layers=2 * config.num_hidden_layers, expand=config.mamba_expand, conv_kernel=config.mamba_d_conv,
            tie_word_embeddings=True, pad_token_id=0,
        )
    )  # fmt: skip
    return training(model, inputs["tokens"])


CASES = (
    Case(
        name="train_step",
        op="train_step",
        about="forward, backward and AdamW on B sequences of T tokens; 19 M parameters",
        axis="T",
        make=make,
        leaves=(),
        tiny=sweep(T=(3, 5), **_TINY),
        quick=sweep(T=(128, 512), **_SHAPE),
        full=sweep(T=(128, 512, 2048), **_SHAPE),
        ours=(Peer("training", hybrid, "transformers", MODELS, call="HybridForCausalLM(tokens, labels=tokens)"),),
        peers=(
            Peer("transformers Jamba", jamba, "transformers.models.jamba.modeling_jamba", MODELS,
                 skip=lambda size, effort: "takes minutes" if size["T"] > 512 else None,
                 call="JambaForCausalLM(tokens, labels=tokens)"),
            Peer("transformers Mamba", mamba, "transformers.models.mamba.modeling_mamba", MODELS,
                 skip=lambda size, effort: "takes minutes" if size["T"] > 512 else None,
                 only_full="a step takes the better part of a minute",
                 call="MambaForCausalLM(tokens, labels=tokens)"),
        ),
        dtypes={"cpu": torch.float32, "cuda": torch.float32},
    ),
)  # fmt: skip
