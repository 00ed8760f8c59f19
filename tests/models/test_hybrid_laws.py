"""The laws of mixers hold for the whole hybrid model, and its cache goes back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from neural_layers.models.hybrid import HybridCache, HybridModel
from neural_layers.testing import LAWS, check_mixer
from tests.models.hybrids import MIXED, PATTERNS, AsMixer, small_config, small_model, tokens


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("position", ["rope", "alibi", None])
def test_law_holds_for_the_model(law, position) -> None:
    config = small_config(position_embedding=position, qk_norm=position == "rope")
    torch.manual_seed(0)
    report = check_mixer(AsMixer(HybridModel(config)), law, make_cache=lambda: HybridCache(config), dim=16)
    # The unused embedding is drawn from the same weights; only the layers are asked.
    assert report.passed, report


@pytest.mark.parametrize("pattern", ["mamba", "mamba2", "attention", "window", "samba"])
@pytest.mark.parametrize("law", ["chunked", "packed", "packed_chunked", "left_padding", "padded_chunked", "causality"])
def test_law_holds_for_every_pattern(law, pattern) -> None:
    config = small_config(PATTERNS[pattern], intermediate_size=0)
    torch.manual_seed(0)
    report = check_mixer(AsMixer(HybridModel(config)), law, make_cache=lambda: HybridCache(config), dim=16)
    assert report.passed, report


@pytest.mark.parametrize("scaling", ["linear", "yarn", "llama3", "dynamic"])
def test_scaled_rope_keeps_the_laws(scaling) -> None:
    parameters = {"rope_type": scaling, "rope_theta": 100.0, "factor": 4.0}
    if scaling != "linear":
        parameters["original_max_position_embeddings"] = 16
    if scaling == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = small_config(rope_parameters=parameters)
    torch.manual_seed(0)
    laws = ["chunked", "packed", "left_padding"]
    report = check_mixer(AsMixer(HybridModel(config)), laws, make_cache=lambda: HybridCache(config), dim=16)
    assert report.passed, report


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.sampled_from(sorted(PATTERNS)), st.booleans())
def test_any_chunking_gives_the_logits_of_one_call(split, pattern, transformers_cache) -> None:
    model, ids = small_model(PATTERNS[pattern]), tokens(2, sum(split))
    is_recurrent = all(mixer.startswith("mamba") for mixer in PATTERNS[pattern])
    # transformers' cache counts tokens by its attention layers alone.
    cache = DynamicCache(config=model.config) if transformers_cache and not is_recurrent else HybridCache(model.config)
    with torch.no_grad():
        chunks = [model(chunk, past_key_values=cache).logits for chunk in ids.split(split, dim=1)]
        torch.testing.assert_close(torch.cat(chunks, dim=1), model(ids).logits, rtol=1e-10, atol=1e-10)
    assert cache.get_seq_length() == sum(split)


@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.sampled_from(sorted(PATTERNS)))
def test_packed_documents_train_as_they_do_alone(lengths, pattern) -> None:
    model, ids = small_model(PATTERNS[pattern]).train(), tokens(1, sum(lengths))
    position_ids = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    seq_idx = torch.cat([torch.full((n,), i % 2) for i, n in enumerate(lengths)]).unsqueeze(0)
    counted = max(sum(n - 1 for n in lengths), 1)

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))

    alone = sum(model(d, labels=d, num_items_in_batch=counted).loss for d in ids.split(lengths, dim=1))
    expected = gradients(alone)
    full = torch.ones_like(ids)  # as transformers' tokenizers give it, also where nothing is padded
    for packing in (
        {"seq_idx": seq_idx},
        {"position_ids": position_ids},
        {"position_ids": position_ids, "attention_mask": full},
    ):
        loss = model(ids, labels=ids, num_items_in_batch=counted, **packing).loss
        torch.testing.assert_close(loss, alone, rtol=1e-10, atol=1e-10)
        for found, right in zip(gradients(loss), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS)
@given(reads=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_cropped_cache_goes_on_as_if_what_was_dropped_had_never_been_read(pattern, reads, seed) -> None:
    model, generator = small_model(PATTERNS[pattern]), torch.Generator().manual_seed(seed)
    cache, kept = HybridCache(model.config), tokens(1, 5, seed=seed)
    with torch.no_grad():
        model(kept, past_key_values=cache)
        cache.activate_past_recording()
        for i, length in enumerate(reads):
            candidates = tokens(1, length, seed=seed + i + 1)
            logits = model(candidates, past_key_values=cache).logits
            expected = model(torch.cat([kept, candidates], dim=1)).logits[:, -length:]
            torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
            dropped = int(torch.randint(0, length + 1, (), generator=generator))
            cache.crop(-dropped)
            kept = torch.cat([kept, candidates[:, : length - dropped]], dim=1)
            assert cache.get_seq_length() == kept.shape[1]


def test_snapshot_rollback_fork_and_reorder() -> None:
    model, ids, later = small_model(), tokens(2, 6), tokens(2, 3, seed=1)
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        snapshot, other = cache.snapshot(), cache.fork()
        first = model(later, past_key_values=cache).logits
        model(later.flip(1), past_key_values=other)
        cache.rollback(snapshot)
        torch.testing.assert_close(model(later, past_key_values=cache).logits, first)
        cache.rollback(snapshot)  # a snapshot serves more than once
        cache.reorder_cache(torch.tensor([1, 1, 0]))
        swapped = model(later[[1, 1, 0]], past_key_values=cache).logits
    torch.testing.assert_close(swapped, first[[1, 1, 0]])


def test_reordered_rows_remember_what_a_crop_has_kept() -> None:
    model, ids, later = small_model(), tokens(2, 4), tokens(2, 5, seed=1)
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.activate_past_recording()
        model(later, past_key_values=cache)
        cache.crop(-2)
        cache.reorder_cache(torch.tensor([1, 0]))
        found = model(later[[1, 0], 3:], past_key_values=cache).logits
        expected = model(torch.cat([ids, later], dim=1)[[1, 0]]).logits[:, -2:]
    torch.testing.assert_close(found, expected)


def test_gradient_flows_from_chunk_to_chunk() -> None:
    model, ids = small_model(), tokens(1, 9)
    x = model.model.embed_tokens(ids).detach().requires_grad_()
    whole = model(inputs_embeds=x).logits[:, -2:].sum()
    cache = HybridCache(model.config)
    for chunk in x.split([4, 3, 2], dim=1):
        last = model(inputs_embeds=chunk, past_key_values=cache, use_cache=True).logits
    (found,), (expected,) = torch.autograd.grad(last.sum(), x), torch.autograd.grad(whole, x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda model, cache: model(tokens(3, 1), past_key_values=cache), "holds 2 rows, and the input has 3"),
        (lambda model, cache: cache.crop(-2), "cannot drop 2 tokens: 0 are recorded"),
        (lambda model, cache: cache.crop(2), "number ≤ 0, not 2"),
        (
            lambda model, cache: model(tokens(2, 2), past_key_values=cache, position_ids=torch.zeros(1, 2).long()),
            "restart behind a filled cache; give seq_idx",
        ),
        (
            lambda model, cache: small_model(["attention"])(tokens(2, 1), past_key_values=cache),
            "made for a model with mixers=",
        ),
        (
            lambda model, cache: model(tokens(2, 1), past_key_values=cache, attention_mask=torch.ones(2, 1)),
            r"attention_mask has shape \(2, 1\); expected \(B, P \+ T\) = \(2, 6\)",
        ),
        (
            lambda model, cache: small_model(MIXED[:1])(
                tokens(2, 1), past_key_values=DynamicCache(config=small_config(MIXED[:1]))
            ),
            "does not know its length without an attention layer; use HybridCache",
        ),
        (
            lambda model, cache: model(tokens(2, 1), past_key_values=DynamicCache(config=small_config(["attention"]))),
            "the cache has 1 layers, and the model 4",
        ),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(use, message) -> None:
    model = small_model()
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(tokens(2, 5), past_key_values=cache)
        with pytest.raises(ValueError, match=message):
            use(model, cache)
