"""A chat keeps its state, and says what a model that reads everything anew would say."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessor

from neural_layers.errors import InputError
from neural_layers.models.generation import ChatSession, PlainTurns, TemplateTurns
from neural_layers.models.generation.turns import StopFilter
from tests.models.generation_samples import MIXERS, make_model, make_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = make_tokenizer()
CHATML = make_tokenizer(310, additional=["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
CHATML.chat_template = TEMPLATE
TOKENIZERS = {"plain": PLAIN, "template": CHATML}


class Saying(LogitsProcessor):
    """Makes a model say the given texts, one in each answer, as tokens of `split` bytes at most."""

    def __init__(self, tokenizer, ids):
        self.tokenizer, self.ids, self.said = tokenizer, list(ids), 0

    def __call__(self, input_ids, scores):
        token = self.ids[min(self.said, len(self.ids) - 1)]
        self.said += 1
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)


def make_session(kind="plain", mixers="hybrid", **arguments):
    tokenizer = TOKENIZERS[kind]
    context = arguments.pop("context", 512)
    model = make_model(mixers, vocab_size=len(tokenizer), max_position_embeddings=context)
    return ChatSession(model, tokenizer, **{"max_new_tokens": 12, **arguments})


def afresh(session, ids):
    """What the model says to `ids` when it reads them anew."""
    ids = torch.tensor([ids])
    said = session.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return said[0].tolist()


@pytest.mark.parametrize("help_", [{}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}])
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("mixers", MIXERS)
def test_answers_are_those_of_reading_the_whole_history(mixers, kind, help_) -> None:
    session, prompts = make_session(kind, mixers, **help_), []
    for message in ("where is the dog?", "and the fox?", "thank you"):
        following = session.turns.following if prompts else session.turns.opening
        asked = [*session.messages, {"role": "user", "content": message}]
        prompts.append(session.token_ids + following(asked))
        answer = session.ask(message)
        said = session.token_ids
        assert said == afresh(session, prompts[-1])
        assert session.stopped_by == "length"
        assert answer == TOKENIZERS[kind].decode(said[len(prompts[-1]) :], skip_special_tokens=True).strip()
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 3
    assert prompts[2][: len(prompts[1])] == prompts[1]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_history_is_not_read_again(kind) -> None:
    session, read = make_session(kind), []
    session.ask("a dog and a fox are friends, and the fox is quick")
    session.model.model.register_forward_pre_hook(
        lambda module, given, named: read.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    before = len(session.token_ids)
    session.ask("ok")
    # The message, the format around it, and the last token of the answer before.
    assert read[0] == len(session.token_ids) - 12 - before + 1
    assert read[1:] == [1] * 11


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_tokens_are_the_conversation_as_its_format_writes_it(kind) -> None:
    session = make_session(kind, system="Be brief.")
    tokenizer = TOKENIZERS[kind]
    end = tokenizer.eos_token_id
    for message, answer in (("hello", " the dog"), ("and the fox?", " quick\nand brown")):
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        session.arguments = {"logits_processor": [Saying(tokenizer, [*ids, end])], "eos_token_id": end}
        assert session.ask(message) == answer.strip()
        assert session.stopped_by == "end"
    text = tokenizer.decode(session.token_ids)
    if kind == "plain":
        assert text == "Be brief.\n\nUser: hello\nAssistant: the dog\nUser: and the fox?\nAssistant: quick\nand brown"
        assert isinstance(session.turns, PlainTurns)
    else:
        assert text == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
            "<|im_start|>assistant\n the dog<|im_end|>\n<|im_start|>user\nand the fox?<|im_end|>\n"
            "<|im_start|>assistant\n quick\nand brown"
        )
        assert isinstance(session.turns, TemplateTurns)


@pytest.mark.parametrize("single_bytes", [False, True])
@pytest.mark.parametrize("said", [" the dog.\nUser: and", " the dog.\n\nUser:", "\nUser: x", " dog\nUse it.\nUser:"])
def test_an_answer_ends_where_the_model_begins_the_next_turn(said, single_bytes) -> None:
    session = make_session()
    byte_ids = [i for letter in said for i in PLAIN(letter)["input_ids"]]
    ids = byte_ids if single_bytes else PLAIN(said)["input_ids"]
    session.arguments = {"logits_processor": [Saying(PLAIN, ids)]}
    session.max_new_tokens = len(ids)
    pieces = list(session.say("where is the dog?"))
    answer = said[: said.index("\nUser:")]
    assert "".join(pieces) == answer.lstrip()
    assert session.messages[-1]["content"] == answer.strip()
    assert session.stopped_by == "stop"
    assert PLAIN.decode(session.token_ids) == f"User: where is the dog?\nAssistant:{answer}"
    # The state is that before the next turn: the model goes on as if it had not said that.
    session.arguments = {}
    asked = [*session.messages, {"role": "user", "content": "ok"}]
    prompt = session.token_ids + session.turns.following(asked)
    assert session.cache.get_seq_length() <= len(session.token_ids)
    session.max_new_tokens = 12
    session.ask("ok")
    assert session.token_ids == afresh(session, prompt)


@pytest.mark.parametrize("help_", [{}, {"prompt_lookup_num_tokens": 3}])
@pytest.mark.parametrize("mixers", MIXERS)
def test_undo_goes_back_to_before_the_turn(mixers, help_) -> None:
    session = make_session(mixers=mixers, **help_)
    session.ask("hello")
    ids, length = session.token_ids, session.cache.get_seq_length()
    first = session.ask("and the fox?")
    after = session.token_ids
    assert session.undo() == "and the fox?"
    assert (session.token_ids, session.cache.get_seq_length()) == (ids, length)
    assert session.ask("something else") != ""
    session.undo()
    assert session.ask("and the fox?") == first
    assert session.token_ids == after
    assert session.undo() == "and the fox?"
    assert session.undo() == "hello"
    assert session.messages == []
    with pytest.raises(InputError, match="there is no turn to undo"):
        session.undo()


@pytest.mark.parametrize("help_", [{}, {"prompt_lookup_num_tokens": 3}])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_answer_that_was_broken_off_is_kept_as_far_as_it_came(kind, help_) -> None:
    session = make_session(kind, **help_)
    session.max_new_tokens = 40
    answer = session.say("where is the dog?")
    shown = next(answer) + next(answer)
    answer.close()
    assert session.stopped_by == "closed"
    assert session.messages[-1]["content"].startswith(shown.strip())
    asked = [*session.messages, {"role": "user", "content": "ok"}]
    prompt = session.token_ids + session.turns.following(asked)
    session.max_new_tokens = 12
    session.ask("ok")
    assert session.token_ids == afresh(session, prompt)


def test_an_answer_still_open_is_ended_by_what_follows() -> None:
    session = make_session()
    answer = session.say("hello")
    shown = next(answer)
    second = session.say("and the fox?")
    assert session.messages[1]["content"].startswith(shown.strip())
    assert list(answer) == []
    next(second)
    assert session.undo() == "and the fox?"
    assert len(session.messages) == 2
    for _ in session.say("ok"):
        break
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 2
    session.say("never begun")
    assert session.undo() == "ok"


def test_an_error_takes_the_turn_back() -> None:
    session = make_session()
    session.ask("hello")
    ids, messages = session.token_ids, session.messages

    def interrupt(*_):
        raise KeyboardInterrupt

    answer = session.say("and the fox?")
    next(answer)
    # In the middle of a call, when some layers have read a token and others have not.
    hook = session.model.model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(answer)
    hook.remove()
    assert (session.token_ids, session.messages) == (ids, messages)
    asked = [*messages, {"role": "user", "content": "ok"}]
    session.ask("ok")
    assert session.token_ids == afresh(session, ids + session.turns.following(asked))


def test_a_full_context_is_told() -> None:
    session = make_session(context=40)
    session.max_new_tokens = 400
    session.ask("hello")
    assert session.stopped_by == "context"
    assert len(session.token_ids) == 40
    with pytest.raises(InputError, match="has 40 tokens and would have 5. .* the context is 40: say less, undo"):
        session.say("and the fox?")
    session.undo()
    session.reset()
    with pytest.raises(InputError, match="the context is 40"):
        session.say("many words " * 30)
    session.max_new_tokens = 5
    session.ask("hello")
    assert session.stopped_by == "length"


def test_reset_begins_anew_and_keeps_the_system_message() -> None:
    session = make_session(system="Be brief.")
    first = session.ask("hello")
    session.ask("and the fox?")
    session.reset()
    assert session.messages == [{"role": "system", "content": "Be brief."}]
    assert session.ask("hello") == first


def test_contrastive_search_and_sampling_chat_too() -> None:
    session = make_session(penalty_alpha=0.6, top_k=4)
    assert session.ask("hello") != session.ask("and the fox?") != ""
    torch.manual_seed(0)
    session = make_session(do_sample=True, temperature=2.0, top_k=0)
    first = session.ask("hello")
    session.undo()
    assert session.ask("hello") != first


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="max_new_tokens=0 must be at least 1"):
        make_session(max_new_tokens=0)
    with pytest.raises(InputError, match="the message is empty"):
        make_session().say(" \n")
    with pytest.raises(InputError, match="no UTF-8 text"):
        make_session().say("\udcff")
    with pytest.raises(InputError, match="num_beams=2"):
        make_session(num_beams=2).ask("hello")
    broken = make_tokenizer()
    broken.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(InputError, match="cannot write these turns: no system message"):
        ChatSession(make_model(vocab_size=len(broken)), broken).say("hello")


@given(text=st.text("abAB\n", max_size=30), cuts=st.lists(st.integers(1, 5), min_size=1))
def test_the_filter_shows_everything_before_a_stop_string_and_nothing_else(text, cuts) -> None:
    stops, shown, start, i = ("\nA", "Bab"), "", 0, 0
    filtering = StopFilter(stops)
    while start < len(text):
        shown += filtering.push(text[start : start + cuts[i % len(cuts)]])
        start, i = start + cuts[i % len(cuts)], i + 1
    shown += filtering.finish()
    # Where a stop string is complete first, the text ends before it.
    end = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    assert filtering.stopped == (end is not None)
    if end is None:
        assert shown == text
    else:
        assert text.startswith(shown)
        assert not [stop for stop in stops if stop in shown]
