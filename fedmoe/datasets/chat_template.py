"""Conversations through the tokenizer's chat template: where each answer begins and ends in the rendered text.

Templates need no `{% generation %}` marks: an answer is what the template adds to the turns before it. Templates of
reasoning models open a thought (`<think>`) for the answer to come but leave it out of answered turns; there the
beginning of an answer is found by rendering a mark in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np

from fedmoe.datasets.errors import DataError
from fedmoe.datasets.samples import Chat, Message
from fedmoe.datasets.tokenized import MASKED, Rendering, TokenizedSample, Tokenizer

# No text holds it, and no template changes it.
_MARK = "fedmoe0answer0mark"
_THINK, _END_THINK = "<think>", "</think>"
_OWN_VARIABLES = frozenset({"tokenize", "add_generation_prompt", "conversation", "chat_template"})


class ChatTokenizer(Tokenizer, Protocol):
    """A tokenizer with a chat template."""

    def apply_chat_template(
        self, conversation: list[dict[str, object]], *, tokenize: bool, add_generation_prompt: bool, **variables: object
    ) -> object: ...


class TemplateRefusalError(DataError):
    """One row that the chat template refuses or does not render; other rows may be fine."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """One answer: the text before it, and that with the answer and its end mark (without the blank after it).

    `opening` is what the template puts before an answer to come and leaves out of an answered turn.
    """

    before: str
    upto: str
    opening: str = ""

    @property
    def span(self) -> tuple[int, int]:
        """The learned characters."""
        return len(self.before), len(self.upto)


def render_chat(chat: Chat, tokenizer: Tokenizer) -> Rendering:
    """One sample with every answer learned, or one for each answer where the template rewrites earlier turns.

    Raises `TemplateRefusalError` for a row that the template refuses or drops a part of, and `DataError` where the
    tokenizer has no usable template at all.
    """
    _check_template(tokenizer)
    turns = _Turns(chat, cast(ChatTokenizer, tokenizer))
    answers = [turns.answer(index) for index in _answers(chat)]
    whole = turns.text(len(chat.messages))
    notes = _notes(chat, whole, answers)
    if all(whole.startswith(answer.upto) for answer in answers):
        return Rendering((_learn(whole, [answer.span for answer in answers], tokenizer),), notes)
    return Rendering(tuple(_learn(answer.upto, [answer.span], tokenizer) for answer in answers), notes)


def _check_template(tokenizer: Tokenizer) -> None:
    if not tokenizer.chat_template:
        raise DataError(
            "the rows are conversations but the tokenizer has no chat template; use an instruct model's tokenizer, "
            "give --chat-template FILE, or rows of the shape text or prompt+completion"
        )
    if not tokenizer.is_fast:
        raise DataError("conversations need a fast tokenizer, which tells the place of each token; this one is slow")


def _answers(chat: Chat) -> list[int]:
    # An assistant's greeting before anything was said is context: no template can render the nothing before it.
    first = next(index for index, message in enumerate(chat.messages) if message.role != "assistant")
    return [
        i for i, message in enumerate(chat.messages) if message.role == "assistant" and message.learned and i > first
    ]


class _Turns:
    """The beginnings of one conversation, rendered."""

    def __init__(self, chat: Chat, tokenizer: ChatTokenizer) -> None:
        self._chat, self._tokenizer = chat, tokenizer
        self._dicts = [_turn(message) for message in chat.messages]
        self._rendered: dict[tuple[int, bool], str] = {}

    def text(self, turns: int, ask: bool = False) -> str:
        """The first `turns` turns, perhaps with the beginning of the answer to come."""
        key = (turns, ask)
        if key not in self._rendered:  # the last answer's end is the whole
            self._rendered[key] = self._render(turns, ask)
        return self._rendered[key]

    def _render(self, turns: int, ask: bool = False, last: Mapping[str, object] | None = None) -> str:
        dicts = [*self._dicts[:turns], *([dict(last)] if last else [])]
        variables = dict(self._chat.template_kwargs)
        if taken := sorted(_OWN_VARIABLES & set(variables)):
            raise TemplateRefusalError(f"'chat_template_kwargs' of the row may not set {taken}")
        if self._chat.tools:
            variables["tools"] = [dict(tool) for tool in self._chat.tools]
        try:
            return str(
                self._tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=ask, **variables)
            )
        except Exception as error:  # templates are programs of their own and raise what they like
            roles = [message.role for message in self._chat.messages]
            raise TemplateRefusalError(f"the chat template refuses the turns {roles}: {error}") from error

    def answer(self, index: int) -> _Answer:
        """The answer in turn `index`, where the template puts it."""
        asked, upto = self.text(index, ask=True), self.text(index + 1)
        if upto.startswith(asked):
            found = _Answer(asked, asked + upto[len(asked) :].rstrip())
        else:
            header, tail = self._around(index, upto)
            plain = _Answer(header, header + upto[len(header) :].rstrip(), asked.removeprefix(header))
            found = self._thought(index, asked, header, tail) or plain
        _check_rendered(self._chat.messages[index], found)
        return found

    def _around(self, index: int, upto: str) -> tuple[str, str]:
        """The text before the answer and the text after it, found by a mark that stands in its place."""
        marked = self._render(index, last={"role": "assistant", "content": _MARK})
        header, found, tail = marked.partition(_MARK)
        if not found or not upto.startswith(header):
            got = upto[-90:]
            raise TemplateRefusalError(
                f"the answer in turn {index + 1} cannot be found: the chat template begins an answer with "
                f"{header[-60:]!r} but renders the answered conversation as {got!r}; give another one by "
                "--chat-template FILE, in which the prompt is a prefix of the answered conversation"
            )
        return header, tail

    def _thought(self, index: int, asked: str, header: str, tail: str) -> _Answer | None:
        """The answer with its reasoning, where the template opens a thought that it leaves out of answered turns."""
        opened = asked[len(header) :] if asked.startswith(header) else ""
        reasoning, said = _reasoning(self._chat.messages[index])
        if not reasoning or _THINK not in opened:
            return None
        learned = f"{reasoning}\n{_END_THINK}\n\n{said}{tail.rstrip()}"
        return _Answer(asked, asked + learned)


def _reasoning(message: Message) -> tuple[str, str]:
    """Reasoning and answer of a turn; the reasoning may stand in a key of its own or in the content."""
    own = message.extras.get("reasoning_content")
    if isinstance(own, str):
        return own.strip(), message.content.strip()
    thought, ended, said = message.content.partition(_END_THINK)
    return (thought.strip().removeprefix(_THINK).strip(), said.strip()) if ended else ("", message.content)


def _turn(message: Message) -> dict[str, object]:
    return {"role": message.role, "content": message.content, **message.extras}


def _check_rendered(message: Message, answer: _Answer) -> None:
    """Calls and answers that the template leaves out would teach an empty answer."""
    rendered = answer.upto[len(answer.before) :]
    calls = message.extras.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        name = call["function"]["name"]
        if name not in rendered:
            raise TemplateRefusalError(
                f"the chat template does not render tool_calls (here a call of {name[:40]!r}); "
                "take a base model whose template does, or give one with --chat-template FILE"
            )
    _, said = _reasoning(message)
    if said.strip() and said.strip() not in rendered:
        raise TemplateRefusalError("the chat template does not render the answer as it stands in the row")


def _notes(chat: Chat, whole: str, answers: list[_Answer]) -> tuple[str, ...]:
    """What of the row the template leaves out without changing what an answer means."""
    notes = []
    for message in chat.messages:
        if message.role != "assistant" and message.content.strip() and message.content.strip() not in whole:
            notes.append(f"the chat template leaves out or changes what {message.role} says")
    if chat.tools and not any(str(tool["function"]["name"]) in whole for tool in _named(chat)):
        notes.append("the chat template does not render tools")
    learned = [chat.messages[index] for index in _answers(chat)]
    for message, answer in zip(learned, answers, strict=True):
        reasoning, _ = _reasoning(message)
        if reasoning and reasoning not in answer.upto[len(answer.before) :]:
            notes.append("the chat template leaves out the reasoning of an answer")
        if answer.opening:
            notes.append(f"the chat template opens an answer with {answer.opening!r}, which answered turns do not have")
    return tuple(dict.fromkeys(notes))


def _named(chat: Chat) -> list[Mapping[str, Mapping[str, object]]]:
    tools = [cast(Mapping[str, Mapping[str, object]], tool) for tool in chat.tools]
    return [tool for tool in tools if "name" in tool["function"]]


def _learn(text: str, spans: list[tuple[int, int]], tokenizer: Tokenizer) -> TokenizedSample:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.array(encoded["input_ids"], dtype=np.int64)
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    learned = np.zeros(len(ids), dtype=np.bool_)
    for start, stop in spans:
        learned |= (offsets[:, 0] >= start) & (offsets[:, 0] < stop)
    return TokenizedSample(ids, np.where(learned, ids, MASKED))
