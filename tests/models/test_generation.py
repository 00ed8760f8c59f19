"""Every usual way of generating, on models with recurrent state: the cache, padding and speculation change nothing."""

import itertools

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from neural_layers.models.hybrid import HybridCache
from tests.models.generation_samples import MIXERS, make_ids, make_model, make_tokenizer

WAYS = {
    "greedy": {},
    "repetition penalty": {"repetition_penalty": 1.3},
    "n-gram ban": {"no_repeat_ngram_size": 2},
    "temperature": {"do_sample": True, "temperature": 0.8, "top_k": 0},
    "top-k": {"do_sample": True, "top_k": 5},
    "top-p": {"do_sample": True, "top_p": 0.8, "top_k": 0},
    "min-p": {"do_sample": True, "min_p": 0.1, "top_k": 0},
    "typical": {"do_sample": True, "typical_p": 0.7, "top_k": 0},
    "beams": {"num_beams": 3},
    "short beams": {"num_beams": 3, "length_penalty": -1.0, "early_stopping": True, "eos_token_id": 7},
    "long beams": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never", "eos_token_id": 7},
    "n-best": {"num_beams": 4, "num_return_sequences": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True, "temperature": 3.0},
}


def generate(model, ids, seed: int = 0, **arguments):
    torch.manual_seed(seed)
    return model.generate(ids, **{"max_new_tokens": 14, "do_sample": False, **arguments})


def is_varied(sequences, prompt: int) -> bool:
    return len(set(sequences[:, prompt:].flatten().tolist())) > 4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mixers", MIXERS)
def test_every_way_says_the_same_with_and_without_a_cache(mixers, way) -> None:
    model, ids = make_model(mixers), make_ids(batch=2)
    said = generate(model, ids, **WAYS[way])
    assert torch.equal(said, generate(model, ids, use_cache=False, **WAYS[way]))
    assert said.shape[0] == 2 * WAYS[way].get("num_return_sequences", 1)
    assert is_varied(said, 9) or "eos_token_id" in WAYS[way]


@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way].get("do_sample")])
def test_a_seed_decides_what_is_sampled(way) -> None:
    model, ids = make_model(), make_ids()
    first = generate(model, ids, seed=1, **WAYS[way])
    assert torch.equal(first, generate(model, ids, seed=1, **WAYS[way]))
    assert not torch.equal(first, generate(model, ids, seed=2, **WAYS[way]))


def test_filters_leave_what_they_promise() -> None:
    model, ids = make_model(), make_ids(batch=8)
    greedy = generate(model, ids)
    assert torch.equal(generate(model, ids, do_sample=True, top_k=1), greedy)
    assert torch.equal(generate(model, ids, do_sample=True, top_p=1e-6, top_k=0), greedy)
    assert torch.equal(generate(model, ids, do_sample=True, min_p=1.0, top_k=0), greedy)
    for row in generate(model, ids, no_repeat_ngram_size=2, max_new_tokens=40).tolist():
        pairs = list(itertools.pairwise(row))
        assert not [pair for i, pair in enumerate(pairs) if i >= 8 and pair in pairs[:i]]


def test_beams_find_a_likelier_text_than_greedy_decoding_and_rank_it() -> None:
    model, ids = make_model(), make_ids(batch=2)
    arguments = {"return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    found = generate(model, ids, num_beams=8, num_return_sequences=3, **arguments)

    def likelihood(sequences):
        logits = model(sequences).logits[:, 8:-1].log_softmax(-1)
        return logits.gather(2, sequences[:, 9:, None]).sum((1, 2))

    scores = found.sequences_scores.double().view(2, 3)
    torch.testing.assert_close(likelihood(found.sequences).view(2, 3), scores, rtol=0, atol=1e-4)
    assert bool((scores.diff(dim=1) <= 0).all())
    assert bool((scores[:, 0] >= likelihood(generate(model, ids)) - 1e-4).all())


@pytest.mark.parametrize("way", ["greedy", "beams", "n-gram ban", "n-best"])
@pytest.mark.parametrize("mixers", MIXERS)
def test_rows_padded_on_the_left_say_what_they_say_alone(mixers, way) -> None:
    model, ids, lengths = make_model(mixers), make_ids(batch=3), (9, 4, 1)
    mask = torch.stack([torch.cat([torch.zeros(9 - n), torch.ones(n)]) for n in lengths]).long()
    together = generate(model, ids * mask, attention_mask=mask, **WAYS[way])
    best = together.view(3, -1, together.shape[1])
    for row, length in enumerate(lengths):
        alone = generate(model, ids[row : row + 1, 9 - length :], **WAYS[way])
        assert torch.equal(best[row, :, 9:], alone[:, length:])


@pytest.mark.parametrize("cached", [True, False])
def test_a_stop_string_ends_the_text(cached) -> None:
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer))
    ids = tokenizer("the quick fox", return_tensors="pt").input_ids
    whole = tokenizer.decode(generate(model, ids, max_new_tokens=40)[0, ids.shape[1] :])
    stop = next(whole[i : i + 2] for i in range(10, len(whole)) if whole[i : i + 2].isascii())
    said = generate(model, ids, max_new_tokens=40, stop_strings=[stop], tokenizer=tokenizer, use_cache=cached)
    text = tokenizer.decode(said[0, ids.shape[1] :])
    assert whole.startswith(text)
    assert stop in text
    assert stop not in tokenizer.decode(said[0, ids.shape[1] : -1])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 9, 30])
@pytest.mark.parametrize("mixers", MIXERS)
def test_prefill_in_chunks_equals_prefill_at_once(mixers, chunk, padded) -> None:
    model, ids = make_model(mixers), make_ids(batch=2, length=21)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :7] = 0
    arguments = {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    whole = generate(model, ids, **arguments)
    chunked = generate(model, ids, prefill_chunk_size=chunk, **arguments)
    assert torch.equal(whole.sequences, chunked.sequences)
    torch.testing.assert_close(whole.logits[0], chunked.logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mixers", MIXERS)
def test_going_on_with_a_returned_cache_equals_not_having_stopped(mixers, padded) -> None:
    model, ids = make_model(mixers), make_ids(batch=2)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = 0
    whole = generate(model, ids, attention_mask=mask, max_new_tokens=20)
    first = generate(model, ids, attention_mask=mask, max_new_tokens=6, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, HybridCache)
    assert first.past_key_values.get_seq_length() == 14
    mask = torch.nn.functional.pad(mask, (0, 6), value=1)
    rest = {"attention_mask": mask, "past_key_values": first.past_key_values, "max_new_tokens": 14}
    assert torch.equal(generate(model, first.sequences, **rest), whole)


@pytest.mark.parametrize("chunk", [None, 2])
def test_new_text_behind_a_returned_cache_is_read_alone(chunk) -> None:
    model, ids, more = make_model(), make_ids(), make_ids(1, length=5)
    first = generate(model, ids, max_new_tokens=6, return_dict_in_generate=True)
    history = torch.cat([first.sequences, more], dim=1)
    read = []
    hook = model.model.register_forward_pre_hook(
        lambda module, given, named: read.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    said = generate(model, history, past_key_values=first.past_key_values, prefill_chunk_size=chunk)
    hook.remove()
    assert max(read) == (chunk or 6)
    assert torch.equal(said, generate(model, history))
