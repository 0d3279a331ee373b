from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import registered

from fedmoe.runtime.placement import Mount
from fedmoe.server.storage.blobs import StorageFailedError, put
from fedmoe.server.storage.state_dir import StateDir, StateDirError

OPEN_AND_WAIT = (
    "import sys; from pathlib import Path; from fedmoe.server.storage.state_dir import StateDir\n"
    "state = StateDir.open(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
)


def test_what_was_kept_is_there_after_reopening(tmp_path: Path) -> None:
    state = StateDir.open(tmp_path / "deep" / "state")
    state.journal.append([registered()])
    digest = put(state.blobs, b"bytes")
    state.close()
    again = StateDir.open(tmp_path / "deep" / "state")
    assert list(again.journal.events()) == [registered()]
    assert again.blobs.read(digest) == b"bytes"
    again.close()


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    state = StateDir.open(tmp_path / "state")
    state.journal.append([registered()])
    put(state.blobs, b"bytes")
    modes = {str(path): path.stat().st_mode & 0o077 for path in (tmp_path / "state").rglob("*")}
    state.close()
    assert set(modes.values()) == {0}, modes


def test_a_second_process_is_refused_naming_the_first(tmp_path: Path) -> None:
    path = tmp_path / "state"
    holder = subprocess.Popen(
        [sys.executable, "-c", OPEN_AND_WAIT, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(
            StateDirError, match=rf"in use by the coordinator with process id {holder.pid};.*--state-dir"
        ):
            StateDir.open(path)
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    StateDir.open(path).close()  # a killed owner leaves no lock behind


def test_a_state_dir_that_cannot_be_opened_is_not_left_locked(tmp_path: Path) -> None:
    path = tmp_path / "state"
    StateDir.open(path).close()
    good = (path / "journal.sqlite").read_bytes()
    (path / "journal.sqlite").write_bytes(b"not a database" * 100)
    for _ in range(2):
        with pytest.raises(StorageFailedError, match="not a database"):
            StateDir.open(path)
    (path / "journal.sqlite").write_bytes(good)
    StateDir.open(path).close()


def test_a_world_writable_state_dir_is_refused(tmp_path: Path) -> None:
    """12"""
    path = tmp_path / "state"
    path.mkdir()
    path.chmod(0o777)
    with pytest.raises(StateDirError, match=rf"chmod 700 {re.escape(str(path))}"):
        StateDir.open(path)


@pytest.fixture
def somebody() -> Iterator[None]:
    """Somebody who is not root, who may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    nobody = 65534
    os.setresuid(nobody, nobody, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "state").mkdir(mode=0o500)
        yield folder


def test_a_read_only_state_dir_or_one_of_somebody_else_is_refused(open_folder: Path, somebody: None) -> None:
    """12: for root's tests it is another owner's, for all others it is read-only."""
    with pytest.raises(StateDirError, match=r"not writable for this user; fix its owner or choose another --state-dir"):
        StateDir.open(open_folder / "state")


def test_a_file_in_the_state_dirs_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(StateDirError, match=r"cannot create.*--state-dir"):
        StateDir.open(tmp_path / "state")


def test_a_file_in_the_blobs_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "blobs").write_text("a file")
    with pytest.raises(StateDirError, match="blobs"):
        StateDir.open(tmp_path / "state")


@pytest.mark.parametrize(
    ("kind", "source"), [("nfs4", "server:/home"), ("cifs", "//server/share"), ("fuse.sshfs", "a:/b")]
)
def test_a_state_dir_on_a_network_file_system_is_refused_before_anything_is_written_73(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, source: str
) -> None:
    mounts = [Mount("/", "ext4", "/dev/vda"), Mount(str(tmp_path.resolve()), kind, source)]
    monkeypatch.setattr("fedmoe.server.storage.state_dir.read_mounts", lambda: mounts)
    path = tmp_path / "state"
    with pytest.raises(StateDirError, match=rf"network file system {kind} .*--allow-network-fs"):
        StateDir.open(path)
    assert not path.exists()
    StateDir.open(path, allow_network_fs=True).close()


def test_a_parallel_file_system_is_none_of_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmoe.server.storage.state_dir.read_mounts", lambda: [Mount("/", "lustre", "a@tcp:/scratch")])
    StateDir.open(tmp_path / "state").close()
