"""Streaming: the pieces are the text, no thread outlives its stream, and errors come through."""

import gc
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import GenerationConfig, StoppingCriteria, TextIteratorStreamer, TextStreamer

from neural_layers.errors import InputError
from neural_layers.models.generation import contrastive_generate, stream
from neural_layers.models.generation.pieces import TextPieces
from neural_layers.models.hybrid import HybridCache
from tests.models.generation_samples import TEXTS, make_model, make_tokenizer

TOKENIZER = make_tokenizer()
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 0},
    "penalties": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 2},
    "lookup": {"prompt_lookup_num_tokens": 4},
    "lookup, chunks, penalties": {"prompt_lookup_num_tokens": 4, "prefill_chunk_size": 3, "repetition_penalty": 1.2},
    "sampled lookup": {"prompt_lookup_num_tokens": 4, "do_sample": True, "temperature": 1.5, "top_k": 0},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
}
PROMPT = "the quick fox and the lazy dog, the quick"


@pytest.fixture(scope="module")
def model():
    return make_model(vocab_size=len(TOKENIZER))


def said_at_once(model, prompt: str, **arguments):
    ids = TOKENIZER(prompt, return_tensors="pt").input_ids
    arguments = {"attention_mask": torch.ones_like(ids), **arguments}
    if "penalty_alpha" in arguments:
        said = contrastive_generate(model, ids, **arguments)
    else:
        said = model.generate(ids, **{"do_sample": False, **arguments})
    return said[0].tolist(), TOKENIZER.decode(said[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("way", WAYS)
def test_the_pieces_are_the_text_of_generate(model, way) -> None:
    torch.manual_seed(3)
    ids, text = said_at_once(model, PROMPT, max_new_tokens=40, **WAYS[way])
    torch.manual_seed(3)
    running = stream(model, TOKENIZER, PROMPT, max_new_tokens=40, **WAYS[way])
    assert running.stopped_by is None
    pieces = list(running)
    assert "".join(pieces) == running.text == text
    assert running.token_ids == ids
    assert running.new_ids == ids[running.num_prompt_tokens :]
    assert running.stopped_by == "length"
    assert len(pieces) > 5


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "temperature": 2.0, "top_k": 0}])
def test_an_assistant_streams_too(model, settings) -> None:
    for other in (model, make_model("mamba", vocab_size=len(TOKENIZER), seed=2)):
        torch.manual_seed(3)
        ids, text = said_at_once(model, PROMPT, max_new_tokens=30, assistant_model=other, **settings)
        torch.manual_seed(3)
        running = stream(model, TOKENIZER, PROMPT, max_new_tokens=30, assistant_model=other, **settings)
        assert "".join(running) == text
        assert running.token_ids == ids
        assert running.past_key_values.get_seq_length() == len(ids) - 1


def test_an_end_within_a_step_ends_the_text(model) -> None:
    whole, _ = said_at_once(model, PROMPT, max_new_tokens=40)
    for position in range(3, 12):
        end = whole[-40 + position]
        ids, _ = said_at_once(model, PROMPT, max_new_tokens=40, eos_token_id=end)
        for help_ in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 4}):
            running = stream(model, TOKENIZER, PROMPT, max_new_tokens=40, eos_token_id=end, **help_)
            list(running)
            assert running.token_ids == ids
            assert running.stopped_by == "end"


def test_pieces_come_while_the_model_works(model) -> None:
    calls, counts = [], []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    for _ in stream(model, TOKENIZER, PROMPT, max_new_tokens=20):
        counts.append(len(calls))
    hook.remove()
    assert counts[0] < 10
    assert len(set(counts)) == len(counts)


def test_a_callback_gets_every_piece(model) -> None:
    pieces = []
    done = stream(model, TOKENIZER, PROMPT, callback=pieces.append, max_new_tokens=20)
    assert "".join(pieces) == done.text == said_at_once(model, PROMPT, max_new_tokens=20)[1]
    assert done.stopped_by == "length"
    assert len(pieces) > 1


