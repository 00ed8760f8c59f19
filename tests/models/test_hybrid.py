"""The hybrid models as transformers models: config, initialisation, saving, loss, training, graphs, longer contexts."""

import json
import math

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from neural_layers.mamba import Mamba
from neural_layers.mamba2 import Mamba2
from neural_layers.models.hybrid import (
    HybridCache,
    HybridConfig,
    HybridForCausalLM,
    HybridForSequenceClassification,
    HybridModel,
    attention_every,
    pure,
    samba,
)
from neural_layers.position import RotaryEmbedding
from tests.models.hybrids import MIXED, small_config, small_model, tokens


def test_layer_types_follow_from_mixers_and_survive_json(tmp_path) -> None:
    config = small_config(["mamba", "attention", "sliding_attention", "mamba2"])
    assert config.layer_types == ["linear_attention", "full_attention", "sliding_attention", "linear_attention"]
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["mixers"] == config.mixers


def test_patterns() -> None:
    assert attention_every(5, 2) == ["mamba", "attention", "mamba", "attention", "mamba"]
    assert samba(4, "mamba2") == ["mamba2", "sliding_attention"] * 2
    assert pure(2, "mamba") == ["mamba", "mamba"]


@pytest.mark.parametrize(
    ("preset", "millions"), [("tiny", (0.7, 0.9)), ("slm-20m", (18, 21)), ("slm-130m", (120, 140))]
)
def test_presets_have_the_size_of_their_name(preset, millions) -> None:
    with torch.device("meta"):
        model = HybridForCausalLM(HybridConfig.preset(preset))
    assert millions[0] * 1e6 <= sum(p.numel() for p in model.parameters()) <= millions[1] * 1e6
    assert HybridConfig.preset(preset).max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mixers": ["mamba", "rnn", "mamba", "mamba"]}, "mixers holds 'rnn'; known are mamba, mamba2"),
        ({"mixers": ["mamba"]}, "mixers names 1 layers, but num_hidden_layers=4"),
        ({"num_attention_heads": 3}, "hidden_size=16 must be a multiple of num_attention_heads=3"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        ({"position_embedding": "sinus"}, "position_embedding='sinus' must be"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}}, "rope_type='spiral'"),
        ({"vocab_size": 0}, "vocab_size=0 must be a positive integer"),
        ({"intermediate_size": -1}, "intermediate_size=-1 must not be negative"),
        ({"dropout": 1.5}, r"dropout=1.5 must lie in \[0, 1\)"),
        ({"classifier_pooling": "max"}, "classifier_pooling='max' must be one of last, mean"),
    ],
)
def test_a_config_that_does_not_fit_names_the_value(overrides, message) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4}
    with pytest.raises(ValueError, match=message):
        HybridConfig(**{**sizes, **overrides})


def test_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="no preset 'slm-1b'; there are tiny"):
        HybridConfig.preset("slm-1b")


def assert_recurrences_are_initialised(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Mamba):
            state_dim = module.A_log.shape[1]
            torch.testing.assert_close(
                module.A_log.exp(), torch.arange(1.0, state_dim + 1).expand_as(module.A_log).to(module.A_log)
            )
        if isinstance(module, Mamba2):
            assert module.A_log.exp().min() >= 1 - 1e-5
            assert module.A_log.exp().max() <= 16 + 1e-5
        if isinstance(module, Mamba | Mamba2):
            bias = module.dt_proj.bias if isinstance(module, Mamba) else module.dt_bias
            step = nn.functional.softplus(bias)
            assert step.min() >= 0.9e-3
            assert step.max() <= 0.11
            assert len(step.unique()) > 1
            assert torch.equal(module.D, torch.ones_like(module.D))
            # A depthwise filter of four taps keeps the size of its input.
            assert module.conv1d.weight.std() > 0.15


def test_initialisation_of_recurrences_survives_any_parent() -> None:
    config = small_config(initializer_range=0.02)
    assert_recurrences_are_initialised(HybridForCausalLM(config))
    assert_recurrences_are_initialised(Parent(config))


class Parent(PreTrainedModel):
    """A stranger's model around ours, whose own initialisation zeroes every bias."""

    config_class = HybridConfig
    base_model_prefix = "inner"

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.inner = HybridModel(config)
        self.extra = nn.Linear(4, 4)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@pytest.mark.parametrize("missing", [("A_log", "dt_bias", ".D", "dt_proj.bias"), ("dt_proj.bias",), ("conv1d.weight",)])
