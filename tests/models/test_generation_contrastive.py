"""Contrastive search on cached states equals its definition, computed from scratch for every candidate."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import TextStreamer

from neural_layers.errors import InputError
from neural_layers.models.generation import contrastive_generate, contrastive_search
from tests.models.generation_samples import MIXERS, make_ids, make_model, make_tokenizer


@torch.no_grad()
def from_scratch(model, ids, alpha: float, k: int, new_tokens: int, end: int | None = None) -> list[int]:
    """Row by row, without a cache: the whole text is read anew for every candidate."""
    said = ids.tolist()
    for _ in range(new_tokens):
        p = model(torch.tensor([said]), use_cache=False).logits[0, -1].float().softmax(-1)
        best, best_value = None, None
        for token in p.argsort(descending=True)[:k].tolist():
            states = model(torch.tensor([[*said, token]]), use_cache=False, output_hidden_states=True).hidden_states[-1]
            penalty = cosine_similarity(states[0, -1:], states[0, :-1]).max()
            value = (1 - alpha) * p[token].double() - alpha * penalty
            if best is None or value > best_value:
                best, best_value = token, value
        said.append(best)
        if best == end:
            break
    return said


@pytest.mark.parametrize(("alpha", "k"), [(0.6, 4), (0.3, 7), (1.0, 2)])
@pytest.mark.parametrize("mixers", MIXERS)
def test_contrastive_search_equals_its_definition(mixers, alpha, k) -> None:
    model, ids = make_model(mixers), make_ids()
    said = contrastive_generate(model, ids, penalty_alpha=alpha, top_k=k, max_new_tokens=12)
    assert said[0].tolist() == from_scratch(model, ids[0], alpha, k, 12)


def test_it_says_other_things_than_greedy_decoding() -> None:
    different = 0
    for mixers in MIXERS:
        model, ids = make_model(mixers), make_ids()
        said = contrastive_generate(model, ids, penalty_alpha=0.8, max_new_tokens=20)
        assert len(set(said[0, 9:].tolist())) > 4
        different += not torch.equal(said, model.generate(ids, max_new_tokens=20, do_sample=False))
    assert different >= 3


@pytest.mark.parametrize("mixers", MIXERS)
def test_padded_rows_with_an_end_say_what_they_say_alone(mixers) -> None:
    model, ids, lengths = make_model(mixers), make_ids(batch=3), (9, 4, 1)
    alone = [from_scratch(model, ids[row, 9 - n :], 0.6, 4, 12) for row, n in enumerate(lengths)]
    end = alone[0][9 + 5]
    alone = [from_scratch(model, ids[row, 9 - n :], 0.6, 4, 12, end) for row, n in enumerate(lengths)]
    mask = torch.stack([torch.cat([torch.zeros(9 - n), torch.ones(n)]) for n in lengths]).long()
    together = model.generate(
        ids * mask,
        attention_mask=mask,
        custom_generate=contrastive_search,
        penalty_alpha=0.6,
        top_k=4,
        max_new_tokens=12,
        eos_token_id=end,
    )
    for row, length in enumerate(lengths):
        said = alone[row][length:]
        assert together[row, 9:].tolist() == said + [0] * (together.shape[1] - 9 - len(said))


@pytest.mark.parametrize("chunk", [1, 4, 30])
def test_a_prompt_read_in_chunks_changes_nothing(chunk) -> None:
    model, ids = make_model(), make_ids(batch=2)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 8}
    whole = contrastive_generate(model, ids, **arguments)
    assert torch.equal(whole, contrastive_generate(model, ids, prefill_chunk_size=chunk, **arguments))


@pytest.mark.parametrize("settings", [{"penalty_alpha": 0.0}, {"top_k": 1}])
def test_without_penalty_or_choice_it_is_greedy_decoding(settings) -> None:
    model, ids = make_model(), make_ids(batch=2)
    greedy = model.generate(ids, max_new_tokens=12, do_sample=False, repetition_penalty=1.2)
    assert torch.equal(contrastive_generate(model, ids, max_new_tokens=12, repetition_penalty=1.2, **settings), greedy)


@pytest.mark.parametrize("mixers", MIXERS)
def test_a_returned_cache_goes_on_as_any_other(mixers) -> None:
    model, ids = make_model(mixers), make_ids(batch=2)
    first = contrastive_generate(model, ids, max_new_tokens=6, return_dict_in_generate=True, output_scores=True)
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1 == 14
    assert len(first.scores) == 6
    # The mask is given: the padding's token may be among those said.
    arguments = {"attention_mask": torch.ones_like(first.sequences), "max_new_tokens": 8, "do_sample": False}
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, **arguments)
    assert torch.equal(rest, model.generate(first.sequences, **arguments))


def test_forbidden_tokens_are_never_taken() -> None:
    model, ids = make_model(), make_ids()
    allowed = [3, 4, 5]
    said = contrastive_generate(
        model, ids, top_k=8, max_new_tokens=12, suppress_tokens=[i for i in range(40) if i not in allowed]
    )
    assert set(said[0, 9:].tolist()) <= set(allowed)


def test_stop_strings_and_streamers_are_served(capsys) -> None:
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer))
    ids = tokenizer("the quick fox", return_tensors="pt").input_ids
    whole = tokenizer.decode(contrastive_generate(model, ids, max_new_tokens=30)[0, ids.shape[1] :])
    stop = next(whole[i : i + 2] for i in range(10, len(whole)) if whole[i : i + 2].isascii())
    said = contrastive_generate(
        model,
        ids,
        max_new_tokens=30,
        stop_strings=[stop],
        tokenizer=tokenizer,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )
    text = tokenizer.decode(said[0, ids.shape[1] :])
    assert stop in text
    assert stop not in tokenizer.decode(said[0, ids.shape[1] : -1])
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"penalty_alpha": 1.5}, r"penalty_alpha=1.5 must lie in \[0, 1\]"),
        ({"do_sample": True}, "do_sample=True"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"use_cache": False}, "needs a cache that goes back, not NoneType"),
        ({"stop_strings": ["a"]}, "give tokenizer"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
    ],
)
def test_what_does_not_go_with_it_is_refused(arguments, message) -> None:
    with pytest.raises(InputError, match=message):
        contrastive_generate(make_model(), make_ids(), max_new_tokens=2, **arguments)


def test_a_cache_that_was_read_before_is_refused() -> None:
    model, ids = make_model(), make_ids()
    cache = model(ids[:, :5], use_cache=True).past_key_values
    with pytest.raises(InputError, match="past_key_values has read 5 tokens"):
        contrastive_generate(model, ids, past_key_values=cache, max_new_tokens=2)
