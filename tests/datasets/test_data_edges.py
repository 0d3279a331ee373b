"""Public rows with something beside the usual: nothing that a row says is dropped, and nothing unwanted learned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from fedmoe.datasets.formats.samples import Chat, Completion, Sample
from fedmoe.datasets.report import DataReport
from fedmoe.datasets.row_scan import RowOptions, RowScan

ASKED = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Ho"}
BAD = {"role": "assistant", "content": "Go away"}


def read(folder: Path, *rows: Mapping[str, object], columns: tuple[str, ...] = ()) -> tuple[list[str], DataReport]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scan = RowScan(file, RowOptions.mapping(columns))
    return [shown(sample) for sample in scan.samples()], scan.report()


def shown(sample: Sample) -> str:
    if isinstance(sample, Chat):
        turns = [("*" * (m.role == "assistant" and m.learned)) + m.role[0] + ":" + m.content for m in sample.messages]
        return " ".join([*turns, *(f"tool:{tool['function']['name']}" for tool in sample.tools)])  # type: ignore[index]
    return f"{sample.prompt} *{sample.completion}" if isinstance(sample, Completion) else f"*{sample.text}"


@pytest.mark.parametrize(
    ("row", "becomes"),
    [
        ({"system": "S", "input": "Hi", "chosen": "Ho A", "rejected": "Ho B"}, "s:S u:Hi *a:Ho A"),
        ({"query": "Hi", "chosen": "Ho A", "rejected": "Ho B"}, "u:Hi *a:Ho A"),
        ({"system": "S", "prompt": "Hi", "chosen": "Ho", "rejected": "No"}, "s:S u:Hi *a:Ho"),
        ({"system": "S", "prompt": "Hi", "completion": "Ho"}, "s:S u:Hi *a:Ho"),
        ({"prompt": "Hi", "completion": "Ho", "history": [["A", "B"]]}, "u:A *a:B u:Hi *a:Ho"),
        ({"prompt": "Hi", "completion": "Ho", "tools": '[{"name": "f"}]'}, "u:Hi *a:Ho tool:f"),
        ({"prompt": "Hi", "completion": "Ho", "tools": "[]", "history": [], "system": " "}, "u:Hi *a:Ho"),
        ({"system": "S", "conversations": [{"from": "system", "value": ""}, ASKED, SAID]}, "s:S u:Hi *a:Ho"),
        ({"history": [["A", "B"]], "messages": [{"role": "system", "content": "S"}, ASKED, SAID]},
         "s:S u:A *a:B u:Hi *a:Ho"),
        ({"conversation": [{"system": "S", "input": "Hi", "output": "Ho"}]}, "s:S u:Hi *a:Ho"),
    ],
)  # fmt: skip
def test_system_prompt_history_and_tools_are_kept_beside_every_shape(
    row: dict[str, object], becomes: str, tmp_path: Path
) -> None:
    samples, report = read(tmp_path, row)
    assert (samples, report.bad_count, report.ignored) == ([becomes], 0, ())


@pytest.mark.parametrize(
    "row",
    [
        {"system": "S", "messages": [{"role": "system", "content": "T"}, ASKED, SAID]},
        {"system": "S", "system_prompt": "T", "question": "Hi", "response": "Ho"},
    ],
)
def test_two_different_system_prompts_are_a_bad_row(row: dict[str, object], tmp_path: Path) -> None:
    _, report = read(tmp_path, row)
    assert "two different system prompts" in report.bad[0].reason


@pytest.mark.parametrize(
    ("row", "becomes"),
    [
        ({"prompt": [{"role": "system", "content": "S"}, ASKED], "chosen": [ASKED, SAID], "rejected": [ASKED, BAD]},
         "s:S u:Hi *a:Ho"),
        ({"messages": [ASKED, BAD, ASKED], "chosen": "Ho", "rejected": "No"}, "u:Hi a:Go away u:Hi *a:Ho"),
        ({"messages": [ASKED, SAID], "chosen": [ASKED, SAID], "rejected": [ASKED, BAD]}, "u:Hi *a:Ho"),
        ({"prompt": [ASKED], "chosen": [BAD, ASKED, SAID], "rejected": [BAD]}, "u:Hi a:Go away u:Hi *a:Ho"),
        ({"chosen": [ASKED, BAD, ASKED, SAID], "rejected": [ASKED, BAD]}, "u:Hi a:Go away u:Hi *a:Ho"),
        ({"prompt": "Hi", "chosen": json.dumps([ASKED, SAID]), "rejected": json.dumps([ASKED, BAD])}, "u:Hi *a:Ho"),
    ],
)  # fmt: skip
def test_of_preference_data_the_chosen_answer_is_learned_after_its_whole_context(
    row: dict[str, object], becomes: str, tmp_path: Path
) -> None:
    samples, report = read(tmp_path, row)
    assert (samples, report.rejected) == ([becomes], 1)


def test_turns_written_as_json_in_a_cell_are_turns_and_their_keys_are_named(tmp_path: Path) -> None:
    row = {"prompt": json.dumps([ASKED]), "completion": json.dumps([{**SAID, "weight": 1, "score": 3}])}
    samples, report = read(tmp_path, row, {"prompt": "List?", "completion": '[{"name": "f", "role": "admin"}]'})
    assert samples == ["u:Hi *a:Ho", 'List? *[{"name": "f", "role": "admin"}]']
    assert (report.obeyed, report.ignored) == (("completion[].weight",), ("completion[].score",))


@pytest.mark.parametrize("label", ["False", "false", 0, "0", False, "undesirable"])
def test_an_unwanted_answer_is_left_out_however_its_label_is_written(label: object, tmp_path: Path) -> None:
    samples, report = read(tmp_path, {"prompt": "2+2=", "completion": "5", "label": label})
    assert (samples, sum(report.left_out.values())) == ([], 1)


def test_a_label_that_is_no_mark_is_named_as_not_used(tmp_path: Path) -> None:
    samples, report = read(tmp_path, {"question": "Hi", "answer": "Ho", "label": "greeting"})
    assert (samples, report.ignored) == (["u:Hi *a:Ho"], ("label",))


def test_marks_of_pairs_are_obeyed_and_their_keys_used(tmp_path: Path) -> None:
    pairs = [{"input": "A", "output": "B", "output_with_loss": False}, {"human": "Hi", "assistant": "Ho"}]
    samples, report = read(tmp_path, {"conversation": pairs})
    assert (samples, report.ignored) == (["u:A a:B u:Hi *a:Ho"], ())
    assert report.obeyed == ("conversation[].output_with_loss",)


@pytest.mark.parametrize(
    "row",
    [
        {"data": ["Hi", ""]},
        {"data": [{"input": "Hi", "output": "Ho"}, {"input": "A", "output": "B"}]},
        {"conversations": ["", "Ho"]},
        {"instruction": "Hi", "output": "Ho", "history": [["A", " "]]},
        {"chosen": "\n\nHuman: Hi\n\nAssistant:", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Well?", "rejected": "x"},
        {"messages": [{"role": "user", "content": None}, SAID]},
        {"messages": [{"role": "user", "question": "Hi"}, SAID]},
        {"messages": [ASKED, {**SAID, "loss_mask": 0}]},
        {"messages": [ASKED, {**SAID, "tool_calls": [{"name": "f"}], "function_call": {"name": "g"}}]},
    ],
)
def test_empty_turns_rows_inside_of_a_row_other_masks_and_two_calls_are_bad_rows(
    row: dict[str, object], tmp_path: Path
) -> None:
    samples, report = read(tmp_path, row)
    assert (samples, report.bad_count) == ([], 1)


@pytest.mark.parametrize(
    ("row", "becomes"),
    [
        ({"instruction": "Who?", "context": "Ann came.", "output": "Ann"}, "u:Who?\n\nAnn came. *a:Ann"),
        ({"instruction": "Who?", "input": "Ann came.", "response": "Ann"}, "u:Who?\n\nAnn came. *a:Ann"),
        ({"context": "Ann came.", "query": "Who?", "response": "Ann"}, "u:Who?\n\nAnn came. *a:Ann"),
    ],
)
def test_what_a_question_is_about_stays_with_it(row: dict[str, object], becomes: str, tmp_path: Path) -> None:
    samples, report = read(tmp_path, row)
    assert (samples, report.ignored) == ([becomes], ())


def test_a_conversation_may_be_a_list_of_strings(tmp_path: Path) -> None:
    assert read(tmp_path, {"conversations": ["Hi", "Ho"], "source": "x"})[0] == ["u:Hi *a:Ho"]


def test_an_empty_weight_is_no_weight(tmp_path: Path) -> None:
    assert read(tmp_path, {"prompt": "2+2=", "completion": "4", "weight": ""})[0] == ["2+2= *4"]


def test_a_row_is_read_by_its_own_keys_whatever_stands_before_it(tmp_path: Path) -> None:
    chat: dict[str, object] = {"messages": [ASKED, SAID], "text": "rendered"}
    assert read(tmp_path, {"text": "Once."}, chat)[0] == ["*Once.", "u:Hi *a:Ho"]


def test_a_mapped_column_replaces_its_name_only_where_a_row_has_it(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"frage": "A", "antwort": "B", "prompt": "other", "completion": "other"},
        {"prompt": "C", "completion": "D"},
    ]
    samples, report = read(tmp_path, *rows, columns=("frage=prompt", "antwort=completion"))
    assert (samples, report.ignored) == (["A *B", "C *D"], ("completion", "prompt"))


def test_a_mapping_chooses_the_shape(tmp_path: Path) -> None:
    row: dict[str, object] = {"instruction": "A", "output": "B", "body": "Once."}
    samples, report = read(tmp_path, row, columns=("body=text",))
    assert (samples, report.ignored) == (["*Once."], ("instruction", "output"))