def test_initialisation_of_recurrences_survives_a_checkpoint_without_them(tmp_path, missing) -> None:
    model = HybridForCausalLM(small_config(initializer_range=0.02))
    nn.init.constant_(model.model.layers[0].mixer.inner.x_proj.weight, 0.5)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith(missing)}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = HybridForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {name for name in model.state_dict() if name.endswith(missing)} == set(info["missing_keys"])
    assert_recurrences_are_initialised(loaded)
    assert (loaded.model.layers[0].mixer.inner.x_proj.weight == 0.5).all()


def test_residual_projections_begin_smaller_with_depth() -> None:
    model = HybridForCausalLM(HybridConfig.preset("tiny"))
    expected = 0.02 / math.sqrt(2 * 4)
    layer = model.model.layers[0]
    for projection in (layer.mixer.inner.out_proj, layer.feed_forward.inner.down_proj):
        assert projection.weight.std().item() == pytest.approx(expected, rel=0.1)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_through_auto_classes_gives_the_same_bits(tmp_path, tied) -> None:
    model = small_model(tie_word_embeddings=tied).float()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, HybridForCausalLM)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    with torch.no_grad():
        assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
        states = AutoModel.from_pretrained(tmp_path).eval()(tokens(2, 9)).last_hidden_state
        assert torch.equal(states, model.model(tokens(2, 9)).last_hidden_state)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_shifted_cross_entropy(smoothing) -> None:
    model, ids = small_model(), tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    output = model(ids, labels=labels, label_smoothing=smoothing)
    expected = nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=smoothing
    )
    torch.testing.assert_close(output.loss, expected)
    summed = model(ids, labels=labels, label_smoothing=smoothing, num_items_in_batch=7).loss
    torch.testing.assert_close(summed, expected * (labels[:, 1:] != -100).sum() / 7)


def test_training_leaves_logits_out_unless_asked() -> None:
    model, ids = small_model().train(), tokens(1, 4)
    assert model(ids, labels=ids).logits is None
    assert model(ids, labels=ids, skip_logits=False).logits.shape == (1, 4, 40)
    assert model(ids).logits is not None


def test_a_batch_without_labels_has_loss_zero_and_gradient_zero() -> None:
    model, ids = small_model().train(), tokens(1, 4)
    loss = model(ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or p.grad.eq(0).all() for p in model.parameters())


def test_logits_to_keep() -> None:
    model, ids = small_model(), tokens(2, 6)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])


def test_checkpointed_gradients_equal_saved_ones() -> None:
    model, ids = small_model().train(), tokens(2, 9)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    saved = gradients()
    model.gradient_checkpointing_enable()
    for found, expected in zip(gradients(), saved, strict=True):
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="train with use_cache=False"):
        model(ids, past_key_values=HybridCache(model.config))


def test_hidden_states_are_those_of_each_layer_and_end_normalised() -> None:
    model, ids = small_model(), tokens(2, 5)
    output = model.model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == len(MIXED) + 1
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert torch.equal(output.hidden_states[0], model.model.embed_tokens(ids))


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(training) -> None:
    model, ids = small_model().float().train(training), tokens(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if training:
        packed = torch.tensor([[0] * 4 + [1] * 5] * 2)
        torch.testing.assert_close(
            compiled(ids, labels=ids, seq_idx=packed).loss, model(ids, labels=ids, seq_idx=packed).loss
        )
    else:
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_exports_with_a_length_that_stays_free() -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small_model().float()

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, use_cache=False).logits

    module = Logits()
    shapes = {"ids": {1: torch.export.Dim("length", min=4, max=64)}}
    program = torch.export.export(module, (tokens(1, 8),), dynamic_shapes=shapes)
    for length in (5, 8, 33):
        torch.testing.assert_close(program.module()(tokens(1, length)), module(tokens(1, length)))


def test_trainer_learns_a_repeating_text(tmp_path) -> None:
    torch.manual_seed(0)
    model = HybridForCausalLM(small_config(initializer_range=0.02))
    rows = [{"input_ids": torch.arange(i, i + 12) % 5, "labels": torch.arange(i, i + 12) % 5} for i in range(40)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=40, per_device_train_batch_size=8, learning_rate=1e-2, report_to="none",
        logging_steps=10, disable_tqdm=True, save_strategy="no", use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("scaling", ["yarn", "linear", "dynamic", None])
def test_extended_context_keeps_what_was_learned(tmp_path, scaling) -> None:
    model, short = small_model().float(), tokens(1, 16)
    with pytest.raises(ValueError, match="65 tokens are more than max_position_embeddings=64"):
        model(tokens(1, 65))
    weights, before = [p.clone() for p in model.parameters()], model(short).logits
    model.extend_context(256, scaling)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    assert model(tokens(1, 256)).logits.isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens(1, 200)).logits, model(tokens(1, 200)).logits)
    if scaling in (None, "dynamic"):  # which change nothing within the old length
        torch.testing.assert_close(model(short).logits, before)
    model.extend_context(512, scaling)  # from the length it was trained with, not from the last one
    if scaling is not None:
        assert model.config.rope_parameters["factor"] == 8.0


