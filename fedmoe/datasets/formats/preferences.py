"""Preference data: the chosen answer is learned, the rejected one only counted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import takewhile

from fedmoe.datasets.formats.samples import Completion, Message
from fedmoe.datasets.formats.turns import message
from fedmoe.datasets.formats.values import RowError, items, string
from fedmoe.datasets.readers.common import DataRow

#: Columns that may hold what the answers answer, as text.
PROMPT_KEYS = ("prompt", "question", "instruction", "query", "input")
#: Columns that may hold it as turns, as a list under `prompt` may.
TURN_KEYS = ("conversations", "messages")

# Anthropic's HH-RLHF writes a whole conversation as one string.
_SPEAKER = re.compile(r"\n\n(Human|Assistant):", re.ASCII)


def chosen_answer(row: DataRow) -> list[Message] | Completion:
    """What a row with a chosen answer becomes: the turns of a conversation, or a prompt with its completion."""
    fields = row.fields
    value = fields["chosen"]
    if isinstance(value, list):
        turns = [message(item) for item in items(fields, "chosen")]
        return _joined(_context(fields, turns), _with_shared_context(turns, fields.get("rejected")))
    if isinstance(value, Mapping):
        return _joined(_context(fields, []), [message(value)])
    answer = string(fields, "chosen")
    if _turn_column(fields):
        return _joined(_context(fields, []), [Message("assistant", answer)])
    if _SPEAKER.match(answer):
        return _transcript(answer)
    asked = _prompt_key(fields)
    if asked is None:
        return _implicit_prompt(row, answer)
    if asked == "prompt":
        return Completion(row.line, string(fields, "prompt", may_be_empty=True), answer, row.file)
    return [_question(fields, asked), Message("assistant", answer)]


def _with_shared_context(turns: list[Message], rejected: object) -> list[Message]:
    """The chosen turns, of which those that the rejected ones share are context."""
    other = [message(item) for item in rejected] if isinstance(rejected, list) else []
    beginning = len(other) if len(other) < len(turns) else 0
    shared = next((i for i, pair in enumerate(zip(turns, other, strict=False)) if pair[0] != pair[1]), beginning)
    return [as_context(turn) for turn in turns[:shared]] + turns[shared:]


def as_context(turn: Message) -> Message:
    """The same turn, not to be learned."""
    return Message(turn.role, turn.content, False, turn.extras)


def _turn_column(fields: Mapping[str, object]) -> str | None:
    column = next((key for key in TURN_KEYS if fields.get(key)), None)
    return column or ("prompt" if isinstance(fields.get("prompt"), list) else None)


def _prompt_key(fields: Mapping[str, object]) -> str | None:
    return next((key for key in PROMPT_KEYS if fields.get(key) is not None), None)


def _question(fields: Mapping[str, object], asked: str) -> Message:
    question = string(fields, asked)
    about = string(fields, "input", may_be_empty=True) if asked in ("question", "instruction") else ""
    return Message("user", f"{question}\n\n{about}" if about.strip() else question)


def _context(fields: Mapping[str, object], answer: list[Message]) -> list[Message]:
    """The turns before the answer; a question as text is one of them unless the answer begins with its own."""
    if column := _turn_column(fields):
        return [message(item) for item in items(fields, column)]
    asked = _prompt_key(fields)
    answers_only = not answer or answer[0].role == "assistant"
    return [_question(fields, asked)] if asked and answers_only else []


def _joined(context: list[Message], answer: list[Message]) -> list[Message]:
    """Context, which is not learned, and answer; turns that both of them hold stand once."""
    before = [(turn.role, turn.content) for turn in context]
    after = [(turn.role, turn.content) for turn in answer]
    both = next(n for n in range(min(len(before), len(after)), -1, -1) if before[len(before) - n :] == after[:n])
    return [as_context(turn) for turn in context[: len(before) - both]] + answer


def _transcript(text: str) -> list[Message]:
    parts = _SPEAKER.split(text)[1:]
    speakers, said = parts[::2], [part.strip() for part in parts[1::2]]
    if speakers[-1] != "Assistant" or not said[-1]:
        raise RowError("'chosen' does not end with an answer of the assistant")
    turns = [
        Message("user" if speaker == "Human" else "assistant", words)
        for speaker, words in zip(speakers, said, strict=True)
    ]
    # Only the last answer was chosen; earlier ones are what both continuations share.
    return [as_context(turn) for turn in turns[:-1]] + turns[-1:]


def _implicit_prompt(row: DataRow, answer: str) -> Completion:
    """The beginning that both answers share is the prompt (as TRL takes it), up to the last blank."""
    rejected = string(row.fields, "rejected", may_be_empty=True)
    if not rejected:
        raise RowError("'chosen' has neither a prompt nor a 'rejected' answer beside it; add the column 'prompt'")
    shared = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(answer, rejected, strict=False)))
    prompt = shared[: shared.rfind(" ") + 1] if shared != answer else ""
    return Completion(row.line, prompt, answer[len(prompt) :], row.file)
