"""How the turns of a chat are written down: the tokenizer's chat template, or plain text."""

from collections.abc import Sequence
from typing import Any, Protocol

from neural_layers.errors import InputError
from neural_layers.models.generation.prompts import prompt_ids

Message = dict[str, str]
_ANSWER = "\N{SYMBOL FOR START OF TEXT}answer\N{SYMBOL FOR END OF TEXT}"  # stands for an answer in a template


class Turns(Protocol):
    """Writes turns as tokens. `messages` are dicts of `role` ("system", "user", "assistant") and `content`.

    stop_strings: texts at which an answer ends, as the next turn begins there
    """

    stop_strings: Sequence[str]

    def opening(self, messages: Sequence[Message]) -> list[int]:
        """The tokens up to where the first answer begins; the last message is the user's first."""
        ...

    def following(self, messages: Sequence[Message]) -> list[int]:
        """The tokens from the end of the last answer to where the next one begins; the last message is the user's."""
        ...


class PlainTurns:
    """The format for tokenizers without a chat template:

        {system}\\n\\nUser: {message}\\nAssistant:{answer}\\nUser: {message}\\nAssistant:

    The part before the first `User:` is left out where there is no system message. An answer ends at `\\nUser:` or
    where the model ends the text.
    """

    def __init__(self, tokenizer: Any, user: str = "User:", assistant: str = "Assistant:") -> None:
        self.tokenizer, self.user, self.assistant = tokenizer, user, assistant
        self.stop_strings: Sequence[str] = (f"\n{user}",)

    def opening(self, messages: Sequence[Message]) -> list[int]:
        system = "".join(m["content"] + "\n\n" for m in messages if m["role"] == "system")
        return prompt_ids(self.tokenizer, system + self._turn(messages[-1]))

    def following(self, messages: Sequence[Message]) -> list[int]:
        return _ids(self.tokenizer, "\n" + self._turn(messages[-1]))

    def _turn(self, message: Message) -> str:
        return f"{self.user} {message['content']}\n{self.assistant}"


class TemplateTurns:
    """The format of the tokenizer's own chat template.

    What follows an answer is what the template writes between an answer and the next one. What was read stays read: a
    template that would write earlier turns otherwise later on (without their reasoning, say) does not change them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.stop_strings: Sequence[str] = ()

    def opening(self, messages: Sequence[Message]) -> list[int]:
        return _ids(self.tokenizer, self._render(messages))

    def following(self, messages: Sequence[Message]) -> list[int]:
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        marked = [{**m, "content": _ANSWER} if i == last else m for i, m in enumerate(messages)]
        _, found, behind = self._render(marked).rpartition(_ANSWER)
        if not found:
            raise InputError("the tokenizer's chat template leaves out the assistant's messages; use PlainTurns")
        return _ids(self.tokenizer, behind)

    def _render(self, messages: Sequence[Message]) -> str:
        # What a template raises is its own (roles it does not know, say).
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:
            raise InputError(f"the tokenizer's chat template cannot write these turns: {error}") from error


def turns_of(tokenizer: Any) -> Turns:
    """The tokenizer's chat template, or `PlainTurns` where it has none."""
    return TemplateTurns(tokenizer) if getattr(tokenizer, "chat_template", None) else PlainTurns(tokenizer)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class StopFilter:
    """Text without what follows a stop string: `push(piece)` returns what certainly stands before one.

    is_open: whether nothing is held back
    stopped: whether a stop string has come
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self.stop_strings, self.held, self.stopped = tuple(stop_strings), "", False

    @property
    def is_open(self) -> bool:
        return not self.held and not self.stopped

    def push(self, piece: str) -> str:
        """The text that may be shown."""
        if self.stopped:
            return ""
        text = self.held + piece
        places = [place for stop in self.stop_strings if (place := text.find(stop)) >= 0]
        if places:
            self.held, self.stopped = "", True
            return text[: min(places)]
        longest = max((len(stop) - 1 for stop in self.stop_strings), default=0)
        start = max(len(text) - longest, 0)
        while start < len(text) and not any(stop.startswith(text[start:]) for stop in self.stop_strings):
            start += 1
        self.held = text[start:]
        return text[:start]

    def finish(self) -> str:
        """What was held back: the text ended without a stop string."""
        rest, self.held = self.held, ""
        return rest
