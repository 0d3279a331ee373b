"""`fedmoe data check`: the report that a worker prints, before any worker runs; its advice works."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import write_rows
from command import Outcome

from fedmoe.datasets.row_scan import check_file

Run = Callable[..., Outcome]
TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMOE_CACHE", str(tmp_path / "cache"))


def test_with_a_base_model_tokens_are_counted_and_two_samples_shown(fedmoe: Run, tmp_path: Path) -> None:
    rows = [{"messages": TURNS}] * 3 + [{"text": "x" * 100}]
    outcome = fedmoe(
        "data", "check", str(write_rows(tmp_path / "a.jsonl", *rows)), "--base-model", "tiny", "--max-length", "64"
    )
    assert outcome.status == 0
    assert "4 of 4 rows fit, formats messages (3 rows), text (1 row)" in outcome.out
    assert "split: 1 row beyond that length" in outcome.out
    assert "assistant\n>>>So.<|im_end|><<<" in outcome.out
    assert outcome.out.count("--- sample") == 2


def test_json_holds_the_same(fedmoe: Run, tmp_path: Path) -> None:
    file = str(write_rows(tmp_path / "a.jsonl", {"messages": TURNS, "id": 1}))
    report = json.loads(fedmoe("data", "check", file, "--base-model", "tiny", "--json").out)
    assert report["ok"] is True
    assert report["tokens"]["max_length"] == 1024
    assert report["tokens"]["learned"] == 4
    assert report["ignored"] == ["id"]
    assert json.loads(fedmoe("data", "check", file, "--json").out)["tokens"] is None


def test_the_second_look_takes_the_kept_tokens(fedmoe: Run, tmp_path: Path) -> None:
    file = str(write_rows(tmp_path / "a.jsonl", {"messages": TURNS}))
    first = fedmoe("data", "check", file, "--base-model", "tiny")
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1
    assert fedmoe("data", "check", file, "--base-model", "tiny").out == first.out


def test_a_row_that_the_template_refuses_ends_with_status_1_and_its_line(fedmoe: Run, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}
    outcome = fedmoe(
        "data", "check", str(write_rows(tmp_path / "a.jsonl", called, {"messages": TURNS})), "--base-model", "tiny"
    )
    assert outcome.status == 1
    assert "line 1: the chat template does not render tool_calls" in outcome.out


def test_the_advice_for_a_template_that_does_not_render_calls_works(fedmoe: Run, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "look_up", "arguments": '{"x": 1}'}}
    file = str(
        write_rows(
            tmp_path / "a.jsonl", {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}
        )
    )
    assert "--chat-template FILE" in fedmoe("data", "check", file, "--base-model", "tiny").out
    template = tmp_path / "with_calls.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    outcome = fedmoe("data", "check", file, "--base-model", "tiny", "--chat-template", str(template))
    assert outcome.status == 0
    assert '>>>look_up({"x": 1})<|im_end|><<<' in outcome.out


def test_long_rows_are_cut_split_or_dropped_as_asked(fedmoe: Run, tmp_path: Path) -> None:
    long = {"messages": [TURNS[0], {"role": "assistant", "content": "so " * 100}]}
    file = str(write_rows(tmp_path / "a.jsonl", long, {"messages": TURNS}))
    check = ("data", "check", file, "--base-model", "tiny", "--max-length", "100")
    assert "cut: in 1 row the tail of an answer" in fedmoe(*check).out
    assert "split: 1 row beyond that length" in fedmoe(*check, "--long-rows", "split").out
    assert "left out: 1 row, no part of an answer fits 100 tokens" in fedmoe(*check, "--long-rows", "drop").out
    refused = fedmoe(*check, "--long-rows", "cut")
    assert refused.status != 0
    assert "--long-rows must be one of truncate, split, drop, got 'cut'" in refused.err


@pytest.mark.parametrize(
    "option",
    [
        ("--max-length", "64"),
        ("--long-rows", "drop"),
        ("--chat-template", "x.jinja"),
        ("--chat-template-kwargs", '{"enable_thinking": false}'),
    ],
)
def test_options_about_tokens_need_a_base_model(option: tuple[str, str], fedmoe: Run, tmp_path: Path) -> None:
    outcome = fedmoe("data", "check", str(write_rows(tmp_path / "a.jsonl", {"text": "a"})), *option)
    assert outcome.status == 1
    assert f"{option[0]} needs --base-model" in outcome.err


def test_a_length_beyond_the_context_is_refused_with_both(fedmoe: Run, tmp_path: Path) -> None:
    file = str(write_rows(tmp_path / "a.jsonl", {"text": "a"}))
    outcome = fedmoe("data", "check", file, "--base-model", "tiny", "--max-length", "4096")
    assert outcome.status == 1
    assert "--max-length 4096 is more than the base model's context of 2048 tokens" in outcome.err


def test_columns_are_mapped_and_a_wrong_map_says_how(fedmoe: Run, tmp_path: Path) -> None:
    file = str(write_rows(tmp_path / "a.jsonl", {"frage": "a", "antwort": "b"}))
    assert fedmoe("data", "check", file).status == 1
    outcome = fedmoe("data", "check", file, "--map", "frage=question", "--map", "antwort=answer")
    assert outcome.status == 0
    assert "format question+answer" in outcome.out
    assert "--map takes COLUMN=NAME" in fedmoe("data", "check", file, "--map", "frage").err


def read_rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_demonstrations_data_are_made_from_installed_packages_and_not_again(fedmoe: Run, tmp_path: Path) -> None:
    first = fedmoe("data", "build", "--domain", "python", "--out", str(tmp_path))
    assert (first.status, first.out.splitlines()[0]) == (0, "python: reading its source")
    train, test = (read_rows(tmp_path / "python" / f"{side}.jsonl") for side in ("train", "test"))
    assert f"python: {len(train):,} train and " in first.out
    assert sum(len(row["text"]) for row in train) > 1_000_000
    assert len({row["file"] for row in test}) >= 20
    assert not {row["file"] for row in test} & {row["file"] for row in train}
    assert check_file(tmp_path / "python" / "test.jsonl").bad_count == 0
    assert "python: already there" in fedmoe("data", "build", "--domain", "python", "--out", str(tmp_path)).out
