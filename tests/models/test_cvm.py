"""The CVM translator: caching, padding, beams, files, and what the count vector adds."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import AutoConfig, AutoModelForSeq2SeqLM, StaticCache

from neural_layers.models.cvm import CVMConfig, CVMForConditionalGeneration
from neural_layers.models.cvm.count_vector import CountVectorMerge, count_vector
from tests.models.generation_samples import make_tokenizer

VOCABULARY = 50


def make_model(seed: int = 0, **changes) -> CVMForConditionalGeneration:
    """A small model in float64 whose every weight is away from its initial zeros and ones."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_decoder_layers": 1, "max_position_embeddings": 64}
    model = CVMForConditionalGeneration(CVMConfig(**{"vocab_size": VOCABULARY, **sizes, **changes})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make_batch(seed: int = 0, batch: int = 3, source: int = 7, target: int = 5):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, source), generator=generator)
    labels = torch.randint(3, VOCABULARY, (batch, target), generator=generator)
    return ids, torch.ones_like(ids), labels


def test_presets_have_the_specified_sizes() -> None:
    teacher, student = CVMConfig.teacher(), CVMConfig.student()
    fields = ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    assert [getattr(teacher, f) for f in fields] == [32000, 768, 12, 12, 3072]
    assert [getattr(student, f) for f in fields] == [32000, 512, 8, 6, 2048]
    assert CVMConfig.student(vocab_size=100).vocab_size == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10, "num_attention_heads": 4}, "hidden_size=10 must be a multiple of num_attention_heads=4"),
        ({"num_key_value_heads": 3}, "num_attention_heads=8 must be a multiple of num_key_value_heads=3"),
        ({"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be a positive integer"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be a positive integer"),
    ],
)
def test_bad_configs_name_the_values(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        CVMConfig(**changes)


@pytest.mark.parametrize("num_beams", [1, 3])
@given(seed=st.integers(0, 99))
def test_cached_decoding_equals_uncached(num_beams, seed) -> None:
    model = make_model(seed)
    ids, mask, _ = make_batch(seed)
    mask[1, 4:] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 8, "num_beams": num_beams, "no_repeat_ngram_size": 2}
    cached = model.generate(ids, **arguments)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **arguments))
    assert len(set(cached[:, 1:].flatten().tolist())) > 3, "the model says one thing: the comparison shows nothing"


@given(seed=st.integers(0, 99), split=st.integers(1, 4))
def test_cached_logits_equal_those_of_one_call(seed, split) -> None:
    model = make_model(seed)
    ids, mask, labels = make_batch(seed)
    whole = model(ids, mask, decoder_input_ids=labels).logits
    first = model(ids, mask, decoder_input_ids=labels[:, :split], use_cache=True)
    rest = model(
        ids,
        mask,
        decoder_input_ids=labels[:, split:],
        past_key_values=first.past_key_values,
        encoder_outputs=(first.encoder_last_hidden_state,),
    )
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), whole)


@given(seed=st.integers(0, 99), pad=st.integers(1, 5))
def test_padding_changes_nothing(seed, pad) -> None:
    model = make_model(seed)
    ids, mask, labels = make_batch(seed)
    garbage = torch.randint(0, VOCABULARY, (3, pad), generator=torch.Generator().manual_seed(seed))
    padded_mask = torch.cat([mask, torch.zeros_like(garbage)], dim=1)
    padded = model(torch.cat([ids, garbage], dim=1), padded_mask, labels=labels)
    alone = model(ids, mask, labels=labels)
    torch.testing.assert_close(padded.logits, alone.logits)
    ignored = torch.cat([labels, torch.full((3, pad), -100)], dim=1)
    longer = model(ids, mask, labels=ignored)
    torch.testing.assert_close(longer.logits[:, :5], alone.logits)
    torch.testing.assert_close(longer.loss, alone.loss)


def test_loss_is_the_mean_over_labels_or_the_sum_over_given_items() -> None:
    model = make_model()
    ids, mask, labels = make_batch()
    labels[0, 2:] = -100
    out = model(ids, mask, labels=labels)
    log_probability = out.logits.log_softmax(-1)
    counted = [(b, t) for b in range(3) for t in range(5) if labels[b, t] != -100]
    total = -sum(log_probability[b, t, labels[b, t]] for b, t in counted)
    torch.testing.assert_close(out.loss, total / len(counted))
    torch.testing.assert_close(model(ids, mask, labels=labels, num_items_in_batch=100).loss, total / 100)


def test_labels_are_shifted_right_behind_the_start_token() -> None:
    labels = torch.tensor([[7, 8, -100, -100]])
    assert make_model().prepare_decoder_input_ids_from_labels(labels).tolist() == [[1, 7, 8, 0]]


def test_decoder_does_not_see_later_labels() -> None:
    model = make_model()
    ids, mask, labels = make_batch()
    changed = labels.clone()
    changed[:, 3] = 4
    before, after = model(ids, mask, labels=labels).logits, model(ids, mask, labels=changed).logits
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4], after[:, 4])


def test_saved_model_loads_the_same_through_the_auto_classes(tmp_path) -> None:
    model = make_model()
    ids, mask, labels = make_batch()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CVMConfig)
    assert torch.equal(loaded(ids, mask, labels=labels).logits, model(ids, mask, labels=labels).logits)


def test_embeddings_are_one_tensor_in_encoder_decoder_and_head() -> None:
    model = make_model()
    tied = [model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head]
    assert all(module.weight is model.shared.weight for module in tied)
    names = [name for name, _ in model.named_parameters()]
    assert sum("embed" in name or "shared" in name or "lm_head" in name for name in names) == 1


