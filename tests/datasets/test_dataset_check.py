"""Formats and the check: every accepted shape is recognised, every bad row counted, nothing bad reaches training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedmoe.datasets.check import check_file, load_rows
from fedmoe.datasets.errors import DataError
from fedmoe.datasets.formats import Chat, Completion, Message, Sample, Text

USER_ASSISTANT = (Message("user", "hi"), Message("assistant", "ho"))
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "name", "sample"),
    [
        ({"text": "a"}, "text", Text(1, "a")),
        ({"prompt": "p", "completion": "c"}, "prompt+completion", Completion(1, "p", "c")),
        ({"prompt": "", "completion": "c"}, "prompt+completion", Completion(1, "", "c")),
        ({"messages": TURNS}, "messages", Chat(1, USER_ASSISTANT)),
        ({"messages": TURNS, "text": "rendered"}, "messages", Chat(1, USER_ASSISTANT)),
        ({"messages": json.dumps(TURNS)}, "messages", Chat(1, USER_ASSISTANT)),
        ({"instruction": "hi", "output": "ho"}, "alpaca", Chat(1, USER_ASSISTANT)),
        ({"instruction": "hi", "input": "", "output": "ho"}, "alpaca", Chat(1, USER_ASSISTANT)),
        (
            {"instruction": "add", "input": "1 2", "output": "3", "system": "s"},
            "alpaca",
            Chat(1, (Message("system", "s"), Message("user", "add\n\n1 2"), Message("assistant", "3"))),
        ),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
            "sharegpt",
            Chat(1, USER_ASSISTANT),
        ),
        ({"conversations": TURNS}, "sharegpt", Chat(1, USER_ASSISTANT)),
    ],
)
def test_each_shape_is_recognised(tmp_path: Path, row: dict[str, object], name: str, sample: Sample) -> None:
    loaded = load_rows(write(tmp_path / "a.jsonl", row))
    assert loaded.report.format == name
    assert loaded.samples == (sample,)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "empty"),
        ({"messages": "no list"}, "JSON of one"),
        ({"messages": {"role": "user"}}, "must be a list"),
        ({"messages": ["hi"]}, "must be an object"),
        ({"messages": TURNS[:1]}, "no assistant turn"),
        ({"messages": TURNS[1:]}, "no assistant turn"),
        ({"messages": TURNS[::-1]}, "no assistant turn"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "unknown role 'wizard'"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": " "}]}, "'content' is empty"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": 3}]}, "must be a string"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": "a", "tool_calls": [1]}]}, "tool_calls"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": "\ud83d"}]}, "surrogate"),
        ({"text": "a"}, "keys missing for format messages"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path: Path, row: dict[str, object], reason: str) -> None:
    report = check_file(write(tmp_path / "a.jsonl", {"messages": TURNS}, row), max_bad_fraction=0.5)
    assert (report.rows, report.good, report.bad_count) == (2, 1, 1)
    assert report.bad[0].line == 2
    assert reason in report.bad[0].reason
    assert report.problem is None


def test_one_bad_row_in_a_hundred_is_tolerated_and_reported_two_are_not(tmp_path: Path) -> None:
    good = [{"text": f"row {i}"} for i in range(99)]
    loaded = load_rows(write(tmp_path / "a.jsonl", *good, {"text": ""}))
    assert len(loaded.samples) == 99
    assert "line 100: 'text' is empty" in loaded.report.text
    with pytest.raises(
        DataError, match=r"2 of 100 rows are bad \(2\.0%, allowed are 1\.0%\)[^$]*line 99:[^$]*line 100:"
    ):
        load_rows(write(tmp_path / "b.jsonl", *good[:98], {"text": ""}, {"text": None}))


def test_wrong_keys_list_the_accepted_shapes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "a", "answer": "b"})
    with pytest.raises(DataError, match=r"\['question', 'answer'\][^$]*messages[^$]*sharegpt[^$]*alpaca"):
        load_rows(path)
    assert check_file(path).to_json()["ok"] is False


def test_a_file_without_a_readable_row_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("not json\n")
    with pytest.raises(DataError, match=r"no row could be read[^$]*line 1: not JSON"):
        load_rows(tmp_path / "a.jsonl")


def test_a_file_with_only_bad_rows_is_refused_whatever_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not one of 1 rows"):
        load_rows(write(tmp_path / "a.jsonl", {"text": ""}), max_bad_fraction=0.99)


def test_many_bad_rows_are_counted_but_not_all_kept(tmp_path: Path) -> None:
    report = check_file(write(tmp_path / "a.jsonl", *([{"text": ""}] * 500)))
    assert report.bad_count == 500
    assert len(report.bad) == 100
    assert "and 490 more" in report.text


def test_columns_that_are_not_used_are_reported(tmp_path: Path) -> None:
    report = check_file(write(tmp_path / "a.jsonl", {"text": "a", "license": "MIT"}))
    assert report.ignored == ("license",)
    assert "not used: license" in report.text


def test_the_report_is_json_and_knows_the_file_by_content(tmp_path: Path) -> None:
    one = check_file(write(tmp_path / "a.jsonl", {"text": "a"}))
    same = check_file(write(tmp_path / "b.jsonl", {"text": "a"}))
    other = check_file(write(tmp_path / "c.jsonl", {"text": "b"}))
    assert one.sha256 == same.sha256 != other.sha256
    assert json.loads(json.dumps(one.to_json()))["ok"] is True


def test_an_impossible_share_of_bad_rows_is_refused(tmp_path: Path) -> None:
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(DataError, match="max_bad_fraction"):
            check_file(write(tmp_path / "a.jsonl", {"text": "a"}), share)
