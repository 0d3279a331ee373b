"""Sample types that rows are converted to: a text, a prompt with its completion, or a conversation.

`fedmoe.datasets.row_scan.row_hash` reads their representation: other names of classes or fields would move held-out
rows into the training data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text: every token is learned. `line` and `file` say where it came from."""

    line: int
    text: str
    file: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what follows it: only the completion is learned."""

    line: int
    prompt: str
    completion: str
    file: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    `learned` is False for an answer that the data set marks as context only. `extras` are further keys for the chat
    template in the shapes that templates expect: `reasoning_content`, `tool_calls`, `tool_call_id`, `name`.
    """

    role: str
    content: str
    learned: bool = True
    extras: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation: only the assistant's turns are learned, and only those that answer something.

    `tools` are function definitions and `template_kwargs` further variables for the chat template.
    """

    line: int
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, object], ...] = ()
    template_kwargs: Mapping[str, object] = field(default_factory=dict)
    file: str = ""


Sample = Text | Completion | Chat
