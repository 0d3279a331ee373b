"""Checkpoints (E13, E20): whole or not there, exact, compressed, pruned."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoint_states import LAYOUT, NOON, adapter, assert_same, saved, state
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from fedmoe.arena.run.adapter_files import CheckpointError
from fedmoe.arena.run.checkpoint import (
    ArenaState,
    checkpoints,
    clean,
    config_digest,
    load,
    load_newest,
    prune,
    save,
)
from fedmoe.lora.adapter import Adapter, FloatArray
from fedmoe.lora.formats import read_peft


def test_a_checkpoint_gives_back_everything_bit_for_bit(tmp_path: Path) -> None:
    path = saved(tmp_path / "checkpoints")
    assert path.name == "checkpoint_20260131_120000"
    assert_same(load(path), state())


def test_it_holds_the_specified_files_e13(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"done": false}')
    (tmp_path / "training.log").write_text("line\n" * 1000)
    names = {"results.json": tmp_path / "results.json", "logs/training.log": tmp_path / "training.log"}
    path = saved(tmp_path / "checkpoints", copies=names)
    assert json.loads((path / "config.json").read_text()) == {"task": "reasoning:chain_sum", "seed": 7}
    assert json.loads((path / "performance_metrics.json").read_text()) == {"reward": {"solver": 0.5}}
    assert gzip.decompress((path / "results.json.gz").read_bytes()) == b'{"done": false}'
    assert gzip.decompress((path / "logs" / "training.log.gz").read_bytes()) == b"line\n" * 1000
    listed = json.loads((path / "manifest.json").read_text())["files"]
    found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert found == {*listed, "manifest.json"}


def test_logs_and_json_are_compressed_e20(tmp_path: Path) -> None:
    log = tmp_path / "training.log"
    log.write_text("".join(f"iteration {n}: reward {n / 7:.3f}\n" for n in range(3000)))
    path = saved(tmp_path / "checkpoints", copies={"logs/training.log": log})
    assert (path / "logs" / "training.log.gz").stat().st_size < log.stat().st_size / 2


def test_a_log_that_is_not_there_is_left_out_with_a_line(tmp_path: Path) -> None:
    with capture_logs() as lines:
        path = saved(tmp_path / "checkpoints", copies={"logs/training.log": tmp_path / "missing.log"})
    assert [line["event"] for line in lines] == ["checkpoint_copy_left_out"]
    assert_same(load(path), state())


def test_the_newest_version_of_every_policy_is_a_peft_folder(tmp_path: Path) -> None:
    adapters = {"solver@9": adapter(1), "solver@10": adapter(2), "critic@3": adapter(3)}
    path = save(tmp_path, ArenaState(1, {}, adapters=adapters), metrics={}, base_model="org/base", now=NOON, copies={})
    for name, seed in (("solver", 2), ("critic", 3)):
        files = {file.name: file.read_bytes() for file in (path / "adapters" / name).iterdir()}
        assert files.keys() == {"adapter_model.safetensors", "adapter_config.json"}
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
        read = read_peft(files)
        for (_, a, b), (_, own_a, own_b) in zip(read.factors(), adapter(seed).factors(), strict=True):
            np.testing.assert_array_equal(a, own_a)
            np.testing.assert_array_equal(b * np.float32(read.scale), own_b * np.float32(2))
    packed = {file.name for file in (path / "adapters").iterdir() if file.is_file()}
    assert packed == {"solver@9.safetensors"}


@pytest.mark.parametrize("alpha", [2.0, 4.0, 1.0, 3.0, 16 / 3, 1e-3, 1e30])
def test_adapters_are_exact_whatever_their_scale_and_rank(alpha: float, tmp_path: Path) -> None:
    mixed = {"a@1": adapter(1, alpha), "a@2": adapter(2, alpha), "b@1": adapter(3, alpha, LAYOUT.with_rank(3))}
    kept = ArenaState(5, {}, adapters=mixed)
    assert_same(load(save(tmp_path, kept, metrics={}, base_model="base", now=NOON, copies={})), kept)


def test_subnormal_and_large_numbers_survive_the_scale(tmp_path: Path) -> None:
    flat = np.full(LAYOUT.size, 3e38, np.float32)
    flat[::2] = np.float32(1e-45)
    for index, alpha in enumerate((0.5, 8.0)):
        kept = ArenaState(1, {}, adapters={"a@1": Adapter(LAYOUT, alpha, flat)})
        with np.errstate(over="ignore"):
            path = save(tmp_path / str(index), kept, metrics={}, base_model="base", now=NOON, copies={})
        assert_same(load(path), kept)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (ArenaState(1, {}, state={"a": {"b": [1, object()]}}), r"state\.a\.b\[1\] is of type object"),
        (ArenaState(1, {}, state={"a": {1: 2}}), r"state\.a has the key 1"),
        (ArenaState(1, {"path": Path("x")}), r"config\.path is of type"),
        (ArenaState(1, {}, adapters={"solver": adapter(1)}), "NAME@VERSION, got the key 'solver'"),
        (ArenaState(1, {}, adapters={"../solver@1": adapter(1)}), "NAME@VERSION"),
        (ArenaState(1, {}, arrays={"../m": np.ones(2, np.float32)}), r"array '\.\./m'"),
        (ArenaState(1, {}, arrays={"a/../../m": np.ones(2, np.float32)}), "plain names"),
        (ArenaState(1, {}, arrays={"m": np.ones(2)}), "float64"),  # type: ignore[dict-item]
    ],
)
def test_a_state_that_would_not_come_back_is_refused_and_nothing_is_left(
    bad: ArenaState, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, bad, metrics={}, base_model="base", now=NOON, copies={})
    assert list(tmp_path.iterdir()) == []


def test_a_taken_name_gets_the_next_second_and_a_clock_set_back_changes_no_order(tmp_path: Path) -> None:
    times = [NOON, NOON, NOON + 0.9, NOON - 3600, NOON + 60]
    names = [saved(tmp_path, n, now).name for n, now in enumerate(times)]
    assert [name[-6:] for name in names] == ["120000", "120001", "120002", "120003", "120100"]
    assert [path.name for path in checkpoints(tmp_path)] == names


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("checkpoint_20261399_000000", "checkpoint_2026131_120000", "notes", ".checkpoint_20260131_120000-ab"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint_20260131_120000").write_text("a file")
    assert checkpoints(tmp_path) == []
    assert checkpoints(tmp_path / "missing") == []
    assert load_newest(tmp_path) is None


def every_file(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def test_damage_of_any_file_is_found_and_the_checkpoint_before_is_taken(tmp_path: Path) -> None:
    log = tmp_path / "training.log"
    log.write_text("text")
    folder = tmp_path / "checkpoints"
    good = saved(folder, 1)
    bad = saved(folder, 2, copies={"logs/training.log": log})
    files = every_file(bad)
    assert len(files) == 11
    for name in files:
        original = (bad / name).read_bytes()
        for damaged in (original[:-2], bytes([original[0] ^ 1]) + original[1:], b"", None):
            (bad / name).unlink()
            if damaged is not None:
                (bad / name).write_bytes(damaged)
            with capture_logs() as lines:
                newest = load_newest(folder)
            assert newest is not None
            assert newest.path == good
            assert_same(newest.state, state(1))
            assert [(line["event"], line["name"]) for line in lines] == [("checkpoint_skipped", bad.name)]
            assert name.rpartition("/")[2] in lines[0]["reason"]
        (bad / name).write_bytes(original)
    newest = load_newest(folder)
    assert newest is not None
    assert newest.path == bad


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_in_the_manifest_never_changes_what_is_loaded(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = saved(tmp_path_factory.mktemp("run"))
    manifest = bytearray((path / "manifest.json").read_bytes())
    bit = data.draw(st.integers(0, len(manifest) * 8 - 1))
    manifest[bit // 8] ^= 1 << bit % 8
    (path / "manifest.json").write_bytes(manifest)
    try:
        assert_same(load(path), state())
    except CheckpointError:
        return


def test_when_no_checkpoint_is_whole_it_says_so_instead_of_starting_afresh(tmp_path: Path) -> None:
    for iteration in (1, 2):
        (saved(tmp_path, iteration) / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole: checkpoint_.*_120001: config.json is da"):
        load_newest(tmp_path)


def test_a_checkpoint_of_another_format_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text()) | {"format": 2}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="has format 2, this version reads 1"):
        load(path)


def test_pruning_keeps_the_newest_and_the_one_in_use_e20(tmp_path: Path) -> None:
    paths = [saved(tmp_path, n) for n in range(5)]
    assert prune(tmp_path, 2, in_use=paths[1]) == [paths[0], paths[2]]
    assert checkpoints(tmp_path) == [paths[1], paths[3], paths[4]]
    assert prune(tmp_path, 2, in_use=paths[4]) == [paths[1]]
    assert prune(tmp_path, 7, in_use=paths[4]) == []


def test_cleaning_removes_what_killed_saves_left_and_nothing_else(tmp_path: Path) -> None:
    path = saved(tmp_path)
    shutil.copytree(path, tmp_path / f".{path.name}-0a1b2c3d")
    (tmp_path / ".notes").mkdir()
    clean(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".notes", path.name]
    clean(tmp_path / "missing")


def test_a_full_disk_stops_the_save_before_it_begins_e24(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 20))
    with pytest.raises(OSError, match="delete old checkpoints"):
        saved(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_leaves_the_one_before_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1)
    calls = 0

    def sync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, 2)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 1
    found = load_newest(tmp_path)
    assert found is not None
    assert_same(found.state, state(1))


def test_every_file_and_folder_is_durable_before_the_name_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    rename = Path.rename
    real = os.fsync

    def sync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    def renamed(source: Path, target: Path) -> Path:
        inside = [source, *source.rglob("*")]
        assert {str(path.resolve()) for path in inside} <= set(synced)
        synced.clear()
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", renamed)
    saved(tmp_path)
    assert synced == [str(tmp_path.resolve())]


def test_only_the_owner_can_read_a_checkpoint(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert path.stat().st_mode & 0o077 == 0
    assert all((path / name).stat().st_mode & 0o077 == 0 for name in every_file(path))


def test_the_digest_of_a_configuration_knows_no_order_but_every_value() -> None:
    digest = config_digest({"a": 1, "b": {"c": 2, "d": 3}})
    assert digest == config_digest({"b": {"d": 3, "c": 2}, "a": 1})
    assert digest != config_digest({"a": 1, "b": {"c": 2, "d": 4}})


def test_a_state_says_how_much_room_it_needs(tmp_path: Path) -> None:
    values = ArenaState(1, {}, arrays={"m": big()}, adapters={"a@1": adapter(1)})
    path = save(tmp_path, values, metrics={}, base_model="base", now=NOON, copies={})
    taken = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert values.size == big().nbytes + 4 * LAYOUT.size
    assert 0.5 * values.size < taken < values.size


def big() -> FloatArray:
    return np.random.default_rng(5).normal(size=50_000).astype(np.float32)
