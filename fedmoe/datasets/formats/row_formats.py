"""Row formats of public data sets: recognised by their keys, converted to samples.

Of preference data the chosen answer is learned, the rejected one only counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import takewhile

from fedmoe.datasets.formats.samples import Chat, Completion, Message, Sample, Text
from fedmoe.datasets.formats.turns import (
    MEDIA_KEYS,
    TURN_COLUMNS,
    TURN_MARKS,
    alternating,
    history_messages,
    is_pair,
    message,
    template_keys,
    tool_definition,
    turns_of,
    unused_keys,
)
from fedmoe.datasets.formats.values import RowError, RowLeftOutError, items, mark, string
from fedmoe.datasets.readers.common import DataRow

_SYSTEM_KEYS = ("system", "system_prompt")
#: Keys that make a conversation of a prompt with its completion.
_CHAT_KEYS = (*_SYSTEM_KEYS, "history", "tools", "functions", "chat_template_kwargs")
#: Keys that say whether an answer is wanted (KTO in TRL and LLaMA-Factory).
_WANTED_KEYS = ("label", "kto_tag")
_WANTED_WORDS = {"true": True, "1": True, "desirable": True, "false": False, "0": False, "undesirable": False}
#: Keys that any conversation may have beside its own.
_OF_CHATS = (*_CHAT_KEYS, *_WANTED_KEYS)
#: Keys that any row may have.
_ROW_KEYS = (*MEDIA_KEYS, "weight", "train")
#: Columns of preference data that may hold what the answers answer, as text.
_PROMPT_KEYS = ("prompt", "question", "instruction", "query", "input")
#: Columns that may hold it as turns, as a list under `prompt` may.
_TURN_KEYS = ("conversations", "messages")
# Anthropic's HH-RLHF writes a whole conversation as one string.
_SPEAKER = re.compile(r"\n\n(Human|Assistant):", re.ASCII)


@dataclass(frozen=True)
class RowFormat:
    """One accepted shape: the keys that tell it, keys it may also use, an example, and the way to a sample."""

    name: str
    keys: tuple[str, ...]
    example: str
    convert: Callable[[DataRow], Sample]
    optional: tuple[str, ...] = ()


def detect_format(row: DataRow, mapped: Collection[str] = ()) -> RowFormat | None:
    """The format whose keys the row has, first by how many of the `mapped` names it uses.

    Chat shapes win over `text`, which may be a rendering of them.
    """
    fitting = [shape for shape in FORMATS if all(row.fields.get(key) is not None for key in shape.keys)]
    return max(fitting, key=lambda shape: sum(key in mapped for key in shape.keys), default=None)


def convert(shape: RowFormat, row: DataRow) -> Sample:
    """The sample of a row in this format; raises `RowError`, or `RowLeftOutError` where its own marks keep it out."""
    for key in MEDIA_KEYS:
        if row.fields.get(key):
            raise RowError(f"the row holds {key!r}: only text can be learned")
    for key in ("weight", "train"):
        if _is_said(row.fields.get(key)) and not mark(key, row.fields[key]):
            raise RowLeftOutError(f"{key!r} of the row says that it is not to be learned")
    return shape.convert(row)


def keys_not_used(shape: RowFormat, row: DataRow) -> frozenset[str]:
    """Keys of the row, and of its turns as `messages[].key`, that hold something and are not used."""
    no_marks = {key for key in _WANTED_KEYS if _read_mark(row.fields.get(key)) is None}
    used = {*shape.keys, *shape.optional, *_ROW_KEYS} - no_marks
    row_keys = {key for key, value in row.fields.items() if value is not None} - used
    return frozenset(row_keys | _in_turns(row, unused_keys))


def keys_obeyed(shape: RowFormat, row: DataRow) -> frozenset[str]:
    """Keys with a meaning of their own that the row holds: for the chat template, or for what is learned."""
    own = {key for key in ("tools", "functions", "chat_template_kwargs", *TURN_MARKS) if row.fields.get(key)}
    return frozenset((own & {*shape.optional, *_ROW_KEYS}) | _in_turns(row, template_keys))


def accepted_shapes() -> str:
    """All accepted shapes with an example each, one a line."""
    width = max(len(shape.name) for shape in FORMATS)
    return "\n".join(f"  {shape.name:<{width}}  {shape.example}" for shape in FORMATS)


def _in_turns(row: DataRow, keys_of: Callable[[list[object]], frozenset[str]]) -> set[str]:
    columns = ((column, row.fields.get(column)) for column in TURN_COLUMNS)
    return {f"{column}[].{key}" for column, turns in columns if isinstance(turns, list) for key in keys_of(turns)}


def _completion(row: DataRow) -> Sample:
    _refuse_unwanted(row)
    if isinstance(row.fields["prompt"], list) or isinstance(row.fields["completion"], list):
        asked, answered = (
            [Message(role, string(row.fields, key))]
            if isinstance(row.fields[key], str)
            else [message(item) for item in items(row.fields, key)]
            for key, role in (("prompt", "user"), ("completion", "assistant"))
        )
        # TRL's conversational prompt is context, whoever spoke in it.
        return _chat(row, [*(_as_context(turn) for turn in asked), *answered])
    prompt = string(row.fields, "prompt", may_be_empty=True)
    return _plain_or_chat(row, Completion(row.line, prompt, string(row.fields, "completion"), row.file))


def _plain_or_chat(row: DataRow, plain: Completion) -> Sample:
    """A prompt with its completion; a conversation where the row has a system prompt, a history or tools beside it.

    Empty ones count too, so that all rows of a data set with such a column are read alike.
    """
    if all(row.fields.get(key) is None for key in _CHAT_KEYS):
        return plain
    asked = [Message("user", plain.prompt)] if plain.prompt.strip() else []
    return _chat(row, [*asked, Message("assistant", plain.completion)])


def _refuse_unwanted(row: DataRow) -> None:
    for key in _WANTED_KEYS:
        if _read_mark(row.fields.get(key)) is False:
            raise RowLeftOutError(f"{key!r} false marks an answer that is not wanted")


def _read_mark(value: object) -> bool | None:
    """Whether a mark says that an answer is wanted; None for what is no such mark (a class, a category)."""
    if isinstance(value, str):
        return _WANTED_WORDS.get(value.strip().casefold())
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def _chat(row: DataRow, messages: list[Message]) -> Chat:
    history = history_messages(items(row.fields, "history", may_be_empty=True))
    system, messages = _system(row, messages)
    messages = [*system, *history, *messages]
    first = next((i for i, turn in enumerate(messages) if turn.role != "assistant"), len(messages))
    answers = [turn for turn in messages[first:] if turn.role == "assistant"]
    if not answers:
        raise RowError("no assistant turn that answers something: there is nothing to learn from")
    if not any(turn.learned for turn in answers):
        raise RowLeftOutError("every answer is marked as not to be learned")
    tools = items(row.fields, "tools", may_be_empty=True) or items(row.fields, "functions", may_be_empty=True)
    variables = row.fields.get("chat_template_kwargs") or {}
    if not isinstance(variables, Mapping):
        raise RowError(f"'chat_template_kwargs' must be an object, got {type(variables).__name__}")
    return Chat(row.line, tuple(messages), tuple(tool_definition(tool) for tool in tools), variables, row.file)


def _system(row: DataRow, messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """The system prompt, of the row or of its first turn, and the other turns; two different ones are an error."""
    own = [turn for turn in messages[:1] if turn.role in ("system", "developer")]
    systems = [Message("system", string(row.fields, key)) for key in _SYSTEM_KEYS if _is_said(row.fields.get(key))]
    prompts = {turn.content.strip() for turn in (*own, *systems)} - {""}
    if len(prompts) > 1:
        raise RowError("the row has two different system prompts, in columns or a column and its turns; keep one")
    spoken = [turn for turn in own if turn.content.strip()]
    return spoken or systems[:1] or own, messages[len(own) :]


def _is_said(value: object) -> bool:
    return value is not None and not (isinstance(value, str) and not value.strip())


def _preference(row: DataRow) -> Sample:
    """What a row with a chosen answer becomes: a conversation, or a prompt with its completion."""
    fields = row.fields
    chosen, rejected = fields["chosen"], fields.get("rejected")
    if isinstance(chosen, list):
        turns = [message(item) for item in items(fields, "chosen")]
        other = [message(item) for item in rejected] if isinstance(rejected, list) else []
        # Turns that the rejected answer shares are context.
        beginning = len(other) if len(other) < len(turns) else 0
        shared = next((i for i, pair in enumerate(zip(turns, other, strict=False)) if pair[0] != pair[1]), beginning)
        answer = [_as_context(turn) for turn in turns[:shared]] + turns[shared:]
        return _chat(row, _joined(_context(fields, turns), answer))
    if isinstance(chosen, Mapping):
        return _chat(row, _joined(_context(fields, []), [message(chosen)]))
    text = string(fields, "chosen")
    if _turn_column(fields):
        return _chat(row, _joined(_context(fields, []), [Message("assistant", text)]))
    if _SPEAKER.match(text):
        return _chat(row, _transcript(text))
    asked = _prompt_key(fields)
    if asked is not None and asked != "prompt":
        return _chat(row, [_question(fields, asked), Message("assistant", text)])
    prompt = _shared_beginning(fields, text) if asked is None else string(fields, "prompt", may_be_empty=True)
    completion = text[len(prompt) :] if asked is None else text
    return _plain_or_chat(row, Completion(row.line, prompt, completion, row.file))


def _as_context(turn: Message) -> Message:
    """The same turn, not to be learned."""
    return Message(turn.role, turn.content, False, turn.extras)


def _turn_column(fields: Mapping[str, object]) -> str | None:
    column = next((key for key in _TURN_KEYS if fields.get(key)), None)
    return column or ("prompt" if isinstance(fields.get("prompt"), list) else None)


def _prompt_key(fields: Mapping[str, object]) -> str | None:
    return next((key for key in _PROMPT_KEYS if fields.get(key) is not None), None)


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
    return [_as_context(turn) for turn in context[: len(before) - both]] + answer


def _transcript(text: str) -> list[Message]:
    parts = _SPEAKER.split(text)[1:]
    speakers, texts = parts[::2], [part.strip() for part in parts[1::2]]
    if speakers[-1] != "Assistant" or not texts[-1]:
        raise RowError("'chosen' does not end with an answer of the assistant")
    # Only the last answer was chosen; earlier ones are what both continuations share.
    return [
        Message("user" if speaker == "Human" else "assistant", words, learned=place == len(texts) - 1)
        for place, (speaker, words) in enumerate(zip(speakers, texts, strict=True))
    ]


def _shared_beginning(fields: Mapping[str, object], answer: str) -> str:
    """The beginning that both answers share is the prompt (as TRL takes it), up to the last blank."""
    rejected = string(fields, "rejected", may_be_empty=True)
    if not rejected:
        raise RowError("'chosen' has neither a prompt nor a 'rejected' answer beside it; add the column 'prompt'")
    shared = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(answer, rejected, strict=False)))
    return shared[: shared.rfind(" ") + 1] if shared != answer else ""


def _pair_format(name: str, question: str, answer: str, shown: str = "", about: tuple[str, ...] = ()) -> RowFormat:
    """A question and its answer, with what the question is about under `about`, of which the example has `shown`."""

    def convert(row: DataRow) -> Sample:
        _refuse_unwanted(row)
        contexts = [string(row.fields, key, may_be_empty=True) for key in about]
        asked = "\n\n".join([string(row.fields, question), *(text for text in contexts if text.strip())])
        return _chat(row, [Message("user", asked), Message("assistant", string(row.fields, answer))])

    context = f'"{shown}": "may be empty", ' if shown else ""
    example = f'{{"{question}": "...", {context}"{answer}": "..."}}'
    return RowFormat(name, (question, answer), example, convert, (*about, *_OF_CHATS))


def _turns_format(name: str, column: str, example: str) -> RowFormat:
    """A conversation as a list of turns, of pairs, or of strings."""

    def convert(row: DataRow) -> Sample:
        _refuse_unwanted(row)
        turns = items(row.fields, column)
        if isinstance(turns[0], str):
            return _chat(row, alternating(turns))
        if column == "data" and any(isinstance(turn, Mapping) and is_pair(turn) for turn in turns):
            raise RowError("'data' holds rows, not turns of one conversation; write its list alone, or a row a line")
        return _chat(row, [message for turn in turns for message in turns_of(turn)])

    return RowFormat(name, (column,), f'{{"{column}": {example}}}', convert, _OF_CHATS)


FORMATS = (
    RowFormat(
        "preference",
        ("chosen",),
        '{"prompt": "...", "chosen": "...", "rejected": "..."}; the chosen answer is learned',
        _preference,
        ("rejected", *_TURN_KEYS, *_PROMPT_KEYS, *_OF_CHATS),
    ),
    _turns_format(
        "messages", "messages", '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    ),
    _turns_format("sharegpt", "conversations", '[{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]'),
    _turns_format("conversation", "conversation", '[{"human": "...", "assistant": "..."}]'),
    RowFormat(
        "prompt+completion",
        ("prompt", "completion"),
        '{"prompt": "...", "completion": "..."}',
        _completion,
        _OF_CHATS,
    ),
    _pair_format("alpaca", "instruction", "output", "input", ("input", "context")),
    _pair_format("dolly", "instruction", "response", "context", ("input", "context")),
    *(
        _pair_format(f"{question}+{answer}", question, answer, about=("context",))
        for question, answer in (
            *(("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer")),
            *(("prompt", "response"), ("problem", "solution"), ("user", "assistant"), ("input", "output")),
        )
    ),
    _turns_format("data", "data", '["question", "answer", ...]'),
    RowFormat("text", ("text",), '{"text": "..."}', lambda row: Text(row.line, string(row.fields, "text"), row.file)),
)

#: Every column that some format looks at; readers need no other.
KNOWN_COLUMNS = frozenset(key for shape in FORMATS for key in (*shape.keys, *shape.optional)) | frozenset(_ROW_KEYS)