def test_counts_are_those_of_the_real_tokens() -> None:
    ids, mask = torch.tensor([[5, 7, 5, 0], [4, 4, 4, 9]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    expected = torch.zeros(2, 10, dtype=torch.long)
    expected[0, 5], expected[0, 7], expected[1, 4], expected[1, 9] = 2, 1, 3, 1
    assert torch.equal(count_vector(ids, mask, 10), expected)


def test_merge_is_its_formula_over_the_vocabulary() -> None:
    torch.manual_seed(0)
    merge, table = CountVectorMerge(6).double(), torch.randn(10, 6).double()
    torch.nn.init.normal_(merge.gate)
    ids, mask = torch.tensor([[5, 7, 5, 3]]), torch.tensor([[1, 1, 1, 0]])
    states = torch.randn(1, 4, 6).double()
    summary = math.log(3) * table[5] + math.log(2) * table[7]
    expected = states + merge.gate * merge.proj(merge.norm(summary))
    torch.testing.assert_close(merge(states, table[ids], ids, mask, 10), expected)


def test_merge_begins_as_the_model_without_it_and_then_learns() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CVMForConditionalGeneration(CVMConfig(**sizes)).eval()
    ablated = CVMForConditionalGeneration(CVMConfig(**sizes, count_vector_merge=False)).eval()
    info = ablated.load_state_dict(model.state_dict(), strict=False)
    assert {name.split(".")[1] for name in info.unexpected_keys} == {"merge"}
    ids, mask, labels = make_batch()
    out = model(ids, mask, labels=labels)
    torch.testing.assert_close(out.logits, ablated(ids, mask, labels=labels).logits)
    out.loss.backward()
    assert model.encoder.merge.gate.grad.abs().max() > 0


def test_checkpointed_gradients_equal_saved_ones() -> None:
    model, (ids, mask, labels) = make_model(dropout=0.0).train(), make_batch()
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(ids, mask, labels=labels).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for saved, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, saved)


def test_model_is_traced_without_graph_breaks() -> None:
    torch._dynamo.reset()
    model, (ids, mask, labels) = make_model(), make_batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, mask, labels=labels).logits, model(ids, mask, labels=labels).logits)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, i: m(i, decoder_input_ids=torch.ones(1, 65, dtype=torch.long)), "65 tokens are more than .*=64"),
        (lambda m, i: m(torch.ones(1, 65, dtype=torch.long), labels=i), "65 tokens are more than"),
        (lambda m, i: m(i), "needs `labels` or `decoder_input_ids`"),
        (lambda m, i: m(i + 50, labels=i), "token id 55 lies outside the vocabulary of 50"),
        (lambda m, i: m(i, decoder_input_ids=i - 9), "token id -4 lies outside"),
        (lambda m, i: m(i, labels=i, output_attentions=True), "output_attentions=True"),
        (lambda m, i: m.generate(i, cache_implementation="static", max_new_tokens=2), "use a DynamicCache"),
        (lambda m, i: m(i, labels=i, past_key_values=StaticCache(m.config, 9)), "EncoderDecoderCache"),
    ],
)
def test_bad_input_is_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(make_model(), torch.full((1, 3), 5))


def test_an_untied_head_survives_saving(tmp_path) -> None:
    model, (ids, mask, labels) = make_model(tie_word_embeddings=False), make_batch()
    model.save_pretrained(tmp_path)
    loaded = CVMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.lm_head.weight is not loaded.shared.weight
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    # Not equal: the order of a BLAS sum depends on how its operands are aligned.
    logits = loaded(ids, mask, labels=labels).logits
    torch.testing.assert_close(logits, model(ids, mask, labels=labels).logits, rtol=1e-12, atol=1e-12)


def test_a_decoder_deeper_than_the_encoder_generates_with_the_cache() -> None:
    model, (ids, mask, _) = make_model(num_hidden_layers=1, num_decoder_layers=3), make_batch()
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "no_repeat_ngram_size": 2}
    assert torch.equal(model.generate(ids, **arguments), model.generate(ids, use_cache=False, **arguments))


def test_a_batch_whose_labels_all_are_ignored_costs_nothing() -> None:
    model, (ids, mask, labels) = make_model(), make_batch()
    loss = model(ids, mask, labels=torch.full_like(labels, -100), num_items_in_batch=torch.tensor(0)).loss
    assert loss.item() == 0


def test_norms_take_their_eps_from_the_config() -> None:
    norms = [m for m in make_model(rms_norm_eps=1e-3).modules() if type(m).__name__ == "RMSNorm"]
    assert {norm.eps for norm in norms} == {1e-3}


def test_checkpointing_refuses_to_fill_a_cache_twice() -> None:
    model, (ids, mask, labels) = make_model().train(), make_batch()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="train with use_cache=False"):
        model(ids, mask, labels=labels, use_cache=True)


def test_stop_strings_end_a_translation() -> None:
    tokenizer = make_tokenizer(300)
    model = make_model(vocab_size=len(tokenizer), eos_token_id=None)
    source = torch.tensor([[5, 6, 7]])
    whole = model.generate(source, max_new_tokens=8, do_sample=False)
    third = tokenizer.decode(whole[0, 3])
    cut = model.generate(source, max_new_tokens=8, do_sample=False, stop_strings=[third], tokenizer=tokenizer)
    assert cut.tolist() == whole[:, : cut.shape[1]].tolist()
    assert cut.shape[1] <= 4
