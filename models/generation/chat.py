"""A conversation whose state is kept between turns, so that nothing is read twice."""

import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from neural_layers.errors import InputError
from neural_layers.models.generation.prompts import check_text, checked_ids
from neural_layers.models.generation.streaming import TextStream, stream
from neural_layers.models.generation.turns import Message, StopFilter, Turns, turns_of
from neural_layers.models.hybrid import HybridCache


@dataclass
class _Before:
    """What the session was before a turn."""

    cache: HybridCache
    token_ids: list[int]
    messages: list[Message]


class ChatSession:
    """A chat of several turns with a hybrid language model.

        session = ChatSession(model, tokenizer, system="Be brief.", max_new_tokens=200, do_sample=True, temperature=0.7)
        for piece in session.say("Where is the dog?"):
            print(piece, end="", flush=True)
        session.undo()

    system:    a message put before the first turn
    turns:     how turns are written; by default the tokenizer's chat template, or `PlainTurns` without one
    max_new_tokens: of one answer; an answer also ends where the context does
    max_undo:  so many turns can be undone (each keeps the state before it)
    arguments: those of `stream`

    messages:  the conversation so far; token_ids: its tokens as the model has read, or will read, them
    stopped_by: what ended the last answer: "end", "stop", "length", "context" (no room is left) or "closed"

    The answers are those of a model that reads `token_ids` anew at each turn; with `penalty_alpha` (contrastive search
    needs the states of all tokens) it does. A conversation that fills the context is an error; nothing is trimmed.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        system: str | None = None,
        turns: Turns | None = None,
        max_new_tokens: int = 512,
        max_undo: int = 16,
        **arguments: Any,
    ) -> None:
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens} must be at least 1")
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.turns = turns or turns_of(tokenizer)
        self.max_new_tokens, self.max_undo, self.arguments = max_new_tokens, max_undo, arguments
        self._running: Callable[[], Any] = lambda: None  # a weak reference to the answer that was begun last
        self.reset()

    def reset(self) -> None:
        """Forget the conversation; the system message stays."""
        self._end_answer()
        self.cache = HybridCache(self.model.config)
        self.token_ids: list[int] = []
        self.messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        self.stopped_by: str | None = None
        self._undo: list[_Before] = []

    def undo(self) -> str:
        """Take the last turn back, both message and answer; return the message. Raises InputError without one."""
        self._end_answer()
        if not self._undo:
            raise InputError("there is no turn to undo")
        message = next(m["content"] for m in reversed(self.messages) if m["role"] == "user")
        self._go_back(self._undo.pop())
        return message

    def say(self, message: str) -> Generator[str, None, None]:
        """The pieces of the answer to `message`, as they come.

        Where the iteration ends early, what was said so far is the answer; where an error ends it, the turn is taken
        back. Raises InputError for an empty message, and where the context has no room for it.
        """
        if not message.strip():
            raise InputError("the message is empty")
        check_text(message)
        self._end_answer()
        messages = [*self.messages, {"role": "user", "content": message}]
        is_first = not any(m["role"] == "assistant" for m in messages)
        ids = self.turns.opening(messages) if is_first else self.token_ids + self.turns.following(messages)
        limit = self.model.config.max_position_embeddings
        if len(ids) >= limit:
            raise InputError(
                f"the conversation has {len(self.token_ids)} tokens and would have {len(ids)} with this message, and "
                f"the context is {limit}: say less, undo turns or begin anew (reset)"
            )
        checked_ids(self.model.config, ids)
        answer = self._answer(ids, messages)
        self._running = weakref.ref(answer)
        return answer

    def ask(self, message: str) -> str:
        """The whole answer to `message`."""
        for _ in self.say(message):
            pass
        return self.messages[-1]["content"]

    def _answer(self, ids: list[int], messages: list[Message]) -> Generator[str, None, None]:
        before = _Before(self.cache.fork(), self.token_ids, self.messages)
        answer: _Answer | None = None
        try:
            answer = _Answer(self, ids)
            yield from answer
        except GeneratorExit:
            self._keep(answer, before, messages)
            raise
        except BaseException:
            self._go_back(before)
            raise
        self._keep(answer, before, messages)

    def _end_answer(self) -> None:
        """Close an answer that is still being given: what was said so far is kept."""
        if (answer := self._running()) is not None:
            answer.close()

    def _keep(self, answer: "_Answer | None", before: _Before, messages: list[Message]) -> None:
        """Make the turn part of the conversation."""
        if answer is None:
            return
        self.token_ids = answer.finish()
        self.messages = [*messages, {"role": "assistant", "content": answer.text.strip()}]
        self.stopped_by = answer.stopped_by
        self._undo = [*self._undo, before][-self.max_undo :] if self.max_undo else []

    def _go_back(self, before: _Before) -> None:
        self.cache.rollback(before.cache)
        self.token_ids, self.messages = before.token_ids, before.messages


class _Answer:
    """The answer to a prompt of `ids`: pieces without leading blanks and stop strings, then the tokens to keep."""

    def __init__(self, session: ChatSession, ids: list[int]) -> None:
        self.session, self.ids, self.text = session, ids, ""
        stops = [*session.turns.stop_strings, *_listed(session.arguments.get("stop_strings"))]
        room = session.model.config.max_position_embeddings - len(ids)
        self.is_short = room < session.max_new_tokens
        self.filter, self.safe = StopFilter(stops), session.cache.fork()
        arguments = {**session.arguments, "stop_strings": stops or None}
        arguments["max_new_tokens"] = min(room, session.max_new_tokens)
        if "penalty_alpha" not in arguments:
            arguments["past_key_values"] = session.cache
        self.stream: TextStream = stream(session.model, session.tokenizer, ids, **arguments)

    def __iter__(self) -> Iterator[str]:
        for piece in self.stream:
            yield from self._shown(self.filter.push(piece))
            if self.filter.is_open:
                # Behind here, a stop string may cut off tokens that were read; then the state goes back to here.
                self.safe = self.session.cache.fork()
        yield from self._shown(self.filter.finish())

    def _shown(self, text: str) -> Iterator[str]:
        shown = text if self.text.strip() else text.lstrip()
        self.text += text
        if shown:
            yield shown

    @property
    def stopped_by(self) -> str | None:
        reason = "stop" if self.filter.stopped else self.stream.stopped_by
        return "context" if reason == "length" and self.is_short else reason

    def finish(self) -> list[int]:
        """The conversation's tokens, up to the end of the answer; the cache has read no others."""
        self.stream.close()
        if not self.filter.stopped:
            held = self.stream.text[len(self.text) :]
            self.text += self.filter.push(held[len(self.filter.held) :]) + self.filter.finish()
        said, decode = self.stream.new_ids, self._decode
        if said and said[-1] in self.stream.end_ids:
            said = said[:-1]  # the end of a text, which the conversation goes on from
        if decode(said) != self.text:
            # Cut by a stop string: the tokens before it, and what of the text they leave out, as tokens of its own.
            count = next(n for n in range(len(said), -1, -1) if self.text.startswith(decode(said[:n])))
            rest = self.text[len(decode(said[:count])) :]
            said = said[:count] + self.session.tokenizer(rest, add_special_tokens=False)["input_ids"]
            if self.session.cache.get_seq_length() > len(self.ids) + count:
                self.session.cache.rollback(self.safe)
        return self.ids + said

    def _decode(self, ids: list[int]) -> str:
        decode = self.session.tokenizer.decode
        return decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _listed(stop_strings: Any) -> list[str]:
    return [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or [])
