"""Prompt lookup and assisted decoding: recurrent states go back exactly, so the text is that of greedy decoding."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from neural_layers.models.generation.assisted import assisted_tokens
from neural_layers.models.generation.steps import prepare
from neural_layers.models.hybrid import HybridCache
from tests.models.generation_samples import MIXERS, make_ids, make_model

ARGUMENTS = {"max_new_tokens": 18, "do_sample": False}


def greedy(model, ids, **changes):
    return model.generate(ids, **{**ARGUMENTS, **changes})


def almost(model, noise: float):
    """A copy of the model that often, but not always, says the same."""
    generator = torch.Generator().manual_seed(5)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(noise * parameter.std() * torch.randn(parameter.shape, generator=generator).to(parameter))
    return other


def assistant_of(kind: str, model):
    if kind == "the model itself":
        return model
    return almost(model, 0.1) if kind == "good" else make_model(kind, seed=9)


def agreements(model, other, ids) -> int:
    said = greedy(model, ids)
    return int((other(said).logits[0, ids.shape[1] - 1 : -1].argmax(-1) == said[0, ids.shape[1] :]).sum())


def test_the_good_assistant_is_right_at_times_and_wrong_at_times() -> None:
    model, ids = make_model(), make_ids()
    assert 5 <= agreements(model, almost(model, 0.1), ids) < 18


@pytest.mark.parametrize("kind", ["good", "mamba", "attention", "the model itself"])
@pytest.mark.parametrize("mixers", MIXERS)
def test_assisted_decoding_is_greedy_decoding(mixers, kind) -> None:
    model = make_model(mixers)
    assistant = assistant_of(kind, model)
    for seed in range(2):
        ids = make_ids(seed)
        assert torch.equal(greedy(model, ids, assistant_model=assistant), greedy(model, ids))


@pytest.mark.parametrize("lookup", [1, 3, 10])
@pytest.mark.parametrize("mixers", MIXERS)
def test_prompt_lookup_is_greedy_decoding(mixers, lookup) -> None:
    model, ids = make_model(mixers), make_ids().repeat(1, 2)
    assert torch.equal(greedy(model, ids, prompt_lookup_num_tokens=lookup), greedy(model, ids))


def test_prompt_lookup_reads_several_tokens_at_once_and_keeps_some() -> None:
    model, ids = make_model("attention"), make_ids().repeat(1, 2)
    loop = greedy(model, ids, max_new_tokens=40)
    calls = []
    hook = model.model.register_forward_hook(lambda module, given, out: calls.append(out.last_hidden_state.shape[1]))
    # The text so far as prompt: what it says next stands in it already where it goes round in circles.
    prompt = torch.cat([ids, loop], dim=1)
    plain = greedy(model, prompt)
    plainly = len(calls)
    assert torch.equal(greedy(model, prompt, prompt_lookup_num_tokens=6), plain)
    hook.remove()
    assert max(calls[plainly + 1 :]) > 1


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
@pytest.mark.parametrize("way", ["assistant", "lookup"])
def test_limits_end_the_text_at_the_same_token(way, limit) -> None:
    model, ids = make_model(), make_ids().repeat(1, 2)
    help_ = {"assistant_model": almost(model, 0.1)} if way == "assistant" else {"prompt_lookup_num_tokens": 4}
    assert torch.equal(greedy(model, ids, max_new_tokens=limit, **help_), greedy(model, ids, max_new_tokens=limit))


@pytest.mark.parametrize("position", [0, 1, 4, 9, 15])
@pytest.mark.parametrize("mixers", ["mamba", "hybrid"])
def test_the_end_token_ends_the_text_at_the_same_place(mixers, position) -> None:
    model, ids = make_model(mixers), make_ids().repeat(1, 2)
    end = int(greedy(model, ids)[0, ids.shape[1] + position])
    plain = greedy(model, ids, eos_token_id=end)
    for help_ in (
        {"assistant_model": model},
        {"prompt_lookup_num_tokens": 4},
        {"assistant_model": almost(model, 0.1)},
    ):
        assert torch.equal(greedy(model, ids, eos_token_id=end, **help_), plain)


@pytest.mark.parametrize("processing", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}])
def test_penalties_apply_to_speculated_tokens(processing) -> None:
    model, ids = make_model(), make_ids().repeat(1, 2)
    plain = greedy(model, ids, **processing)
    assert torch.equal(greedy(model, ids, assistant_model=almost(model, 0.1), **processing), plain)
    assert torch.equal(greedy(model, ids, prompt_lookup_num_tokens=4, **processing), plain)


@pytest.mark.parametrize("mixers", MIXERS)
def test_the_cache_of_assisted_decoding_goes_on_as_any_other(mixers) -> None:
    model, ids = make_model(mixers), make_ids()
    whole = greedy(model, ids)
    first = greedy(model, ids, max_new_tokens=10, assistant_model=almost(model, 0.1), return_dict_in_generate=True)
    rest = greedy(model, first.sequences, max_new_tokens=8, past_key_values=first.past_key_values.fork())
    assert torch.equal(rest, whole)
    rest = greedy(
        model, first.sequences, max_new_tokens=8, past_key_values=first.past_key_values, assistant_model=model
    )
    assert torch.equal(rest, whole)


def test_a_cache_filled_before_serves_assisted_decoding() -> None:
    model, ids = make_model(), make_ids()
    cache = model(ids[:, :5], use_cache=True).past_key_values
    assert torch.equal(
        greedy(model, ids, past_key_values=cache, assistant_model=almost(model, 0.1)), greedy(model, ids)
    )


def continue_with(model, kind: str, ids, **changes):
    """The cache and the text of 10 more tokens, with guesses from `kind`; streamed where it says so."""
    help_ = {"assistant_model": almost(model, 0.1)} if "assistant" in kind else {"prompt_lookup_num_tokens": 4}
    cache = changes.pop("past_key_values", None)
    if "streamed" in kind:
        cache = HybridCache(model.config) if cache is None else cache
        prepared = prepare(model, ids, max_new_tokens=10, do_sample=False, past_key_values=cache, **help_, **changes)
        new = [token for step in assisted_tokens(prepared, help_.get("assistant_model")) for token in step]
        return cache, torch.cat([ids, torch.tensor([new])], dim=1)
    given = {} if cache is None else {"past_key_values": cache}
    said = greedy(model, ids, max_new_tokens=10, return_dict_in_generate=True, **given, **help_, **changes)
    return said.past_key_values, said.sequences


KINDS = ["assistant", "lookup", "streamed assistant", "streamed lookup"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixers", MIXERS)
def test_a_returned_cache_records_no_more_and_goes_on_exactly(mixers, kind) -> None:
    model, ids, more = make_model(mixers), make_ids().repeat(1, 2), make_ids(3)
    cache, said = continue_with(model, kind, ids)
    assert torch.equal(said, greedy(model, ids, max_new_tokens=10))
    assert not cache._recording
    text = torch.cat([said, more], dim=1)
    with torch.no_grad():
        found = model(text[:, cache.get_seq_length() :], past_key_values=cache).logits[:, -more.shape[1] :]
        torch.testing.assert_close(found, model(text).logits[:, -more.shape[1] :])
    assert cache._before is None
    assert not cache._since


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_recorded_before_goes_on_recording(kind) -> None:
    model, ids, more = make_model(), make_ids().repeat(1, 2), make_ids(3)
    cache = HybridCache(model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
    cache, said = continue_with(model, kind, ids, past_key_values=cache)
    text = torch.cat([said, more], dim=1)
    with torch.no_grad():
        read = model(text[:, cache.get_seq_length() :], past_key_values=cache)
        cache.crop(-more.shape[1])
        found = model(more.flip(1), past_key_values=cache).logits
        expected = model(torch.cat([said, more.flip(1)], dim=1)).logits[:, -more.shape[1] :]
    assert read.past_key_values is cache
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("with_mask", [True, False])
def test_recording_ends_also_where_generating_fails(with_mask) -> None:
    model, ids = make_model(), make_ids().repeat(1, 2)
    cache = HybridCache(model.config)

    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    given = {"attention_mask": torch.ones_like(ids)} if with_mask else {}
    with pytest.raises(RuntimeError, match="on purpose"):
        greedy(model, ids, past_key_values=cache, prompt_lookup_num_tokens=4, stopping_criteria=[fail], **given)
    assert not cache._recording


def test_recording_ends_also_where_the_ids_are_only_those_not_read() -> None:
    model, ids = make_model(), make_ids().repeat(1, 2)
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).past_key_values
    rest, mask = ids[:, 5:], torch.ones_like(ids)
    said = greedy(model, rest, attention_mask=mask, past_key_values=cache, assistant_model=almost(model, 0.1))
    assert torch.equal(said, greedy(model, ids)[:, 5:])
    assert not cache._recording


def test_a_rollback_leaves_the_recording_as_it_is() -> None:
    model, ids = make_model(), make_ids()
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        snapshot = cache.snapshot()
        with cache.past_recording():
            model(make_ids(1), past_key_values=cache)
            recorded = cache.snapshot()
            cache.rollback(snapshot)
            assert cache._recording
        cache.rollback(recorded)
        assert not cache._recording
        with pytest.raises(ValueError, match="0 are recorded"):
            cache.crop(-1)


def test_sampling_with_an_assistant_runs_and_a_seed_decides() -> None:
    model, ids = make_model(), make_ids()
    said = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        said.append(greedy(model, ids, do_sample=True, top_k=0, assistant_model=almost(model, 0.1)))
    assert torch.equal(said[0], said[1])
    assert not torch.equal(said[0], said[2])


def test_sampling_with_an_assistant_draws_from_the_models_distribution() -> None:
    model, ids, draws = make_model(), make_ids(length=5), 150
    assistant = almost(model, 0.1)
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    torch.manual_seed(0)
    counts = torch.zeros(40)
    for _ in range(draws):
        said = greedy(model, ids, do_sample=True, top_k=0, temperature=2.0, assistant_model=assistant, max_new_tokens=2)
        counts[said[0, 5]] += 1
    expected = (model(ids).logits[0, -1].float() / 2).softmax(-1)
    # Each frequency lies within 4 standard deviations, √(p(1 − p)/n).
    assert bool(((counts / draws - expected).abs() <= 4 * (expected * (1 - expected) / draws).sqrt() + 1 / draws).all())
