"""Renders a conversation with its chat template and finds its answers in the text.

Chat templates need no `{% generation %}` marks: an answer is what the template adds to the turns before it. Templates
of reasoning models open a thought (`<think>`) for the answer to come but leave it out of answered turns; there the
beginning of an answer is found by rendering a mark in its place. Templates differ in how they want a thought (in a key
of its own or in the content) and the arguments of calls (object or text): the way that loses nothing is taken.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

from fedmoe.datasets.formats.samples import Chat, Message
from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.tokens.tokenized_sample import Tokenizer

# No text holds it, and no template changes it.
_MARK = "fedmoe0answer0mark"
_THINK, _END_THINK = "<think>", "</think>"
_NO_REASONING = "the chat template leaves out the reasoning of an answer"
_OWN_VARIABLES = frozenset({"tokenize", "add_generation_prompt", "conversation", "chat_template"})


class TemplateRefusalError(DataError):
    """One row that the chat template refuses or does not render; other rows may be fine."""


class ChatTokenizer(Tokenizer, Protocol):
    """A tokenizer with a chat template."""

    def apply_chat_template(
        self, conversation: list[dict[str, object]], *, tokenize: bool, add_generation_prompt: bool, **variables: object
    ) -> object: ...


@dataclass(frozen=True, slots=True)
class AnswerText:
    """One answer: the text before it, and that with the answer and its end mark (without the blank after it).

    `note` says where `before` is not the prompt that the template makes for an answer to come.
    """

    before: str
    upto: str
    note: str = ""

    @property
    def text(self) -> str:
        """The learned characters: the answer with its end mark."""
        return self.upto[len(self.before) :]


#: The whole conversation as text, its answers, and notes.
_RenderedChat = tuple[str, list[AnswerText], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class ChatTexts:
    """A rendered conversation: its texts, each with the answers that are learned of it, and notes."""

    parts: tuple[tuple[str, Sequence[AnswerText]], ...]
    notes: tuple[str, ...]


def chat_texts(chat: Chat, tokenizer: Tokenizer) -> ChatTexts:
    """One text with every answer learned, or one for each answer where the template rewrites earlier turns.

    Raises `TemplateRefusalError` for a row that the template refuses or drops a part of, and `DataError` where the
    tokenizer has no usable template at all.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the rows are conversations but the tokenizer has no chat template; use an instruct model's tokenizer, "
            "give --chat-template FILE, or rows of the shape text or prompt+completion"
        )
    if not tokenizer.is_fast:
        raise DataError("conversations need a fast tokenizer, which tells the place of each token; this one is slow")
    whole, answers, notes = _best(chat, cast(ChatTokenizer, tokenizer))
    if all(whole.startswith(answer.upto) for answer in answers):
        return ChatTexts(((whole, answers),), notes)
    return ChatTexts(tuple((answer.upto, [answer]) for answer in answers), notes)


def _best(chat: Chat, tokenizer: ChatTokenizer) -> _RenderedChat:
    """The first variant of the conversation in which the template keeps all, or else the first that it takes."""
    refusal: TemplateRefusalError | None = None
    accepted: _RenderedChat | None = None
    for variant in _variants(chat):
        turns = _Turns(variant, tokenizer)
        try:
            answers = [turns.answer(index) for index in _answers(chat)]
            for index, answer in zip(_answers(chat), answers, strict=True):
                _check_rendered(chat.messages[index], answer.text)
            rendered = turns.text(len(chat.messages)), answers, _notes(chat, turns, answers)
        except TemplateRefusalError as error:
            refusal = refusal or error
            continue
        if _NO_REASONING not in rendered[2]:
            return rendered
        accepted = accepted or rendered
    if accepted is None:
        assert refusal is not None
        raise refusal
    return accepted


def _variants(chat: Chat) -> Iterator[Chat]:
    """The conversation in the variants that templates want.

    A thought stands in a key of its own, then where the row has it, and is left out at last (a prompt may close it);
    the arguments of calls are objects, then text.
    """
    seen: list[Chat] = []
    for place_thought in (_thought_apart, None, _without_thought):
        for place_calls in (None, _arguments_as_text):
            variant = chat
            for change in filter(None, (place_thought, place_calls)):
                turns = (change(turn) if turn.role == "assistant" else turn for turn in variant.messages)
                variant = replace(variant, messages=tuple(turns))
            if variant not in seen:
                seen.append(variant)
                yield variant