@given(seed=st.integers(0, 10_000), is_text=st.booleans(), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_any_tokens_are_decoded_as_at_once(seed, is_text, sizes) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, len(TOKENIZER), (40,), generator=generator).tolist()
    if is_text:
        ids = TOKENIZER("".join(TEXTS[i] for i in torch.randperm(4, generator=generator)))["input_ids"]
    pieces, given, start, i = TextPieces(TOKENIZER), [], 0, 0
    while start < len(ids):
        given.append(pieces.push(ids[start : start + sizes[i % len(sizes)]]))
        start, i = start + sizes[i % len(sizes)], i + 1
    given.append(pieces.finish())
    assert "".join(given) == pieces.text == TOKENIZER.decode(ids, skip_special_tokens=True)
    if is_text:
        assert not [piece for piece in given if "\N{REPLACEMENT CHARACTER}" in piece]
        assert len([piece for piece in given if piece]) > 10


def test_no_piece_holds_half_a_character() -> None:
    plain = make_tokenizer(257)  # single bytes: no merges
    ids = plain("é東🙂")["input_ids"]
    assert len(ids) == 9
    pieces = TextPieces(plain)
    assert [pieces.push([i]) for i in ids] == ["", "é", "", "", "東", "", "", "", "🙂"]
    # An unfinished character is given at the end, as decoding gives it.
    pieces = TextPieces(plain)
    assert [pieces.push([i]) for i in ids[:4]] == ["", "é", "", ""]
    assert pieces.finish() == plain.decode(ids[2:4])


def test_a_long_text_is_not_decoded_anew_at_each_token() -> None:
    lengths = []

    class Counting:
        def decode(self, ids, **named):
            lengths.append(len(ids))
            return TOKENIZER.decode(ids, **named)

    pieces = TextPieces(Counting())
    for i in TOKENIZER(" ".join(TEXTS * 5))["input_ids"]:
        pieces.push([i])
    assert max(lengths) < 20


def test_a_stop_string_and_an_end_are_told_apart(model) -> None:
    ids, text = said_at_once(model, PROMPT, max_new_tokens=40)
    stop = next(text[i : i + 2] for i in range(10, len(text)) if text[i : i + 2].isascii())
    running = stream(model, TOKENIZER, PROMPT, max_new_tokens=40, stop_strings=[stop])
    assert "".join(running) == text[: len(running.text)]
    assert stop in running.text
    assert running.stopped_by == "stop"
    end = ids[running.num_prompt_tokens + 5]
    running = stream(model, TOKENIZER, PROMPT, max_new_tokens=40, eos_token_id=end)
    assert "".join(running) == TOKENIZER.decode(running.new_ids, skip_special_tokens=True)
    assert running.stopped_by == "end"


@pytest.mark.parametrize("leave", ["close", "with", "forget"])
@pytest.mark.parametrize("way", ["greedy", "lookup", "contrastive"])
def test_leaving_a_stream_ends_the_generation(model, way, leave) -> None:
    before, calls = threading.active_count(), []
    gc.disable()
    try:
        running = stream(model, TOKENIZER, PROMPT, max_new_tokens=60, **WAYS[way])
        for _ in running:
            break
        hook = model.register_forward_hook(lambda *_: calls.append(1))
        if leave == "close":
            running.close()
            assert running.stopped_by == "closed"
            assert list(running) == []
        elif leave == "with":
            with running:
                pass
        running = None
        assert threading.active_count() == before
        hook.remove()
    finally:
        gc.enable()
    assert len(calls) <= 2


