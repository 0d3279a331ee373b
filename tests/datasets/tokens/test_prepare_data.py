"""One report before the first step, the same for any number of processes, and tokens that are kept."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from builders import write_rows
from tiny_tokenizer import make_tokenizer

from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.row_scan import RowOptions
from fedmoe.datasets.tokens import render, tokenization
from fedmoe.datasets.tokens.tokenization import TokenData, tokenize_samples
from fedmoe.models import prepare_data
from fedmoe.models.prepare_data import DataOptions, PreparedData, prepare_samples

TOKENIZER = make_tokenizer()
STRICT = make_tokenizer(
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(*contents: str) -> dict[str, object]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]}


def same(left: PreparedData, right: PreparedData) -> bool:
    return (
        left.report == right.report
        and left.row_hashes.tolist() == right.row_hashes.tolist()
        and all(
            np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.labels, b.labels)
            for a, b in zip(left.samples, right.samples, strict=True)
        )
    )


def test_one_refused_row_of_two_hundred_is_named_and_ends_nothing(tmp_path: Path) -> None:
    rows = [chat(f"q {i}", f"a {i}") for i in range(200)]
    rows[137] = {"messages": [{"role": "user", "content": "hello?"}, *rows[137]["messages"]]}  # type: ignore[misc]
    found = prepare_samples(write_rows(tmp_path / "a.jsonl", *rows), STRICT, 128)
    assert len(found.samples) == found.report.good == 199
    assert len(set(found.row_hashes.tolist())) == 199
    assert "line 138: the chat template refuses the turns" in found.report.text
    assert (found.report.summary["bad"], found.report.summary["left_out"]) == (1, 0)


def test_refused_and_unreadable_rows_share_one_budget(tmp_path: Path) -> None:
    good = [chat("q", "a")] * 98
    twice = {"messages": [{"role": "user", "content": "?"}, *good[0]["messages"]]}  # type: ignore[misc]
    with pytest.raises(
        DataError, match=r"2 of 100 rows are bad[^$]*line 99: 'messages'[^$]*line 100: the chat template"
    ):
        prepare_samples(write_rows(tmp_path / "a.jsonl", *good, {"messages": []}, twice), STRICT, 128)


def test_the_report_counts_what_is_learned_and_what_is_not(tmp_path: Path) -> None:
    rows = [chat("q", "a"), chat("q", "b" * 100), chat("q" * 100, "a"), chat("q", "c" * 30)]
    file = write_rows(tmp_path / "a.jsonl", *rows)
    report = prepare_samples(file, TOKENIZER, 80).report
    assert report.tokens is not None
    assert (report.good, report.tokens.cut, report.tokens.too_long, report.tokens.samples) == (3, 1, 1, 3)
    assert report.tokens.longest > report.tokens.median > 80
    assert report.tokens.lost + report.tokens.learned == 2 + 101 + 31
    assert "cut: in 1 row the tail of an answer" in report.text
    assert "left out: 1 row, no part of an answer fits 80 tokens" in report.text
    assert report.summary["cut"] == 1
    assert report.summary["left_out"] == 1
    assert json.loads(json.dumps(report.to_json()))["tokens"]["cut"] == 1
    split = prepare_samples(file, TOKENIZER, 80, DataOptions(long_rows="split")).report
    assert split.tokens is not None
    assert (split.tokens.cut, split.tokens.split, split.tokens.lost) == (0, 1, 0)
    short = prepare_samples(file, TOKENIZER, 42, DataOptions(long_rows="split")).report.text
    assert "tokens in all; a larger --max-length learns it" in short
    dropped = prepare_samples(file, TOKENIZER, 80, DataOptions(long_rows="drop"))
    assert [len(sample.input_ids) for sample in dropped.samples] == [41, 70]


def test_data_of_which_nothing_can_be_learned_are_refused_with_the_reason(tmp_path: Path) -> None:
    """Fault 64."""
    file = write_rows(tmp_path / "a.jsonl", chat("q" * 100, "a"))
    with pytest.raises(
        DataError, match=r"not one of 1 rows .*1 row: no part of an answer fits 60 tokens.*--max-length"
    ):
        prepare_samples(file, TOKENIZER, 60)
    assert prepare_samples(file, TOKENIZER, 200).report.good == 1


def test_where_marks_keep_all_rows_out_a_larger_length_is_not_advised(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", {"prompt": "q", "completion": "a", "label": False})
    problem = prepare_samples(file, TOKENIZER, 60, refuse=False).report.problem
    assert problem is not None
    assert "'label' false" in problem
    assert "--max-length" not in problem


def test_several_processes_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, object]] = [
        chat(f"question {i}", f"answer {i} " * (i % 40)) if i % 40 else {"text": f"text {i}"} for i in range(300)
    ]
    rows[7] = {"id": 1}
    file = write_rows(tmp_path / "a.jsonl", *rows)
    alone = prepare_samples(file, TOKENIZER, 200)
    monkeypatch.setattr(tokenization, "PARALLEL_FROM", 100)
    monkeypatch.setattr(tokenization, "_CHUNK", 32)
    told: list[int] = []
    several = prepare_samples(file, TOKENIZER, 200, processes=2, progress=told.append)
    assert same(alone, several)
    assert told == sorted(told)
    assert told[-1] == 299
    assert len(told) > 3


@pytest.mark.parametrize("characters", [1, 300])
def test_rows_encoded_together_become_what_each_becomes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, characters: int
) -> None:
    answers = ["", "a", "\u00e9\u4e2d\U0001f642 " * 9, "<|im_end|> inside", "  blanks  ", "long " * 90]
    rows: list[dict[str, object]] = [chat(f"question {i}", answers[i % 6] or "x", "and?", "so") for i in range(60)]
    rows[20] = {"text": "text"}
    rows[30] = chat("q", "a", "again?", "b") | {"chat_template_kwargs": {"tokenize": True}}  # refused
    file = write_rows(tmp_path / "a.jsonl", *rows)
    together = prepare_samples(file, TOKENIZER, 2000, DataOptions(RowOptions(max_bad_fraction=0.5)))
    assert together.report.bad_count == 1
    monkeypatch.setattr(render, "_CHARACTERS_AT_ONCE", characters)
    assert same(together, prepare_samples(file, TOKENIZER, 2000, DataOptions(RowOptions(max_bad_fraction=0.5))))


def test_a_process_that_is_killed_ends_the_run_and_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(tmp_path / "a.jsonl", *[chat(f"q {i}", f"a {i}") for i in range(600)])
    monkeypatch.setattr(tokenization, "PARALLEL_FROM", 100)
    monkeypatch.setattr(tokenization, "_CHUNK", 32)

    def kill(done: int) -> None:
        for process in psutil.Process().children():
            # One that was killed a moment ago, or by a test before, may be a zombie still.
            with suppress(psutil.NoSuchProcess):
                if "spawn_main" in " ".join(process.cmdline()):
                    process.kill()

    with pytest.raises(DataError, match="one of 2 processes that make tokens was ended from outside"):
        prepare_samples(file, TOKENIZER, 64, cache=tmp_path / "kept", processes=2, progress=kill)
    assert not list(tmp_path.glob("kept/*"))


def test_data_that_change_before_they_are_read_are_not_kept_under_their_old_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(tmp_path / "a.jsonl", *[chat(f"q {i}", "before") for i in range(30)])
    content = file.read_bytes()
    before = prepare_samples(file, TOKENIZER, 64)

    def changed(*arguments: Any) -> TokenData:
        write_rows(file, *[chat(f"q {i}", "after it") for i in range(30)])
        return tokenize_samples(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "tokenize_samples", changed)
        assert not same(before, prepare_samples(file, TOKENIZER, 64, cache=tmp_path / "kept"))
    file.write_bytes(content)
    again = prepare_samples(file, TOKENIZER, 64, cache=tmp_path / "kept")
    assert not again.from_cache
    assert same(before, again)


def test_tokens_are_kept_for_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_rows(tmp_path / "a.jsonl", *[chat(f"q {i}", "a" * i) for i in range(1, 60)])
    first = prepare_samples(file, TOKENIZER, 64, cache=tmp_path / "kept")
    assert not first.from_cache
    monkeypatch.setattr("fedmoe.models.prepare_data.tokenize_samples", None)  # not called again
    again = prepare_samples(file, TOKENIZER, 64, cache=tmp_path / "kept")
    assert again.from_cache
    assert same(first, again)
    moved = file.rename(tmp_path / "b.jsonl")
    assert prepare_samples(moved, TOKENIZER, 64, cache=tmp_path / "kept").report.source == str(moved)


def test_other_data_options_lengths_and_templates_are_tokenised_anew(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    file = write_rows(tmp_path / "a.jsonl", *[chat(f"q {i}", "a" * 99) for i in range(9)])
    assert not prepare_samples(file, TOKENIZER, 64, cache=kept, refuse=False).from_cache
    assert not prepare_samples(file, TOKENIZER, 65, cache=kept, refuse=False).from_cache
    assert not prepare_samples(file, TOKENIZER, 64, DataOptions(long_rows="split"), cache=kept, refuse=False).from_cache
    assert not prepare_samples(
        file, TOKENIZER, 64, DataOptions(RowOptions(max_bad_fraction=0.5)), cache=kept, refuse=False
    ).from_cache
    assert not prepare_samples(file, STRICT, 64, cache=kept, refuse=False).from_cache
    write_rows(file, chat("q", "other"))
    assert not prepare_samples(file, TOKENIZER, 64, cache=kept, refuse=False).from_cache


def test_the_same_bytes_under_another_suffix_are_read_anew(tmp_path: Path) -> None:
    rows = "text\nonce upon a time\n" + "a,b\n" * 3
    (tmp_path / "a.tsv").write_text(rows, encoding="utf-8")
    (tmp_path / "a.csv").write_text(rows, encoding="utf-8")
    assert (
        prepare_samples(tmp_path / "a.tsv", TOKENIZER, 128, cache=tmp_path / "kept", refuse=False).report.bad_count == 0
    )
    assert (
        prepare_samples(tmp_path / "a.csv", TOKENIZER, 128, cache=tmp_path / "kept", refuse=False).report.bad_count == 3
    )


def test_what_of_a_folder_is_not_read_is_said_beside_kept_tokens_too(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "train.jsonl", {"text": "once"})
    first = prepare_samples(folder, TOKENIZER, 128, cache=tmp_path / "kept", refuse=False)
    write_rows(folder / "test.jsonl", {"text": "twice"})
    again = prepare_samples(folder, TOKENIZER, 128, cache=tmp_path / "kept", refuse=False)
    assert (first.report.notes, again.from_cache) == ((), True)
    assert "test: not trained on" in again.report.text


def test_a_template_that_looks_at_the_clock_is_never_kept(tmp_path: Path) -> None:
    clock = make_tokenizer("{{ strftime_now('%Y') }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    file = write_rows(tmp_path / "a.jsonl", *[chat("q", "a")] * 3)
    prepare_samples(file, clock, 64, cache=tmp_path / "kept", refuse=False)
    assert not prepare_samples(file, clock, 64, cache=tmp_path / "kept", refuse=False).from_cache


def test_damaged_kept_tokens_are_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_rows(tmp_path / "a.jsonl", *[chat(f"q {i}", "a" * 20) for i in range(30)])
    first = prepare_samples(file, TOKENIZER, 64, cache=tmp_path / "kept")
    (kept,) = (tmp_path / "kept").iterdir()
    whole = kept.read_bytes()
    other_report = whole.replace(b'\\"rows\\":30', b'\\"rows\\":31')
    assert other_report != whole
    for damaged in (whole[: len(whole) // 2], b"", whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], other_report):
        kept.write_bytes(damaged)
        found = prepare_samples(file, TOKENIZER, 64, cache=tmp_path / "kept")
        assert not found.from_cache
        assert same(first, found)
        assert "made anew" in caplog.text
        caplog.clear()


def test_a_folder_that_cannot_be_written_costs_the_cache_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    file = write_rows(tmp_path / "a.jsonl", chat("q", "a"))
    assert prepare_samples(file, TOKENIZER, 64, cache=tmp_path / "file" / "below").samples


def test_few_files_are_kept(tmp_path: Path) -> None:
    for number in range(12):
        prepare_samples(
            write_rows(tmp_path / "a.jsonl", chat("q", f"a {number}")), TOKENIZER, 64, cache=tmp_path / "kept"
        )
    assert len(list((tmp_path / "kept").iterdir())) == 8


def test_kept_tokens_are_for_their_owner_alone(tmp_path: Path) -> None:
    prepare_samples(write_rows(tmp_path / "a.jsonl", chat("q", "a")), TOKENIZER, 64, cache=tmp_path / "kept")
    (kept,) = (tmp_path / "kept").iterdir()
    assert kept.stat().st_mode & 0o077 == 0


def test_kept_tokens_follow_from_the_code_that_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda file: read.append(file.name) or read_bytes(file))  # type: ignore[func-returns-value]
    prepare_data._code_hash.__wrapped__()
    assert {
        "text_rows.py",
        "row_formats.py",
        "render.py",
        "chat_answers.py",
        "tokenization.py",
        "prepare_data.py",
    } <= set(read)
