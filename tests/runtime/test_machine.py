"""The machine as a process may use it: containers show all of it and give less."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from fedmoe.runtime import machine
from fedmoe.runtime.machine import ControlGroup, Memory, cpu_share, group_memory, own_groups, parse_limit

GIB = 1 << 30
ROOT = Path("/sys/fs/cgroup")


def test_the_groups_of_a_process_are_found_in_both_versions() -> None:
    def folders(controller: str, text: str) -> list[Path]:
        return [group.folder for group in own_groups(controller, text, ROOT)]

    own = "0::/system.slice/run.service\n"
    assert folders("memory", own) == [ROOT / "system.slice/run.service", ROOT / "system.slice", ROOT]
    version_1 = "4:cpu,cpuacct:/a\n3:memory:/docker/abc\nnonsense\n"
    assert folders("memory", version_1) == [ROOT / "memory/docker/abc", ROOT / "memory/docker", ROOT / "memory"]
    assert folders("cpu", version_1) == [ROOT / "cpu/a", ROOT / "cpu"]
    assert folders("memory", "0::/../other\n") == [ROOT]


@pytest.mark.parametrize(
    ("text", "limit"),
    [("max\n", None), ("9223372036854771712\n", None), ("", None), ("2147483648\n", 2 * GIB), ("-1", None)],
)
def test_a_file_of_a_group_says_its_limit_or_that_there_is_none(text: str, limit: int | None) -> None:
    assert parse_limit(text) == limit


def test_the_free_memory_of_a_group_counts_files_that_can_be_read_again(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    assert group_memory(ControlGroup(2, tmp_path)) == Memory(4 * GIB, 4 * GIB)
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    assert group_memory(ControlGroup(2, tmp_path)) == Memory(4 * GIB, GIB)
    (tmp_path / "memory.stat").write_text(
        f"anon {GIB}\ninactive_file {GIB}\nactive_file {GIB // 2}\nshmem {GIB // 2}\n"
    )
    assert group_memory(ControlGroup(2, tmp_path)) == Memory(4 * GIB, 4 * GIB - 3 * GIB // 2)
    (tmp_path / "memory.max").write_text("max\n")
    assert group_memory(ControlGroup(2, tmp_path)) is None


def test_the_free_memory_of_a_group_of_version_1(tmp_path: Path) -> None:
    (tmp_path / "memory.limit_in_bytes").write_text(f"{4 * GIB}\n")
    (tmp_path / "memory.usage_in_bytes").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}\n")
    assert group_memory(ControlGroup(1, tmp_path)) == Memory(4 * GIB, 3 * GIB)


def test_a_group_above_its_limit_has_nothing_free(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("100")
    (tmp_path / "memory.current").write_text("200")
    assert group_memory(ControlGroup(2, tmp_path)) == Memory(100, 0)


@pytest.mark.parametrize(
    ("text", "share"), [("150000 100000\n", 1.5), ("max 100000\n", None), ("", None), ("0 100000", None)]
)
def test_a_groups_share_of_the_cores(tmp_path: Path, text: str, share: float | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert cpu_share(ControlGroup(2, tmp_path)) == share


def test_a_groups_share_of_the_cores_in_version_1(tmp_path: Path) -> None:
    assert cpu_share(ControlGroup(1, tmp_path)) is None
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_share(ControlGroup(1, tmp_path)) is None
    (tmp_path / "cpu.cfs_quota_us").write_text("300000\n")
    assert cpu_share(ControlGroup(1, tmp_path)) == 3.0


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A container of 1 GiB and half a core inside a pod of 2 GiB; returns the pod's folder."""
    (tmp_path / "own").write_text("0::/pod/one\n")
    pod = tmp_path / "cgroup" / "pod"
    (pod / "one").mkdir(parents=True)
    (pod / "memory.max").write_text(str(2 * GIB))
    (pod / "one" / "memory.max").write_text(str(GIB))
    (pod / "one" / "cpu.max").write_text("50000 100000")
    monkeypatch.setattr(machine, "_OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    return pod


def test_a_process_sees_the_memory_and_cores_of_its_container(container: Path) -> None:
    found = machine.memory()
    assert found.total == GIB
    assert machine.available_memory() <= GIB
    assert machine.usable_cores() == 0.5
    # What the pod's other containers hold is not there for this one.
    (container / "memory.current").write_text(str(2 * GIB - GIB // 4))
    assert machine.memory().available <= GIB // 4
    assert machine.memory().percent >= 75.0


def test_without_a_limit_the_machines_memory_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_OWN_CGROUP", tmp_path / "none")
    found = machine.memory()
    assert found.total == psutil.virtual_memory().total
    assert 0 < found.available <= found.total
    assert machine.usable_cores() == len(machine.bound_cores())


def test_a_core_that_works_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Times:
        def __init__(self, user: float, idle: float) -> None:
            self._asdict = lambda: {"user": user, "idle": idle, "iowait": 1.0, "guest": user}

    looks = iter([[Times(0, 0), Times(0, 0), Times(5, 5)], [Times(1, 0), Times(0.25, 0.75), Times(6, 5)]])
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: next(looks))
    monkeypatch.setattr(machine, "bound_cores", lambda: {0, 1})
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert machine.busy_cores(0.1) == pytest.approx(1.25)


def test_the_machine_is_asked_for_its_memory_in_one_place() -> None:
    package = Path(machine.__file__).parent
    asking = [file.name for file in package.rglob("*.py") if "virtual_memory" in file.read_text()]
    assert asking == ["machine.py"]
