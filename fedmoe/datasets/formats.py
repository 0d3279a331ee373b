"""The five row shapes, recognised by their keys, and what a row of each becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedmoe.datasets.rows import BadRow, Row, decode_json


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text: every token is learned. `line` is where it came from."""

    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what follows it: only the completion is learned."""

    line: int
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation: only the assistant's turns are learned, and only those that answer something."""

    line: int
    messages: tuple[Message, ...]


Sample = Text | Completion | Chat

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}


class RowError(ValueError):
    """A row whose content does not fit its format."""


@dataclass(frozen=True)
class RowFormat:
    """One accepted shape: the keys that tell it, keys it may also use, an example, and the way to a sample."""

    name: str
    keys: tuple[str, ...]
    example: str
    convert: Callable[[Row], Sample]
    optional: tuple[str, ...] = ()

    def fits(self, row: Row) -> bool:
        return all(key in row.fields for key in self.keys)


def detect_format(row: Row) -> RowFormat | None:
    """The format whose keys the row has; chat shapes win over `text`, which may be a rendering of them."""
    return next((shape for shape in FORMATS if shape.fits(row)), None)


def normalise(shape: RowFormat, row: Row) -> Sample | BadRow:
    """The sample of a row in the file's format, or what is wrong with it."""
    missing = [key for key in shape.keys if key not in row.fields]
    if missing:
        return BadRow(row.line, f"keys missing for format {shape.name}: {missing}; found {_some(row.fields)}")
    try:
        return shape.convert(row)
    except RowError as error:
        return BadRow(row.line, str(error))


def ignored_keys(shape: RowFormat, row: Row) -> frozenset[str]:
    """Keys of the row that the format does not use."""
    return frozenset(row.fields) - set(shape.keys) - set(shape.optional)


def accepted_shapes() -> str:
    """All accepted shapes with an example each, one a line."""
    width = max(len(shape.name) for shape in FORMATS)
    return "\n".join(f"  {shape.name:<{width}}  {shape.example}" for shape in FORMATS)


def _text(row: Row) -> Sample:
    return Text(row.line, _string(row.fields, "text"))


def _completion(row: Row) -> Sample:
    prompt = _string(row.fields, "prompt", may_be_empty=True)
    return Completion(row.line, prompt, _string(row.fields, "completion"))


def _alpaca(row: Row) -> Sample:
    question = _string(row.fields, "instruction")
    extra = _string(row.fields, "input", may_be_empty=True)
    user = Message("user", f"{question}\n\n{extra}" if extra.strip() else question)
    return _chat(row, [user, Message("assistant", _string(row.fields, "output"))])


def _messages(row: Row) -> Sample:
    return _chat(row, [_message(item, "role", "content") for item in _list(row.fields, "messages")])


def _sharegpt(row: Row) -> Sample:
    items = _list(row.fields, "conversations")
    return _chat(row, [_message(item, *(_sharegpt_keys(item))) for item in items])


def _sharegpt_keys(item: object) -> tuple[str, str]:
    # Many files that call the list "conversations" use the keys of "messages" inside.
    return ("role", "content") if isinstance(item, dict) and "role" in item else ("from", "value")


def _chat(row: Row, messages: list[Message]) -> Chat:
    system = _string(row.fields, "system", may_be_empty=True)
    if system.strip() and messages and messages[0].role != "system":
        messages = [Message("system", system), *messages]
    first = next((i for i, message in enumerate(messages) if message.role != "assistant"), len(messages))
    if not any(message.role == "assistant" for message in messages[first:]):
        raise RowError("no assistant turn that answers something: there is nothing to learn from")
    return Chat(row.line, tuple(messages))


def _message(item: object, role_key: str, content_key: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowError(f"a turn must be an object with {role_key!r} and {content_key!r}, got {type(item).__name__}")
    role = _string(item, role_key)
    role = SHAREGPT_ROLES.get(role, role)
    if role not in ROLES:
        raise RowError(f"unknown role {role[:40]!r}; known are {', '.join((*ROLES, *SHAREGPT_ROLES))}")
    if item.get("tool_calls"):
        raise RowError("turns with tool_calls are not supported; write the call into the content")
    return Message(role, _string(item, content_key, may_be_empty=role != "assistant"))


def _list(fields: Mapping[str, object], key: str) -> list[object]:
    value = fields[key]
    if isinstance(value, str):  # a CSV cell can hold a list only as JSON
        try:
            value = decode_json(value)
        except ValueError as error:
            raise RowError(f"{key!r} must be a list or the JSON of one: {error}") from None
    if not isinstance(value, list):
        raise RowError(f"{key!r} must be a list, got {type(value).__name__}")
    if not value:
        raise RowError(f"{key!r} is empty")
    return value


def _string(fields: Mapping[str, object], key: str, *, may_be_empty: bool = False) -> str:
    value = fields.get(key)
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{key!r} must be a string, got {'nothing' if value is None else type(value).__name__}")
    if not may_be_empty and not value.strip():
        raise RowError(f"{key!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"{key!r} holds half of a surrogate pair (an escape such as \\ud83d alone)") from None
    return value


def _some(fields: Mapping[str, object]) -> list[str]:
    return [str(key)[:40] for key in list(fields)[:8]]


FORMATS = (
    RowFormat(
        "messages",
        ("messages",),
        '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
        _messages,
        ("system",),
    ),
    RowFormat(
        "sharegpt",
        ("conversations",),
        '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
        _sharegpt,
        ("system",),
    ),
    RowFormat("prompt+completion", ("prompt", "completion"), '{"prompt": "...", "completion": "..."}', _completion),
    RowFormat(
        "alpaca",
        ("instruction", "output"),
        '{"instruction": "...", "input": "may be empty", "output": "..."}',
        _alpaca,
        ("input", "system"),
    ),
    RowFormat("text", ("text",), '{"text": "..."}', _text),
)