def _thought_apart(message: Message) -> Message:
    thought, answer = _reasoning(message)
    if not thought or "reasoning_content" in message.extras:
        return message
    return replace(message, content=answer, extras={**message.extras, "reasoning_content": thought})


def _without_thought(message: Message) -> Message:
    extras = {key: value for key, value in message.extras.items() if key != "reasoning_content"}
    thought, answer = _reasoning(message)
    return replace(message, content=answer if thought else message.content, extras=extras)


def _arguments_as_text(message: Message) -> Message:
    calls = _calls(message)
    texts = [{**call, "function": {**call["function"], "arguments": _json(_arguments(call))}} for call in calls]
    return replace(message, extras={**message.extras, "tool_calls": texts}) if calls else message


def _answers(chat: Chat) -> list[int]:
    # An assistant's greeting before anything was said is context: no template can render the nothing before it.
    first = next(index for index, message in enumerate(chat.messages) if message.role != "assistant")
    later = enumerate(chat.messages[first:], first)
    return [index for index, message in later if message.role == "assistant" and message.learned]


class _Turns:
    """Renders the beginnings of one conversation."""

    def __init__(self, chat: Chat, tokenizer: ChatTokenizer) -> None:
        self._chat, self._tokenizer = chat, tokenizer
        self._dicts = [{"role": turn.role, "content": turn.content, **turn.extras} for turn in chat.messages]
        self._rendered: dict[tuple[int, bool], str] = {}

    def text(self, turns: int, ask: bool = False) -> str:
        """The first `turns` turns, perhaps with the beginning of the answer to come."""
        key = (turns, ask)
        if key not in self._rendered:  # the last answer's end is the whole
            self._rendered[key] = self.render(turns, ask)
        return self._rendered[key]

    def render(
        self, turns: int, ask: bool = False, last: Mapping[str, object] | None = None, tools: bool = True
    ) -> str:
        dicts = [*self._dicts[:turns], *([dict(last)] if last else [])]
        variables = dict(self._chat.template_kwargs)
        if taken := sorted(_OWN_VARIABLES & set(variables)):
            raise TemplateRefusalError(f"'chat_template_kwargs' of the row may not set {taken}")
        if self._chat.tools and tools:
            variables["tools"] = [dict(tool) for tool in self._chat.tools]
        apply = self._tokenizer.apply_chat_template
        try:
            return str(apply(dicts, tokenize=False, add_generation_prompt=ask, **variables))
        except Exception as error:  # templates are programs of their own and raise what they like
            roles = [message.role for message in self._chat.messages]
            raise TemplateRefusalError(f"the chat template refuses the turns {roles}: {error}") from error

    def answer(self, index: int) -> AnswerText:
        """The answer in turn `index`, where the template puts it."""
        asked, upto = self.text(index, ask=True), self.text(index + 1)
        if upto.startswith(asked):
            return AnswerText(asked, asked + upto[len(asked) :].rstrip())
        # Without the turn's own thought and calls: only the mark tells what of the text is the answer.
        marked = self.render(index, last={"role": "assistant", "content": _MARK})
        if moved := self._after_prompt(index, asked, upto, marked):
            return moved
        header, marks, _ = marked.partition(_MARK)
        if not marks or not upto.startswith(header):
            got = upto[-90:]
            raise TemplateRefusalError(
                f"the answer in turn {index + 1} cannot be found: the chat template begins an answer with "
                f"{header[-60:]!r} but renders the answered conversation as {got!r}; give another one by "
                "--chat-template FILE, in which the prompt is a prefix of the answered conversation"
            )
        plain = AnswerText(header, header + upto[len(header) :].rstrip(), _unlike(asked, header))
        return self._thought(index, asked, header, upto) or plain

    def _after_prompt(self, index: int, asked: str, upto: str, marked: str) -> AnswerText | None:
        """The answer after the prompt that the model really sees, where the template changes the turns before it.

        Some drop the thoughts of earlier turns only once the last is answered, some have the system prompt only
        before an answer to come. The answer then begins after the last words of the prompt.
        """
        question = str(self._dicts[index - 1]["content"]).strip()
        begin = asked[_alike(asked, self.text(index)) :] or (asked.rpartition(question)[2] if question else "")
        place = upto.rfind(begin, 0, _alike(marked, upto)) if begin.strip() else -1
        if place < _alike(asked, upto):
            return None
        return AnswerText(asked, asked + upto[place + len(begin) :].rstrip())

    def _thought(self, index: int, asked: str, header: str, upto: str) -> AnswerText | None:
        """The answer with its reasoning, where the template opens a thought that it leaves out of answered turns."""
        opened = asked[len(header) :] if asked.startswith(header) else ""
        reasoning, _ = _reasoning(self._chat.messages[index])
        if not reasoning or _THINK not in opened:
            return None
        body = upto[len(header) :].rstrip()
        _, ended, answer = body.partition(_END_THINK)
        return AnswerText(asked, f"{asked}{reasoning}\n{_END_THINK}\n\n{(answer if ended else body).lstrip()}")


