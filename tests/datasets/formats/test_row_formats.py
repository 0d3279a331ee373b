"""Public data sets' shapes: what a row of each becomes; `docs/data.md` shows this table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fedmoe.datasets.formats.samples import Chat, Completion, Message, Sample, Text
from fedmoe.datasets.row_scan import RowOptions, RowScan, check_file

CALL = {"name": "weather", "arguments": {"city": "Bern"}}
CALLED = {"type": "function", "function": CALL}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ASKED = {"role": "user", "content": "Weather in Bern?"}

#: Name in the document -> a row of our own, and what it becomes: turns as "role: text", `*` before what is learned.
SHAPES: dict[str, tuple[dict[str, object], str]] = {
    "plain text": ({"text": "Once."}, "*Once."),
    "prompt and completion": ({"prompt": "2+2=", "completion": "4"}, "2+2= *4"),
    "prompt and completion as turns (TRL)": (
        {
            "prompt": [ASKED, {"role": "assistant", "content": "Hm."}, {"role": "user", "content": "Well?"}],
            "completion": [{"role": "assistant", "content": "12"}],
        },
        "user: Weather in Bern? | assistant: Hm. | user: Well? | *assistant: 12",
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "rendered"},
        "user: Add.\n\n1 2 | *assistant: 3",
    ),
    "Alpaca with history and system (LLaMA-Factory)": (
        {"instruction": "And 2?", "input": "", "output": "4", "system": "S", "history": [["1+1?", "2"]]},
        "system: S | user: 1+1? | *assistant: 2 | user: And 2? | *assistant: 4",
    ),
    "Dolly": (
        {"instruction": "Who?", "context": "Ann came.", "response": "Ann", "category": "qa"},
        "user: Who?\n\nAnn came. | *assistant: Ann",
    ),
    "question and answer (GSM8K)": ({"question": "1+1?", "answer": "2"}, "user: 1+1? | *assistant: 2"),
    "system prompt, question, response (OpenOrca)": (
        {"id": "x", "system_prompt": "S", "question": "1+1?", "response": "2"},
        "system: S | user: 1+1? | *assistant: 2",
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        "user: Hi | *assistant: Ho",
    ),
    "ShareGPT, other names of roles": (
        {"conversations": [{"from": "Human", "value": "Hi"}, {"from": "bing", "value": "Ho"}]},
        "user: Hi | *assistant: Ho",
    ),
    "ShareGPT with tools": (
        {
            "tools": json.dumps([TOOL["function"]]),
            "conversations": [
                {"from": "human", "value": "Weather in Bern?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "12"},
                {"from": "gpt", "value": "12 degrees."},
            ],
        },
        "user: Weather in Bern? | *assistant: weather({'city': 'Bern'}) | tool: 12 | *assistant: 12 degrees. | 1 tools",
    ),
    "OpenAI messages": (
        {"messages": [ASKED, {"role": "assistant", "content": "12"}]},
        "user: Weather in Bern? | *assistant: 12",
    ),
    "OpenAI with tools, content null": (
        {
            "tools": [TOOL],
            "messages": [
                ASKED,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {**CALL, "arguments": '{"city": "Bern"}'}}
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "12"},
                {"role": "assistant", "content": "12 degrees."},
            ],
        },
        "user: Weather in Bern? | *assistant: weather({'city': 'Bern'}) | tool: 12 | *assistant: 12 degrees. | 1 tools",
    ),
    "OpenAI, older function_call": (
        {
            "functions": [TOOL["function"]],
            "messages": [
                ASKED,
                {"role": "assistant", "content": None, "function_call": {**CALL, "arguments": '{"city": "Bern"}'}},
                {"role": "function", "name": "weather", "content": "12"},
                {"role": "assistant", "content": "12"},
            ],
        },
        "user: Weather in Bern? | *assistant: weather({'city': 'Bern'}) | tool: 12 | *assistant: 12 | 1 tools",
    ),
    "OpenAI and Mistral weights": (
        {
            "messages": [
                ASKED,
                {"role": "assistant", "content": "No idea.", "weight": 0},
                ASKED,
                {"role": "assistant", "content": "12", "weight": 1},
            ]
        },
        "user: Weather in Bern? | assistant: No idea. | user: Weather in Bern? | *assistant: 12",
    ),
    "OpenAI, content in parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Ho"}]},
            ]
        },
        "user: Hi you | *assistant: Ho",
    ),
    "reasoning in a key of its own": (
        {"messages": [ASKED, {"role": "assistant", "content": "12", "reasoning_content": "I look it up."}]},
        "user: Weather in Bern? | *assistant: (I look it up.) 12",
    ),
    "UltraChat-like messages": (
        {"prompt": "Weather in Bern?", "prompt_id": "1", "messages": [ASKED, {"role": "assistant", "content": "12"}]},
        "user: Weather in Bern? | *assistant: 12",
    ),
    "strings that take turns (LIMA)": (
        {"conversations": ["Hi", "Ho"], "source": "x"},
        "user: Hi | *assistant: Ho",
    ),
    "UltraChat, a list of strings": ({"id": "1", "data": ["Hi", "Ho"]}, "user: Hi | *assistant: Ho"),
    "pairs of turns": ({"conversation": [{"human": "Hi", "assistant": "Ho"}]}, "user: Hi | *assistant: Ho"),
    "pairs of turns with marks (XTuner)": (
        {
            "conversation": [
                {"system": "S", "input": "Hi", "output": "Hm", "output_with_loss": False},
                {"input": "Hi", "output": "Ho"},
            ]
        },
        "system: S | user: Hi | assistant: Hm | user: Hi | *assistant: Ho",
    ),
    "prompt and completion with a system prompt": (
        {"system": "S", "prompt": "Hi", "completion": "Ho"},
        "system: S | user: Hi | *assistant: Ho",
    ),
    "preference, strings (TRL)": ({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, "2+2= *4"),
    "preference, implicit prompt (TRL)": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        "The sky is  *blue.",
    ),
    "preference, turns": (
        {
            "prompt": "Hi",
            "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
            "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Go away"}],
        },
        "user: Hi | *assistant: Ho",
    ),
    "preference, ShareGPT (LLaMA-Factory)": (
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Ho"},
            "rejected": {"from": "gpt", "value": "Go away"},
        },
        "user: Hi | *assistant: Ho",
    ),
    "preference, system and input (distilabel)": (
        {"system": "S", "input": "Hi", "chosen": "Ho there", "rejected": "Ho hum", "rating": 9},
        "system: S | user: Hi | *assistant: Ho there",
    ),
    "preference, messages before the answers": (
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ho"},
                {"role": "user", "content": "How?"},
            ],
            "chosen": "Well.",
            "rejected": "Bah.",
        },
        "user: Hi | assistant: Ho | user: How? | *assistant: Well.",
    ),
    "preference, HH-RLHF": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: How?\n\nAssistant: Well.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: How?\n\nAssistant: Bah.",
        },
        "user: Hi | assistant: Ho | user: How? | *assistant: Well.",
    ),
    "wanted and unwanted answers (KTO), a wanted one": (
        {"prompt": "2+2=", "completion": "4", "label": True},
        "2+2= *4",
    ),
}


def shown(sample: Sample) -> str:
    match sample:
        case Text(text=text):
            return f"*{text}"
        case Completion(prompt=prompt, completion=completion):
            return f"{prompt} *{completion}"
        case Chat(messages=messages, tools=tools):
            turns = [turn_shown(message) for message in messages] + ([f"{len(tools)} tools"] if tools else [])
            return " | ".join(turns)


def turn_shown(message: Message) -> str:
    said = message.content
    if reasoning := message.extras.get("reasoning_content"):
        said = f"({reasoning}) {said}"
    calls = message.extras.get("tool_calls")
    if isinstance(calls, list):
        said = "".join(f"{call['function']['name']}({call['function']['arguments']})" for call in calls)
    learned = "*" if message.role == "assistant" and message.learned else ""
    return f"{learned}{message.role}: {said}"


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_of_each_public_shape_becomes_what_the_document_says(name: str, tmp_path: Path) -> None:
    row, becomes = SHAPES[name]
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert [shown(sample) for sample in RowScan(file, RowOptions()).samples()] == [becomes]


def test_the_document_has_every_shape_with_its_row_and_what_it_becomes() -> None:
    document = (Path(__file__).parents[3] / "docs" / "data.md").read_text("utf-8")
    missing = [line for line in table() if line not in document]
    assert not missing, "docs/data.md lacks these lines:\n" + "\n".join(missing)


def table() -> list[str]:
    """The lines of the document's table."""
    lines = []
    for name, (row, becomes) in SHAPES.items():
        cells = (f"`{json.dumps(row)}`", becomes)
        lines.append("| " + " | ".join([name, *(cell.replace("|", "\\|").replace("\n", "⏎") for cell in cells)]) + " |")
    return lines


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "2+2=", "completion": "5", "label": False}, "'label' false marks an answer that is not wanted"),
        ({"text": "a", "weight": 0}, "'weight' of the row says that it is not to be learned"),
        (
            {"messages": [ASKED, {"role": "assistant", "content": "12", "train": False}]},
            "every answer is marked as not to be learned",
        ),
    ],
)
def test_a_row_whose_marks_keep_it_out_is_left_out_and_counted(
    row: dict[str, object], reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    report = check_file(file)
    assert report.problem is None
    assert (report.good, report.bad_count, dict(report.left_out)) == (1, 0, {reason: 1})
    assert f"left out: 1 row, {reason}" in report.text


def test_a_label_of_plain_text_is_no_mark(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "a review", "label": 0}) + "\n", encoding="utf-8")
    assert check_file(file).good == 1
    assert "not used: label" in check_file(file).text


@pytest.mark.parametrize("key", ["reasoning_content", "tool_calls", "function_call", "weight", "train", "loss", "name"])
def test_keys_of_turns_with_a_meaning_are_named(key: str, tmp_path: Path) -> None:
    values = {"tool_calls": [CALLED], "function_call": CALL, "weight": 1, "train": True, "loss": 1}
    answer = {"role": "assistant", "content": "12", key: values.get(key, "said")}
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": [ASKED, answer]}) + "\n", encoding="utf-8")
    assert f"obeyed: messages[].{key}" in check_file(file).text


def test_keys_that_are_not_used_are_named_for_rows_and_turns(tmp_path: Path) -> None:
    row = {"id": 1, "score": None, "messages": [{**ASKED, "ts": 3}, {"role": "assistant", "content": "12", "id": None}]}
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert re.search(r"not used: id, messages\[\]\.ts$", check_file(file).text)


def test_rejected_answers_are_counted_and_said(tmp_path: Path) -> None:
    row = json.dumps(SHAPES["preference, strings (TRL)"][0])
    (tmp_path / "a.jsonl").write_text(f"{row}\n{row}\n", encoding="utf-8")
    assert "2 rejected answers are not learned" in check_file(tmp_path / "a.jsonl").text
