"""Formats and the check: every accepted shape is recognised, every bad row counted, nothing bad reaches training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders import write_rows

from fedmoe.datasets.formats.samples import Chat, Completion, Message, Sample, Text
from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.row_scan import RowOptions, RowScan, check_file

USER_ASSISTANT = (Message("user", "hi"), Message("assistant", "ho"))
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def samples_of(path: Path, *columns: tuple[str, str]) -> tuple[Sample, ...]:
    return tuple(RowScan(path, RowOptions(columns)).samples())


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
    file = write_rows(tmp_path / "a.jsonl", row)
    assert check_file(file).format == name
    assert samples_of(file) == (sample,)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "empty"),
        ({"messages": "no list"}, "JSON of one"),
        ({"messages": {"role": "user"}}, "must be a list"),
        ({"messages": [3]}, "must be an object"),
        ({"messages": TURNS[:1]}, "no assistant turn"),
        ({"messages": TURNS[1:]}, "no assistant turn"),
        ({"messages": TURNS[::-1]}, "no assistant turn"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "unknown role 'wizard'"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": " "}]}, "'content' is empty"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": 3}]}, "must be a string"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": "a", "tool_calls": [1]}]}, "tool_calls"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": "a", "weight": 0.5}]}, "'weight' must be 0, 1"),
        ({"messages": [{**TURNS[0], "train": True}, TURNS[1]]}, "asks to learn a turn of 'user'"),
        ({"messages": [{**TURNS[0], "image": "x.png"}, TURNS[1]]}, "only text can be learned"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TURNS[1]]}, "only text can be learned"),
        ({"messages": TURNS, "images": ["x.png"]}, "only text can be learned"),
        ({"messages": [{"role": "user", "content": {"degrees": 12}}, TURNS[1]]}, "has no 'text', but the keys"),
        ({"messages": [TURNS[0], {**TURNS[1], "mask": 1}]}, "'mask' of a turn"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": "\ud83d"}]}, "surrogate"),
        ({"id": 7}, "no known format; found the keys ['id']"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path: Path, row: dict[str, object], reason: str) -> None:
    report = check_file(write_rows(tmp_path / "a.jsonl", {"messages": TURNS}, row), RowOptions(max_bad_fraction=0.5))
    assert (report.rows, report.good, report.bad_count) == (2, 1, 1)
    assert report.bad[0].line == 2
    assert reason in report.bad[0].reason
    assert report.problem is None


def test_one_bad_row_in_a_hundred_is_tolerated_and_reported_two_are_not(tmp_path: Path) -> None:
    good = [{"text": f"row {i}"} for i in range(99)]
    report = check_file(write_rows(tmp_path / "a.jsonl", *good, {"text": ""}))
    assert report.good == 99
    assert report.problem is None
    assert "line 100: 'text' is empty" in report.text
    worse = check_file(write_rows(tmp_path / "b.jsonl", *good[:98], {"text": ""}, {"text": " "}))
    with pytest.raises(
        DataError, match=r"2 of 100 rows are bad \(2\.0%, allowed are 1\.0%\)[^$]*line 99:[^$]*line 100:"
    ):
        worse.raise_problem()


def test_wrong_keys_list_the_accepted_shapes_and_the_advice_works(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"frage": "a", "antwort": "b"})
    report = check_file(path)
    assert report.to_json()["ok"] is False
    for part in (
        "['frage', 'antwort']",
        "messages",
        "sharegpt",
        "alpaca",
        "--map question=prompt --map answer=completion",
    ):
        assert part in str(report.problem)
    assert samples_of(path, ("frage", "prompt"), ("antwort", "completion")) == (Completion(1, "a", "b"),)


def test_a_map_that_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(DataError, match="'wort', which no row has; the first row has \\['text'\\]"):
        check_file(path, RowOptions((("wort", "text"),)))
    with pytest.raises(DataError, match="the name 'antwort', which no format has"):
        RowOptions((("text", "antwort"),))
    with pytest.raises(DataError, match="the column 'text' twice"):
        RowOptions((("text", "prompt"), ("text", "completion")))


def test_a_mapped_column_takes_the_place_of_one_of_that_name(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"text": "a rendering", "prompt": "p", "raw": "what is meant"})
    assert samples_of(path, ("raw", "text")) == (Text(1, "what is meant"),)


def test_rows_of_several_formats_are_each_read_by_their_own_and_said(tmp_path: Path) -> None:
    union = {"messages": None, "prompt": None, "completion": None, "text": None}
    rows = [union | {"messages": TURNS}, union | {"prompt": "p", "completion": "c"}, union | {"text": "t"}]
    path = write_rows(tmp_path / "a.jsonl", *rows)
    assert samples_of(path) == (Chat(1, USER_ASSISTANT), Completion(2, "p", "c"), Text(3, "t"))
    assert "formats messages (1 row), prompt+completion (1 row), text (1 row)" in check_file(path).text


def test_a_file_without_a_readable_row_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("not json\n")
    with pytest.raises(DataError, match=r"no row was read[^$]*line 1: not JSON"):
        check_file(tmp_path / "a.jsonl").raise_problem()


def test_a_file_with_only_bad_rows_is_refused_whatever_is_allowed(tmp_path: Path) -> None:
    report = check_file(write_rows(tmp_path / "a.jsonl", {"text": ""}), RowOptions(max_bad_fraction=0.99))
    assert "1 of 1 rows are bad" in str(report.problem)


def test_many_bad_rows_are_counted_but_not_all_kept(tmp_path: Path) -> None:
    report = check_file(write_rows(tmp_path / "a.jsonl", *([{"text": ""}] * 500)))
    assert report.bad_count == 500
    assert len(report.bad) == 100
    assert "and 490 more" in report.text


def test_columns_that_are_not_used_are_reported(tmp_path: Path) -> None:
    report = check_file(write_rows(tmp_path / "a.jsonl", {"text": "a", "license": "MIT"}))
    assert report.ignored == ("license",)
    assert "not used: license" in report.text


def test_the_report_is_json_and_knows_the_file_by_content(tmp_path: Path) -> None:
    one = check_file(write_rows(tmp_path / "a.jsonl", {"text": "a"}))
    same = check_file(write_rows(tmp_path / "b.jsonl", {"text": "a"}))
    other = check_file(write_rows(tmp_path / "c.jsonl", {"text": "b"}))
    assert one.sha256 == same.sha256 != other.sha256
    assert json.loads(json.dumps(one.to_json()))["ok"] is True


def test_an_impossible_share_of_bad_rows_is_refused() -> None:
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(DataError, match="max_bad_fraction"):
            RowOptions(max_bad_fraction=share)