def _alike(text: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    shorter = min(len(text), len(other))
    return next((place for place in range(shorter) if text[place] != other[place]), shorter)


def _unlike(asked: str, header: str) -> str:
    """What is said where an answered turn begins otherwise than the prompt; short, as it is counted over all rows."""
    shared = _alike(asked, header)
    opening, instead = asked[shared:], header[shared:]
    if len(opening) > 60 or len(instead) > 60 or _END_THINK in instead:
        return "the chat template begins answered turns otherwise than the prompt for an answer"
    if opening:
        return f"the chat template opens an answer with {opening!r}, which answered turns do not have"
    return f"the chat template puts {instead!r} before an answer, which its prompt does not have" if instead else ""


def _reasoning(message: Message) -> tuple[str, str]:
    """Reasoning and answer of a turn; the reasoning may stand in a key of its own or in the content."""
    own = message.extras.get("reasoning_content")
    if isinstance(own, str):
        return own.strip(), message.content.strip()
    thought, ended, answer = message.content.partition(_END_THINK)
    return (thought.strip().removeprefix(_THINK).strip(), answer.strip()) if ended else ("", message.content)


def _check_rendered(message: Message, rendered: str) -> None:
    """Calls and answers that the template leaves out would teach an empty answer."""
    calls = _calls(message)
    for name, count in Counter(str(call["function"]["name"]) for call in calls).items():
        if rendered.count(name) < count:
            raise TemplateRefusalError(
                f"the chat template does not render tool_calls (here a call of {name[:40]!r}); "
                "take a base model whose template does, or give one with --chat-template FILE"
            )
    for arguments in map(_arguments, calls):
        text = _json(arguments)
        if str(arguments) != text and str(arguments) in rendered:
            raise TemplateRefusalError(f"the chat template renders arguments of calls as Python, not JSON: {text[:40]}")
        if arguments and (_json(text) in rendered or json.dumps(text) in rendered):
            raise TemplateRefusalError(f"the chat template renders arguments of calls as quoted text: {text[:40]}")
        for value in _strings(arguments):
            forms = (value, _json(value)[1:-1], json.dumps(value)[1:-1], repr(value)[1:-1])
            if not any(form in rendered for form in forms):
                raise TemplateRefusalError(f"the chat template does not render the argument {value[:40]!r} of a call")
    _, answer = _reasoning(message)
    if answer.strip() and answer.strip() not in rendered:
        raise TemplateRefusalError("the chat template does not render the answer as it stands in the row")


def _strings(value: object) -> list[str]:
    """All strings inside of a value, without the blanks around them."""
    if isinstance(value, str):
        return [value.strip()]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [text for part in parts for text in _strings(part)]


def _calls(message: Message) -> list[dict[str, Mapping[str, object]]]:
    calls = message.extras.get("tool_calls")
    return cast(list[dict[str, Mapping[str, object]]], calls) if isinstance(calls, list) else []


def _arguments(call: Mapping[str, Mapping[str, object]]) -> Mapping[str, object]:
    return cast(Mapping[str, object], call["function"].get("arguments", {}))


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _notes(chat: Chat, turns: _Turns, answers: list[AnswerText]) -> tuple[str, ...]:
    """What of the row the template leaves out without changing what an answer means."""
    whole, notes = turns.text(len(chat.messages)), []
    texts = [whole, *(answer.upto for answer in answers)]
    for message in chat.messages:
        content = message.content.strip()
        if message.role != "assistant" and content and not any(content in text for text in texts):
            notes.append(f"the chat template leaves out or changes what {message.role} says")
    if chat.tools and whole == turns.render(len(chat.messages), tools=False):
        notes.append("the chat template does not render tools")
    for message, answer in zip((chat.messages[index] for index in _answers(chat)), answers, strict=True):
        reasoning, content = _reasoning(message)
        if reasoning and reasoning not in answer.text:
            notes.append(_NO_REASONING)
        if content[:1].isspace() and content.rstrip() not in answer.text:
            notes.append("the chat template cuts the white space before an answer")
        notes += [answer.note] if answer.note else []
    return tuple(dict.fromkeys(notes))
