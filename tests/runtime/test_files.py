import os
from pathlib import Path

import pytest

from fedmoe.runtime.files import FolderInUseError, fsync_files, lock_folder, write_atomic, write_folder_atomic


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_file_is_replaced_whole_and_for_the_user_only(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_atomic(file, b"old")
    write_atomic(file, b"new")
    assert file.read_bytes() == b"new"
    assert file.stat().st_mode & 0o777 == 0o600
    write_atomic(tmp_path / "b", b"", mode=0o644)
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o644
    assert names(tmp_path) == ["a.json", "b"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomic(tmp_path / "a", b"old")

    def fail(*arguments: object) -> None:
        raise OSError("disk error")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="disk error"):
        write_atomic(tmp_path / "a", b"new")
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_file_is_durable_before_it_has_its_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def noted_replace(old: Path, new: Path) -> None:
        order.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_atomic(tmp_path / "a", b"data")
    assert order == ["file", "rename", "folder"]


def test_a_folder_is_written_complete(tmp_path: Path) -> None:
    write_folder_atomic(tmp_path / "new" / "adapter", {"a": b"1", "b": b"2"})
    assert names(tmp_path / "new") == ["adapter"]
    assert (tmp_path / "new" / "adapter" / "b").read_bytes() == b"2"


def test_an_existing_folder_or_file_is_replaced_only_with_force(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    for make in (lambda: target.mkdir(), lambda: target.write_bytes(b"file")):
        make()
        with pytest.raises(FileExistsError, match="--force"):
            write_folder_atomic(target, {"a": b"1"})
        write_folder_atomic(target, {"a": b"1"}, force=True)
        assert names(target) == ["a"]
        assert names(tmp_path) == ["adapter"]
        (target / "a").unlink()
        target.rmdir()


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder_atomic(tmp_path / "adapter", {"old": b"1"})
    rename, calls = os.rename, list[str]()

    def fail_second(old: Path, new: Path) -> None:
        calls.append(str(new))
        if len(calls) == 2:
            raise OSError("disk error")
        rename(old, new)

    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(OSError, match="disk error"):
        write_folder_atomic(tmp_path / "adapter", {"new": b"2"}, force=True)
    monkeypatch.undo()
    assert names(tmp_path / "adapter") == ["old"]
    assert names(tmp_path) == ["adapter"]


def test_a_folder_with_a_file_that_fails_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_folder_atomic(tmp_path / "adapter", {"a": b"1", "no/such/folder": b"2"})
    assert names(tmp_path) == []


def test_files_of_a_folder_are_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(b"1")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    fsync_files(tmp_path)
    assert len(synced) == 3


def test_a_folder_has_one_owner_at_a_time(tmp_path: Path) -> None:
    lock = lock_folder(tmp_path)
    with pytest.raises(FolderInUseError, match=f"process with id {os.getpid()}") as caught:
        lock_folder(tmp_path)
    assert caught.value.holder == str(os.getpid())
    lock.close()
    lock_folder(tmp_path).close()