def test_linear_scaling_puts_far_positions_where_near_ones_were() -> None:
    model, ids = small_model(["attention"]), tokens(1, 8)
    before = model(ids).logits
    model.extend_context(128, "linear")
    spread = model(ids, position_ids=torch.arange(0, 16, 2).unsqueeze(0)).logits
    torch.testing.assert_close(spread, before)


@pytest.mark.parametrize(
    ("length", "scaling", "position", "message"),
    [
        (64, "yarn", "rope", "reads 64 tokens already; 64 is not longer"),
        (128, "ntk", "rope", "scaling='ntk' must be one of yarn, linear, dynamic"),
        (128, "yarn", "alibi", "position_embedding='alibi'; give scaling=None"),
        (128, {"rope_type": "ntk"}, "rope", "rope_type='ntk'"),
        (128, {"rope_type": "linear"}, "rope", "factor"),
        (128, {"factor": 2.0}, "rope", "names no rope_type"),
    ],
)
@pytest.mark.parametrize("mixers", [["attention", "mamba"], ["mamba"]])
def test_bad_extension_names_the_value_and_changes_nothing(length, scaling, position, message, mixers) -> None:
    model, ids = small_model(mixers, position_embedding=position), tokens(1, 8)
    config, logits = model.config.to_dict(), model(ids).logits
    with pytest.raises(ValueError, match=message):
        model.extend_context(length, scaling)
    assert model.config.to_dict() == config
    assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("position", ["alibi", None])
def test_context_without_rope_grows_at_any_head_width(position) -> None:
    model = small_model(["attention"], position_embedding=position, head_dim=5)
    model.extend_context(128, None)
    assert model.config.max_position_embeddings == 128
    assert model(tokens(1, 100)).logits.isfinite().all()


@pytest.mark.parametrize("pooling", ["last", "mean", "attention", "gem"])
def test_classifier_reads_what_counts_and_loads_again(tmp_path, pooling) -> None:
    torch.manual_seed(0)
    config = small_config(classifier_pooling=pooling, num_labels=3)
    model, ids = HybridForSequenceClassification(config).eval(), tokens(2, 7)
    expected = model(ids).logits
    assert expected.shape == (2, 3)
    mask = torch.ones(2, 10, dtype=torch.long)
    left, right = mask.clone(), mask.clone()
    left[:, :3], right[:, 7:] = 0, 0
    garbage = tokens(2, 3, seed=5)
    torch.testing.assert_close(model(torch.cat([garbage, ids], 1), left).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(torch.cat([ids, garbage], 1), right).logits, expected, rtol=1e-4, atol=1e-5)
    output = model(ids, labels=torch.tensor([0, 2]))
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, torch.tensor([0, 2])))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, expected)


def test_classifier_starts_from_a_language_models_weights(tmp_path) -> None:
    model = small_model().float()
    model.save_pretrained(tmp_path)
    classifier = HybridForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    for name, value in model.model.state_dict().items():
        assert torch.equal(classifier.model.state_dict()[name], value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(tokens(1, 0)), r"shape \(1, 0\); expected \(B, T\) with at least one token"),
        (lambda m: m(torch.tensor([[3, 40]])), "token id 40 lies outside the vocabulary of 40"),
        (lambda m: m(torch.tensor([[-1]])), "token id -1 lies outside"),
        (lambda m: m(), "give either input_ids or inputs_embeds"),
        (lambda m: m(tokens(1, 2), output_attentions=True), "never built here"),
        (lambda m: m(tokens(2, 3), position_ids=torch.zeros(3, 3).long()), r"position_ids has shape \(3, 3\)"),
        (lambda m: m(tokens(2, 3), attention_mask=torch.ones(2, 1, 3, 3)), "attention_mask has shape"),
    ],
)
def test_bad_input_names_the_value(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(small_model())


def test_layers_share_the_rotary_tables_of_a_call(monkeypatch) -> None:
    model, made = small_model(["attention", "mamba", "attention"]), []
    own = RotaryEmbedding._frequencies
    monkeypatch.setattr(RotaryEmbedding, "_frequencies", lambda self, p: made.append(p.shape) or own(self, p))
    model(tokens(2, 6))
    assert len(made) == 1
    before = model(tokens(1, 6)).logits
    model.extend_context(128, "linear")
    assert not torch.equal(model(tokens(1, 6)).logits, before)
