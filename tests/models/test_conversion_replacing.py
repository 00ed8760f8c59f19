"""Attention layers turned into Mamba-2 layers: what is carried, what is left, and linear attention as the limit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import DynamicCache

from neural_layers import Mamba2, RotaryEmbedding
from neural_layers.errors import InputError
from neural_layers.models.conversion import convert_to_hybrid, from_transformers
from neural_layers.models.conversion.alignment import own_samples
from neural_layers.models.hybrid import HybridConfig, HybridForCausalLM
from neural_layers.testing import check_mixer
from tests.models.peers import VOCABULARY, make_peer

ATTENTION = [
    "llama",
    "llama wide heads",
    "llama biases",
    "llama yarn",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3 bias sliding",
]


def make_ids(batch: int = 2, length: int = 17) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def mixer_of(model: HybridForCausalLM, layer: int):
    return model.model.layers[layer].mixer.inner


def linear_attention(attention, x_BTD: torch.Tensor) -> torch.Tensor:
    """Σ_s≤t (q_t · k_s) v_s for each head, (B, T, H, K), with the layer's own projections, norms and rotation."""
    heads, groups = attention.num_heads, attention.num_kv_heads
    q, k, v = (
        projection(x_BTD).unflatten(-1, (count, attention.head_dim))
        for projection, count in ((attention.q_proj, heads), (attention.k_proj, groups), (attention.v_proj, groups))
    )
    q, k = attention.q_norm(q), attention.k_norm(k)
    if attention.rotary is not None:
        cos, sin = (table[:, None] for table in attention.rotary(torch.arange(x_BTD.shape[1]), x_BTD.dtype))

        def turned(y: torch.Tensor) -> torch.Tensor:
            first, second = y.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        q, k = turned(q), turned(k)
    serves = [head // (heads // groups) for head in range(heads)]
    scores = torch.einsum("bthk,bshk->bhts", q, k[:, :, serves]).tril()
    return torch.einsum("bhts,bshk->bthk", scores, v[:, :, serves])


@torch.no_grad()
@pytest.mark.parametrize("variant", ATTENTION)
def test_without_decay_the_layer_is_linear_attention(variant) -> None:
    peer = make_peer(variant).double()
    model = from_transformers(peer)
    converted = convert_to_hybrid(peer, [1], calibration_steps=0)
    attention, mixer = mixer_of(model, 1), mixer_of(converted, 1)
    assert isinstance(mixer, Mamba2)
    mixer.A_log.fill_(-torch.inf)
    x_BTD = torch.randn(2, 17, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected_BTHK = linear_attention(attention, x_BTD)

    size = expected_BTHK.square().mean(-1, keepdim=True).add(mixer.norm.eps).rsqrt()
    normalised = (expected_BTHK * size).flatten(2) * mixer.norm.weight
    torch.testing.assert_close(mixer(x_BTD), attention.o_proj(normalised), rtol=1e-9, atol=1e-9)
    mixer.norm = torch.nn.Identity()
    torch.testing.assert_close(mixer(x_BTD), attention.o_proj(expected_BTHK.flatten(2)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", ATTENTION)
def test_projections_are_carried_and_all_other_layers_are_left_to_the_bit(variant) -> None:
    peer = make_peer(variant)
    model = from_transformers(peer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    converted = convert_to_hybrid(model, [0, 2], calibration_steps=4)
    replaced = ("model.layers.0.mixer.inner.", "model.layers.2.mixer.inner.")
    kept = {name for name in before if not name.startswith(replaced)}
    after = converted.state_dict()
    assert kept == {name for name in after if not name.startswith(replaced)}
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert all(
        after[name].data_ptr() != tensor.data_ptr() for name, tensor in model.state_dict().items() if name in kept
    )
    for layer in (0, 2):
        attention, mixer = mixer_of(model, layer), mixer_of(converted, layer)
        width, repeats = attention.head_dim, attention.num_heads // attention.num_kv_heads
        parts = mixer.in_proj.weight.split(mixer.widths)
        biases = mixer.in_proj.bias.split(mixer.widths)
        for part, projection, times in (
            (1, attention.v_proj, repeats),
            (2, attention.k_proj, repeats),
            (3, attention.q_proj, 1),
        ):
            for head in range(attention.num_heads):
                new, old = (
                    slice(head * width, (head + 1) * width),
                    slice(head // times * width, (head // times + 1) * width),
                )
                assert torch.equal(parts[part][new], projection.weight[old])
                expected = torch.zeros(width) if projection.bias is None else projection.bias[old]
                assert torch.equal(biases[part][new], expected)
        assert not parts[0].any()
        assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)
        assert (mixer.out_proj.bias is None) == (attention.o_proj.bias is None)
        if "qwen3" in variant:
            assert torch.equal(mixer.C_norm.weight, attention.q_norm.weight)
            assert torch.equal(mixer.B_norm.weight, attention.k_norm.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_converted_models_generate_pad_save_and_load(tmp_path) -> None:
    converted = convert_to_hybrid(make_peer("qwen2 sliding"), [0, 2], calibration_steps=4)
    assert converted.config.mixers == ["mamba2", "sliding_attention", "mamba2"]
    assert converted.config.layer_types == ["linear_attention", "sliding_attention", "linear_attention"]
    ids = make_ids()
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    tokens = converted.generate(ids, **options)
    assert torch.equal(converted.generate(ids, **options, use_cache=False), tokens)
    cache = DynamicCache(config=converted.config)
    assert torch.equal(converted.generate(ids, **options, past_key_values=cache), tokens)
    padded, mask = torch.nn.functional.pad(ids, (3, 0)), torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    torch.testing.assert_close(converted(padded, attention_mask=mask).logits[:, 3:], converted(ids).logits)

    converted.save_pretrained(tmp_path)
    again = HybridForCausalLM.from_pretrained(tmp_path)
    assert again.config.mamba2_layers == converted.config.mamba2_layers
    assert torch.equal(again(ids).logits, converted(ids).logits)
    # and what is converted already can be converted on
    twice = convert_to_hybrid(tmp_path, [1], calibration_steps=0)
    assert twice.config.mixers == ["mamba2"] * 3
    assert torch.equal(mixer_of(twice, 0).conv1d.weight, mixer_of(converted, 0).conv1d.weight)


def test_calibration_brings_the_layers_close_and_repeats_exactly() -> None:
    peer, told = make_peer("llama"), []
    state = torch.get_rng_state()
    converted = convert_to_hybrid(peer, [0, 1, 2], calibration_steps=60, tell=lambda *heard: told.append(heard))
    assert torch.equal(torch.get_rng_state(), state)
    assert [layer for layer, _, _ in told] == [0, 1, 2]
    assert all(after < 0.7 * before for _, before, after in told)
    again = convert_to_hybrid(peer, [0, 1, 2], calibration_steps=60)
    assert all(torch.equal(a, b) for a, b in zip(converted.parameters(), again.parameters(), strict=True))
    other = convert_to_hybrid(peer, [0], calibration_steps=2, calibration_ids=make_ids(9))
    assert not torch.equal(mixer_of(other, 0).conv1d.weight, mixer_of(converted, 0).conv1d.weight)


def test_the_fit_does_not_depend_on_the_size_of_the_weights() -> None:
    peer = make_peer("llama biases")
    errors: dict[float, list[float]] = {}
    for factor in (1.0, 2.0**6):
        # q · k and o(v) stay what they are.
        for name, change in (("q", factor), ("k", 1 / factor), ("v", factor), ("o", 1 / factor)):
            projection = getattr(peer.model.layers[1].self_attn, f"{name}_proj")
            projection.weight.data *= change
            if name != "o":
                projection.bias.data *= change
        tell = errors.setdefault(factor, []).extend
        convert_to_hybrid(peer, [1], calibration_steps=30, tell=lambda *heard, tell=tell: tell(heard))
    assert errors[64.0] == pytest.approx(errors[1.0], rel=1e-2)


def test_own_samples_start_as_the_model_does_and_fit_its_context() -> None:
    model = from_transformers(make_peer("llama"))
    ids = own_samples(model, count=3)
    assert ids.shape == (3, 64)
    assert (ids[:, 0] == 1).all()
    assert torch.equal(ids, own_samples(model, count=3))
    assert len(ids.unique()) > 10


def test_training_reaches_every_part_and_the_mode_of_the_original_is_kept() -> None:
    model = from_transformers(make_peer("llama")).train()
    converted = convert_to_hybrid(model, [1], calibration_steps=2)
    assert model.training
    assert not converted.training
    converted.train()(make_ids(), labels=make_ids()).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mixer_of(converted, 1).parameters())


@torch.no_grad()
def test_half_precision_and_alibi_convert() -> None:
    converted = convert_to_hybrid(make_peer("llama").to(torch.bfloat16), [1], calibration_steps=4)
    assert {parameter.dtype for parameter in converted.parameters()} == {torch.bfloat16}
    config = HybridConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        mixers=["attention", "mamba2"], mamba2_head_dim=8, mamba2_d_state=4, position_embedding="alibi",
    )  # fmt: skip
    converted = convert_to_hybrid(HybridForCausalLM(config), [0], calibration_steps=0)
    mixer = mixer_of(converted, 0)
    assert mixer.rotary is None
    torch.testing.assert_close(mixer.A_log.exp(), torch.tensor([2.0**-4, 2.0**-8]))
    assert converted(make_ids()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"replace_layers": []}, "replace_layers names no layer; give at least one"),
        ({"replace_layers": [0, 3]}, "layer 3 is out of range: the model has layers 0 to 2"),
        ({"replace_layers": [-1]}, "layer -1 is out of range"),
        ({"replace_layers": [2, 0, 2]}, "layer 2 is named 2 times; name it once"),
        (
            {"replace_layers": [0], "mixer": "mamba"},
            "mixer='mamba' is not supported: all channels.*give mixer='mamba2'",
        ),
        ({"replace_layers": [0], "mixer": "rwkv"}, "mixer='rwkv' is not supported, only 'mamba2'"),
        ({"replace_layers": [0], "calibration_steps": -1}, "calibration_steps=-1 must not be negative"),
    ],
)
def test_layers_and_mixers_that_cannot_be_are_named(arguments, message) -> None:
    with pytest.raises(InputError, match=message):
        convert_to_hybrid(make_peer("llama"), **arguments)


def test_layers_without_attention_and_wrapped_layers_are_refused() -> None:
    model = from_transformers(make_peer("llama"))
    converted = convert_to_hybrid(model, [1], calibration_steps=0)
    with pytest.raises(InputError, match="layer 1 is 'mamba2' and not attention; layers with attention: 0, 2"):
        convert_to_hybrid(converted, [1])
    with pytest.raises(InputError, match="layer 0 is 'mamba' and not attention; layers with attention: none"):
        convert_to_hybrid(make_peer("mamba"), [0])
    mixer_of(model, 2).q_proj = torch.nn.Sequential(mixer_of(model, 2).q_proj)
    with pytest.raises(InputError, match=r"layer 2 is wrapped or quantized \(GroupedQueryAttention of Sequential\)"):
        convert_to_hybrid(model, [2])


@st.composite
def mamba2_forms(draw: st.DrawFn) -> Mamba2:
    torch.manual_seed(draw(st.integers(0, 99)))
    groups, state = draw(st.integers(1, 2)), draw(st.sampled_from([2, 4]))
    return Mamba2(
        6,
        state,
        3,
        groups,
        inner_dim=6 * groups,
        bias=draw(st.booleans()),
        output_bias=draw(st.sampled_from([None, True, False])),
        conv_bias=draw(st.booleans()),
        activation=draw(st.sampled_from([None, "silu"])),
        norm=draw(st.booleans()),
        bc_norm=draw(st.booleans()),
        rotary=RotaryEmbedding(state) if draw(st.booleans()) else None,
        step_limit=draw(st.sampled_from([(0.0, float("inf")), (0.2, 0.9)])),
    )


@given(mixer=mamba2_forms())
def test_every_form_of_mamba2_keeps_the_laws(mixer) -> None:
    check_mixer(mixer, "all")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inner_dim": 10, "head_dim": 4}, "inner_dim = 10 must be a multiple of head_dim=4"),
        ({"head_dim": 4, "rotary": RotaryEmbedding(8)}, "rotary.head_dim=8 must be state_dim=128"),
        ({"head_dim": 4, "activation": "gelu"}, "activation='gelu' must be 'silu' or None"),
        ({"head_dim": 4, "step_limit": (1.0, 0.5)}, r"step_limit=\(1.0, 0.5\) must be two rising numbers"),
    ],
)
def test_arguments_of_mamba2_that_do_not_fit_are_named(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba2(8, **arguments)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"0": {}}, "mamba2_layers holds layer '0', which is none of the 2 with 'mamba2'"),
        ({"x": {}}, "mamba2_layers holds layer 'x'"),
        ({"1": {"width": 3}}, r"mamba2_layers\['1'\] holds 'width'; known are"),
    ],
)
def test_layers_of_their_own_sizes_are_checked(layers, message) -> None:
    with pytest.raises(ValueError, match=message):
        HybridConfig(num_hidden_layers=2, mixers=["attention", "mamba2"], mamba2_layers=layers)
