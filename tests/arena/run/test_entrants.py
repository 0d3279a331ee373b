"""Players of a tournament as they are read from runs and pools, and which of them may meet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.run import checkpoint
from fedmoe.arena.run.adapter_files import CheckpointError
from fedmoe.arena.run.checkpoint import ArenaState
from fedmoe.arena.run.entrants import EntrantError, read_field
from fedmoe.lora.adapter import Adapter, Layout, ModuleShape
from fedmoe.lora.formats import peft_files

LAYOUT = Layout((ModuleShape("q_proj", 4, 3),), 2)


def made_adapter(value: float) -> Adapter:
    return Adapter(LAYOUT, 2.0, np.full(LAYOUT.size, value, np.float32))


def made_run(
    folder: Path,
    base: str = "tiny",
    task: str = "committee:products",
    terms: int = 1,
    versions: tuple[int, ...] = (3,),
    chat_template: str | None = None,
) -> Path:
    """A run whose checkpoints hold ann and bob at these versions, and an older champion."""
    config = ArenaConfig.model_validate(
        {
            "base_model": base,
            "chat_template": chat_template,
            "task": {"name": task, "options": {"min_digits": terms, "max_digits": terms}},
        }
    )
    for version in versions:
        adapters = {f"{name}@{version}": made_adapter(version + place) for place, name in enumerate(("ann", "bob"))}
        state = ArenaState(
            version,
            config.model_dump(mode="json"),
            {"policies": {name: {"version": version} for name in ("ann", "bob")}},
            adapters=adapters | {"ann@1": made_adapter(0.5)},
        )
        checkpoint.save(folder / "checkpoints", state, metrics={}, base_model=base, now=1e9 + version, copies={})
    return folder


def made_peft(folder: Path, base: str = "tiny", value: float = 9.0) -> Path:
    folder.mkdir(parents=True)
    for name, data in peft_files(made_adapter(value), base).items():
        (folder / name).write_bytes(data)
    return folder


def names(*runs: Path, pools: tuple[Path, ...] = ()) -> list[str]:
    return [one.shown for one in read_field(runs, pools).entrants]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_enters_its_newest_policies_and_nothing_in_it_changes(tmp_path: Path) -> None:
    run = made_run(tmp_path / "one", versions=(3, 5))
    before = files(run)
    assert names(run) == ["ann@5", "bob@5"]
    assert read_field([run]).entrants[1].adapter.flat.tolist() == made_adapter(6.0).flat.tolist()
    assert files(run) == before


def test_an_older_checkpoint_enters_when_it_is_named(tmp_path: Path) -> None:
    run = made_run(tmp_path / "one", versions=(3, 5))
    older = checkpoint.checkpoints(run / "checkpoints")[0]
    assert names(run, older) == ["one/ann@5", "one/bob@5", f"{older.name}/ann@3", f"{older.name}/bob@3"]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    one, other = made_run(tmp_path / "a" / "run"), made_run(tmp_path / "b" / "run")
    assert names(one, other)[::2] == [f"{one}/ann@3", f"{other}/ann@3"]


def test_a_pool_is_a_folder_of_adapters_one_adapter_or_a_run(tmp_path: Path) -> None:
    run, other = made_run(tmp_path / "one"), made_run(tmp_path / "two")
    made_peft(tmp_path / "pool" / "zoe")
    made_peft(tmp_path / "pool" / "abe")
    (tmp_path / "pool" / "notes").mkdir()
    assert names(run, pools=(tmp_path / "pool",))[2:] == ["pool/abe", "pool/zoe"]
    assert names(run, pools=(tmp_path / "pool" / "abe",))[2:] == ["abe"]
    assert names(run, pools=(other,))[2:] == ["two/ann@3", "two/bob@3"]


def test_runs_of_different_base_models_or_tasks_are_refused_with_both_values(tmp_path: Path) -> None:
    one = made_run(tmp_path / "one")
    with pytest.raises(EntrantError, match=r"different base models.*one has tiny, .*base has smollm2"):
        read_field([one, made_run(tmp_path / "base", base="smollm2")])
    with pytest.raises(EntrantError, match=r"one has committee:products \(.*task has reasoning:products"):
        read_field([one], [made_run(tmp_path / "task", task="reasoning:products")])
    with pytest.raises(EntrantError, match=r"different tasks.*max_digits = 1, .*digits has .*max_digits = 2"):
        read_field([one, made_run(tmp_path / "digits", terms=2)])


def test_runs_that_put_questions_into_different_templates_are_refused(tmp_path: Path) -> None:
    one, other = made_run(tmp_path / "one"), made_run(tmp_path / "two", chat_template="own.jinja")
    with pytest.raises(EntrantError, match=r"different chat templates.*two has own.jinja with"):
        read_field([one, other])


def test_an_adapter_for_another_base_model_is_refused_with_both_names(tmp_path: Path) -> None:
    field = read_field([made_run(tmp_path / "one")], [made_peft(tmp_path / "strange", base="owner/other")])
    field.check_base(["tiny", "owner/other"])
    with pytest.raises(EntrantError, match=r"strange is for the base model owner/other, the runs have tiny"):
        field.check_base(["tiny"])


def test_what_is_no_player_is_refused_with_what_would_do(tmp_path: Path) -> None:
    run, empty = made_run(tmp_path / "one"), tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(EntrantError, match=r"empty holds no checkpoint of a run; adapters from elsewhere go to --pool"):
        read_field([empty])
    with pytest.raises(EntrantError, match=r"empty is no run, no PEFT folder \(adapter_config.json\) and holds none"):
        read_field([run], [empty])
    with pytest.raises(EntrantError, match="one is given twice"):
        read_field([run], [tmp_path / "empty" / ".." / "one"])
    broken = made_peft(tmp_path / "broken")
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(EntrantError, match=r"broken cannot be read as an adapter: .*not JSON"):
        read_field([run], [broken])


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    run = made_run(tmp_path / "one")
    (checkpoint.checkpoints(run / "checkpoints")[0] / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        read_field([run])
