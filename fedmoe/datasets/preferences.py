"""Preference data: the chosen answer is learned; the rejected one is counted and left aside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import takewhile

from fedmoe.datasets.rows import Row
from fedmoe.datasets.samples import Completion, Message
from fedmoe.datasets.turns import message
from fedmoe.datasets.values import RowError, items, string

#: Columns that may hold what the answers answer.
PROMPT_KEYS = ("prompt", "question", "instruction")

# Anthropic's HH-RLHF writes a whole conversation as one string.
_SPEAKER = re.compile(r"\n\n(Human|Assistant):", re.ASCII)


def chosen(row: Row) -> list[Message] | Completion:
    """What a row with a chosen answer becomes: the turns of a conversation, or a prompt with its completion."""
    fields = row.fields
    value = fields["chosen"]
    if isinstance(value, list):
        turns = [message(item) for item in items(fields, "chosen")]
        return _context(fields, turns) + _beyond(turns, fields.get("rejected"))
    if isinstance(value, Mapping):
        return [*_context(fields, []), message(value)]
    answer = string(fields, "chosen")
    if fields.get("conversations") is not None or isinstance(fields.get("prompt"), list):
        return [*_context(fields, []), Message("assistant", answer)]
    if _SPEAKER.match(answer):
        return _transcript(answer)
    if fields.get("prompt") is not None:
        return Completion(row.line, string(fields, "prompt", may_be_empty=True), answer, row.file)
    asked = next((key for key in ("question", "instruction") if fields.get(key) is not None), None)
    if asked:
        about = string(fields, "input", may_be_empty=True)
        question = string(fields, asked)
        return [Message("user", f"{question}\n\n{about}" if about.strip() else question), Message("assistant", answer)]
    return _implicit_prompt(row, answer)


def _beyond(turns: list[Message], rejected: object) -> list[Message]:
    """The chosen turns, of which those that the rejected ones share are context."""
    other = [message(item) for item in rejected] if isinstance(rejected, list) else []
    shared = next((i for i, pair in enumerate(zip(turns, other, strict=False)) if pair[0] != pair[1]), 0)
    return [as_context(turn) for turn in turns[:shared]] + turns[shared:]


def as_context(turn: Message) -> Message:
    """The same turn, not to be learned."""
    return Message(turn.role, turn.content, False, turn.extras)


def _context(fields: Mapping[str, object], answer: list[Message]) -> list[Message]:
    """The turns before the answer, unless the answer repeats them; none of them is learned."""
    if fields.get("conversations") is not None:
        turns = [message(item) for item in items(fields, "conversations")]
    elif isinstance(fields.get("prompt"), list):
        turns = [message(item) for item in items(fields, "prompt")]
    else:
        asked = next((key for key in PROMPT_KEYS if fields.get(key) is not None), None)
        answers_only = not answer or answer[0].role == "assistant"
        turns = [Message("user", string(fields, asked))] if asked and answers_only else []
    if answer and turns and answer[0] == turns[0]:
        return []
    return [as_context(turn) for turn in turns]


def _transcript(text: str) -> list[Message]:
    parts = _SPEAKER.split(text)[1:]
    speakers, said = parts[::2], [part.strip() for part in parts[1::2]]
    turns = [
        Message("user" if speaker == "Human" else "assistant", words)
        for speaker, words in zip(speakers, said, strict=True)
    ]
    # Only the last answer was chosen; earlier ones are what both continuations share.
    return [as_context(turn) for turn in turns[:-1]] + turns[-1:]


def _implicit_prompt(row: Row, answer: str) -> Completion:
    """The beginning that both answers share is the prompt (as TRL takes it), up to the last blank."""
    rejected = string(row.fields, "rejected", may_be_empty=True)
    if not rejected:
        raise RowError("'chosen' has neither a prompt nor a 'rejected' answer beside it; add the column 'prompt'")
    shared = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(answer, rejected, strict=False)))
    prompt = shared[: shared.rfind(" ") + 1] if shared != answer else ""
    return Completion(row.line, prompt, answer[len(prompt) :], row.file)
