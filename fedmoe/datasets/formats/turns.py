"""Turns of conversations in public data: roles, contents, tool calls, flags of turns to learn or to mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedmoe.datasets.formats.samples import Message
from fedmoe.datasets.formats.values import RowError, checked_text, mark, some_keys, string
from fedmoe.datasets.readers.text_rows import decode_json

#: The roles of chat templates.
ROLES = ("system", "developer", "user", "assistant", "tool")
#: The turn is the assistant's call of a function, as text (ShareGPT with tools, LLaMA-Factory).
_CALL_ROLES = frozenset({"function_call", "tool_call", "function-call", "tool-call"})
_ALIASES = {
    **dict.fromkeys(("human", "prompter", "instruction"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "chatbot", "ai", "bing", "bard", "claude"), "assistant"),
    **dict.fromkeys(("function", "observation", "tool_response", "function_response", "ipython"), "tool"),
    **dict.fromkeys(("tool_result", "function_result", "tool_output"), "tool"),
}
#: Keys that say whether an assistant's turn is learned (OpenAI, Mistral: weight; axolotl: train; ms-swift: loss;
#: XTuner: output_with_loss).
TURN_MARKS = ("weight", "train", "training", "trainable", "loss", "output_with_loss")
#: Keys that would change what is learned of a turn in a way that is not supported.
_REFUSED = ("train_detail", "mask", "masked", "loss_mask")
MEDIA_KEYS = ("image", "image_url", "images", "audio", "audios", "input_audio", "video", "videos", "video_url")
#: Columns that may hold turns.
TURN_COLUMNS = ("messages", "conversations", "conversation", "data", "prompt", "completion", "chosen", "rejected")
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value", "text")
#: Keys of a turn that go to the chat template.
TEMPLATE_KEYS = ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call", "tool_call_id", "name")
_USED = frozenset((*_ROLE_KEYS, *_CONTENT_KEYS, *TURN_MARKS, *TEMPLATE_KEYS))
#: A turn may hold a question and its answer; then these keys are used, with `system` and the marks.
_PAIRS = (("human", "assistant"), ("user", "assistant"), ("human", "gpt"), ("input", "output"))


def message(item: object) -> Message:
    """The message of one turn `{"role": ..., "content": ...}` or `{"from": ..., "value": ...}`, further keys obeyed."""
    if not isinstance(item, Mapping):
        raise RowError(f"a turn must be an object with 'role' and 'content', got {type(item).__name__}")
    _refuse(item)
    named = string(item, _key_of(item, _ROLE_KEYS))
    name = named.strip().casefold()
    role = "assistant" if name in _CALL_ROLES else _ALIASES.get(name, name)
    if role not in ROLES:
        roles = ", ".join((*ROLES, *_ALIASES, *sorted(_CALL_ROLES)))
        raise RowError(f"unknown role {named[:40]!r}; known are {roles}")
    content = _content(item, _key_of(item, _CONTENT_KEYS))
    extras = _extras(item)
    if named.casefold() in _CALL_ROLES and (calls := _calls_in(content)):
        content, extras = "", {**extras, "tool_calls": calls}
    learned = _learned(item, role)
    must_speak = role == "user" or (role == "assistant" and learned and "tool_calls" not in extras)
    if must_speak and not content.strip():
        raise RowError(f"{_key_of(item, _CONTENT_KEYS)!r} is empty")
    return Message(role, content, learned, extras)


def turns_of(item: object) -> list[Message]:
    """The turns that one item of a conversation holds: one, or a question with its answer."""
    if isinstance(item, Mapping) and is_pair(item):
        return pair_messages(item)
    return [message(item)]


def is_pair(item: Mapping[str, object]) -> bool:
    """Whether it has no role and no content of its own."""
    return not {"role", "from", "content", "value"} & set(item)


def unused_keys(turns: Sequence[object]) -> frozenset[str]:
    """Keys of turns that hold something and are not used."""
    unused: set[str] = set()
    for turn in turns:
        if isinstance(turn, Mapping):
            pair = _pair_of(turn) if is_pair(turn) else None
            used = {*pair, "system", *TURN_MARKS} if pair else _USED
            unused |= {str(key)[:40] for key, value in turn.items() if key not in used and value is not None}
    return frozenset(unused)


def _pair_of(item: Mapping[str, object]) -> tuple[str, str] | None:
    return next((pair for pair in _PAIRS if all(key in item for key in pair)), None)


def template_keys(turns: Sequence[object]) -> frozenset[str]:
    """Keys of turns that hold something and go to the chat template or decide what is learned."""
    return frozenset(
        key
        for turn in turns
        if isinstance(turn, Mapping)
        for key in (*TEMPLATE_KEYS, *TURN_MARKS)
        if turn.get(key) not in (None, "", [], {})
    )


def tool_definition(item: object) -> Mapping[str, object]:
    """A function definition in the shape that templates expect: `{"type": "function", "function": {...}}`."""
    if not isinstance(item, Mapping):
        raise RowError(f"a tool must be an object, got {type(item).__name__}")
    return item if isinstance(item.get("function"), Mapping) else {"type": "function", "function": item}


def _refuse(item: Mapping[str, object]) -> None:
    for key in _REFUSED:
        if item.get(key) is not None:
            raise RowError(f"{key!r} of a turn would change what is learned and is not supported; remove it")
    for key in MEDIA_KEYS:
        if item.get(key):
            raise RowError(f"a turn holds {key!r}: only text can be learned")


def _key_of(item: Mapping[str, object], keys: Sequence[str]) -> str:
    return next((key for key in keys if item.get(key) is not None), next((key for key in keys if key in item), keys[0]))


def _content(item: Mapping[str, object], key: str) -> str:
    value = item.get(key)
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list):
        return "".join(_part(key, part) for part in value)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{key!r} must be a string, got {type(value).__name__}")
    return checked_text(key, value)


def _part(key: str, part: object) -> str:
    """The text of one part of a content in parts (OpenAI's `{"type": "text", "text": ...}`)."""
    if isinstance(part, str):
        return checked_text(key, part)
    if not isinstance(part, Mapping):
        raise RowError(f"a part of {key!r} must be an object or a string, got {type(part).__name__}")
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text") or any(part.get(media) for media in MEDIA_KEYS):
        raise RowError(f"a part of {key!r} is {str(kind)[:40]!r}: only text can be learned")
    if part.get("text") is None:
        raise RowError(
            f"a part of {key!r} has no 'text', but the keys {some_keys(part)}; write its content as a string"
        )
    return string(part, "text", may_be_empty=True)


def _learned(item: Mapping[str, object], role: str) -> bool:
    marks = {key: mark(key, item[key]) for key in TURN_MARKS if item.get(key) is not None}
    if len(set(marks.values())) > 1:
        raise RowError(f"the marks {marks} of one turn contradict each other")
    learned = next(iter(marks.values()), True)
    if marks and learned and role != "assistant":
        raise RowError(f"{next(iter(marks))!r} asks to learn a turn of {role!r}; only the assistant's are learned")
    return learned


def _extras(item: Mapping[str, object]) -> dict[str, object]:
    extras: dict[str, object] = {}
    reasoning = next((item[key] for key in ("reasoning_content", "reasoning", "thinking") if item.get(key)), None)
    if reasoning is not None:
        extras["reasoning_content"] = string({"reasoning_content": reasoning}, "reasoning_content")
    if calls := _calls(item):
        extras["tool_calls"] = calls
    for key in ("tool_call_id", "name"):
        if item.get(key):
            extras[key] = string(item, key)
    return extras


def _calls(item: Mapping[str, object]) -> list[dict[str, object]]:
    """The calls of a turn, in OpenAI's shape or its older one."""
    calls, older = item.get("tool_calls"), item.get("function_call")
    if isinstance(calls, str):
        calls = _decoded("tool_calls", calls) if calls.strip() else None
    if calls and not isinstance(calls, list):
        raise RowError(f"'tool_calls' must be a list, got {type(calls).__name__}")
    checked = [_call("tool_calls", call) for call in calls] if isinstance(calls, list) else []
    if not older:
        return checked
    single = _call("function_call", _decoded("function_call", older) if isinstance(older, str) else older)
    if checked and [call["function"] for call in checked] != [single["function"]]:
        raise RowError("'tool_calls' and 'function_call' of one turn differ; keep one")
    return checked or [single]


def _call(key: str, call: object) -> dict[str, object]:
    """A call in OpenAI's shape, its arguments as an object: templates write them as JSON themselves."""
    if not isinstance(call, Mapping):
        raise RowError(f"{key!r} must hold objects, got {type(call).__name__}")
    function = call["function"] if isinstance(call.get("function"), Mapping) else call
    assert isinstance(function, Mapping)
    name = string(function, "name")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _decoded("arguments", arguments) if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise RowError(f"the arguments of the call of {name[:40]!r} must be an object, got {type(arguments).__name__}")
    identity = {} if call.get("id") is None else {"id": string(call, "id")}
    return {**identity, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def _calls_in(content: str) -> list[dict[str, object]]:
    """The calls that a text holds as JSON, one or a list; none if it is other text, which is learned as it stands."""
    try:
        value = decode_json(content)
    except ValueError:
        return []
    calls = value if isinstance(value, list) else [value]
    named = [call for call in calls if isinstance(call, Mapping) and ("name" in call or "function" in call)]
    return [_call("function_call", call) for call in named] if len(named) == len(calls) else []


def _decoded(key: str, text: str) -> object:
    try:
        return decode_json(text)
    except ValueError as error:
        raise RowError(f"{key!r} is not JSON: {error}") from None


def history_messages(pairs: Sequence[object]) -> list[Message]:
    """Earlier questions with their answers, `[[question, answer], ...]` (LLaMA-Factory's `history`): learned too."""
    turns: list[Message] = []
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowError(f"'history' must hold pairs of strings, got {str(pair)[:60]}")
        turns += alternating(pair)
    return turns


def alternating(texts: Sequence[object]) -> list[Message]:
    """Strings that take turns, the user first (UltraChat's `data`)."""
    if not all(isinstance(text, str) for text in texts):
        raise RowError("a conversation as strings must hold strings only")
    if not all(str(text).strip() for text in texts):
        raise RowError("a turn of a conversation as strings is empty")
    return [Message("user" if index % 2 == 0 else "assistant", str(text)) for index, text in enumerate(texts)]


def pair_messages(item: Mapping[str, object]) -> list[Message]:
    """A turn that holds a question and its answer, `{"human": ..., "assistant": ...}`, perhaps with a `system`."""
    pair = _pair_of(item)
    if pair is None:
        raise RowError(f"a turn must have 'role' and 'content', got the keys {some_keys(item)}")
    _refuse(item)
    system = string(item, "system", may_be_empty=True)
    instructions = [Message("system", system)] if system.strip() else []
    learned = _learned(item, "assistant")
    return [
        *instructions,
        Message("user", string(item, pair[0])),
        Message("assistant", string(item, pair[1]), learned),
    ]


def with_decoded_turns(fields: Mapping[str, object]) -> Mapping[str, object]:
    """The row with cells that are the JSON of turns as these turns: CSV has no other way to hold them."""
    decoded = {key: turns for key in TURN_COLUMNS if (turns := _turns_in(fields.get(key))) is not None}
    return {**fields, **decoded} if decoded else fields


def _turns_in(cell: object) -> list[object] | None:
    """The turns that a text holds as JSON, one or a list; None if it is other text, or JSON of something else."""
    if not isinstance(cell, str) or not cell.lstrip().startswith(("[", "{")):
        return None
    try:
        value = decode_json(cell)
    except ValueError:
        return None
    turns = value if isinstance(value, list) else [value]
    keys = {*_CONTENT_KEYS, "tool_calls", "function_call"}
    are_turns = (isinstance(turn, Mapping) and turn.keys() & _ROLE_KEYS and turn.keys() & keys for turn in turns)
    return turns if turns and all(are_turns) else None