@pytest.mark.parametrize("way", ["greedy", "lookup", "contrastive"])
def test_a_stream_that_was_left_goes_on_from_its_cache(model, way) -> None:
    ids, _ = said_at_once(model, PROMPT, max_new_tokens=40, **WAYS[way])
    with stream(model, TOKENIZER, PROMPT, max_new_tokens=40, **WAYS[way]) as first:
        for _ in range(4):
            next(first)
    assert first.past_key_values.get_seq_length() == len(first.token_ids) - 1
    read = []
    hook = model.model.register_forward_pre_hook(
        lambda module, given, named: read.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    rest = stream(model, TOKENIZER, first.token_ids, past_key_values=first.past_key_values, max_new_tokens=10)
    list(rest)
    hook.remove()
    assert read == [1] * 10
    if way != "contrastive":
        assert rest.token_ids == ids[: len(rest.token_ids)]


def test_a_cache_that_has_read_the_whole_prompt_is_refused(model) -> None:
    first = stream(model, TOKENIZER, PROMPT, max_new_tokens=5)
    list(first)
    for prompt in (first.token_ids[:-1], "the"):
        with pytest.raises(InputError, match="past_key_values has read 14 tokens, and the prompt has"):
            stream(model, TOKENIZER, prompt, past_key_values=first.past_key_values)


def test_a_cache_of_ones_own_is_filled(model) -> None:
    cache = HybridCache(model.config)
    running = stream(model, TOKENIZER, PROMPT, past_key_values=cache, max_new_tokens=5)
    list(running)
    assert running.past_key_values is cache
    assert cache.get_seq_length() == len(running.token_ids) - 1


class _Failing(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] > 20:
            raise ArithmeticError("at token 20")
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("way", ["greedy", "lookup", "contrastive"])
def test_an_error_within_reaches_the_consumer(model, way) -> None:
    before = threading.active_count()
    running = stream(model, TOKENIZER, PROMPT, max_new_tokens=60, stopping_criteria=[_Failing()], **WAYS[way])
    with pytest.raises(ArithmeticError, match="at token 20"):
        list(running)
    assert running.stopped_by == "error"
    assert threading.active_count() == before


def test_the_streamers_of_transformers_work(model, capsys) -> None:
    ids = TOKENIZER(PROMPT, return_tensors="pt").input_ids
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    _, text = said_at_once(model, PROMPT, max_new_tokens=20)
    model.generate(ids, streamer=TextStreamer(TOKENIZER, skip_prompt=True, skip_special_tokens=True), **arguments)
    assert capsys.readouterr().out == text + "\n"
    for help_ in ({}, {"prompt_lookup_num_tokens": 3}):
        streamer = TextIteratorStreamer(TOKENIZER, skip_prompt=True, timeout=60, skip_special_tokens=True)
        thread = threading.Thread(
            target=model.generate, args=(ids,), kwargs={**arguments, **help_, "streamer": streamer}
        )
        thread.start()
        assert "".join(streamer) == text
        thread.join()


def test_without_a_length_the_context_is_the_limit(model) -> None:
    running = stream(model, TOKENIZER, PROMPT)
    list(running)
    assert len(running.token_ids) == model.config.max_position_embeddings
    assert running.stopped_by == "length"


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        ("", {}, "the prompt is empty"),
        ("\udcff", {}, "the prompt is no UTF-8 text"),
        ([], {}, "the prompt is empty"),
        ([[1], [2]], {}, "the prompt has 2 rows"),
        ([1, 300], {}, "token id 300 lies outside the model's vocabulary of 300"),
        ([1] * 128, {}, "the prompt has 128 tokens, and the model reads 128"),
        ([1] * 100, {"max_new_tokens": 29}, "100 tokens and 29 new ones are over the context of 128; ask for 28"),
        ([1] * 100, {"generation_config": GenerationConfig(max_length=150)}, "100 tokens and 50 new ones"),
        ("a", {"num_beams": 3}, "num_beams=3: several texts"),
        ("a", {"generation_config": GenerationConfig(num_beams=3)}, "num_beams=3: several texts"),
        ("a", {"num_return_sequences": 2}, "num_return_sequences=2: several texts"),
        ("a", {"penalty_alpha": 0.6, "do_sample": True}, "penalty_alpha=0.6 .* and do_sample"),
        (
            "a",
            {"penalty_alpha": 0.6, "prompt_lookup_num_tokens": 2},
            "penalty_alpha=0.6 .* and prompt_lookup_num_tokens",
        ),
    ],
)
def test_what_cannot_be_streamed_is_refused_at_once(model, prompt, arguments, message) -> None:
    with pytest.raises(InputError, match=message):
        stream(model, TOKENIZER, prompt, **arguments)


def test_guesses_of_another_vocabulary_or_without_a_cache_are_refused_at_once(model) -> None:
    with pytest.raises(InputError, match="the assistant has a vocabulary of 40 and the model one of 300"):
        stream(model, TOKENIZER, PROMPT, assistant_model=make_model())
    with pytest.raises(InputError, match="guesses need a cache that goes back"):
        stream(model, TOKENIZER, PROMPT, prompt_lookup_num_tokens=3, use_cache=False)
    with pytest.raises(InputError, match="contrastive search needs a cache that goes back"):
        stream(model, TOKENIZER, PROMPT, penalty_alpha=0.6, use_cache=False)
