"""Where a run lies (E17) and computes (E18), and that it stops before a disk is full (E24)."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.runtime.placement import (
    Mount,
    PlacementError,
    check_file_system,
    make_temporary,
    mount_of,
    parse_mounts,
    place,
    plan_devices,
    read_mounts,
    remove_temporary,
    require_space,
)

MOUNTINFO = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
40 27 0:50 / /home rw,relatime shared:1 master:2 - nfs4 server:/export/home rw,vers=4.2
41 40 254:1 / /home/local\\040disk rw - xfs /dev/vdb rw
a line of another form
"""


def network(kind: str, source: str) -> bool:
    return Mount("/data", kind, source).network


def test_mountinfo_is_read_with_optional_fields_and_escaped_names() -> None:
    assert parse_mounts(MOUNTINFO) == [
        Mount("/proc", "proc", "proc"),
        Mount("/", "ext4", "/dev/vda"),
        Mount("/home", "nfs4", "server:/export/home"),
        Mount("/home/local disk", "xfs", "/dev/vdb"),
    ]


@pytest.mark.parametrize(
    ("path", "point"),
    [
        ("/", "/"),
        ("/runs/one", "/"),
        ("/homework/run", "/"),
        ("/home", "/home"),
        ("/home/me/run", "/home"),
        ("/home/local disk/run", "/home/local disk"),
    ],
)
def test_a_path_lies_on_the_longest_mounted_prefix_by_whole_names(path: str, point: str) -> None:
    found = mount_of(path, parse_mounts(MOUNTINFO))
    assert found is not None
    assert found.point == point


def test_of_two_mounts_at_one_place_the_later_one_covers_the_earlier() -> None:
    mounts = [Mount("/", "ext4", "a"), Mount("/data", "ext4", "b"), Mount("/data", "nfs", "c:/d")]
    assert mount_of("/data/run", mounts) == mounts[2]
    assert mount_of("/data/run", []) is None


@given(st.lists(st.text("ab/ ", max_size=6), max_size=6), st.text("ab/", max_size=8))
def test_a_deeper_mount_never_loses_to_a_shallower_one(points: list[str], path: str) -> None:
    mounts = [Mount(os.path.normpath(f"/{point}"), "ext4", "x") for point in points]
    found = mount_of(os.path.normpath(f"/{path}"), mounts)
    parents = {os.path.normpath(f"/{path}"), *map(str, Path(os.path.normpath(f"/{path}")).parents)}
    covering = [mount for mount in mounts if mount.point in parents]
    assert (found is None) == (not covering)
    assert found is None or len(found.point) == max(len(mount.point) for mount in covering)


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("nfs", "server:/share"),
        ("nfs4", "10.0.0.1:/share"),
        ("nfs", "0123-abc.cn-hangzhou.nas.aliyuncs.com:/"),
        ("fuse.aliyun-alinas-efc", "0123-abc.cn-hangzhou.nas.aliyuncs.com:/"),
        ("cifs", "//server/share"),
        ("smb3", "//server/share"),
        ("fuse.sshfs", "me@host:/home/me"),
        ("fuse.unknown", "me@host:/home/me"),
        ("fuse", "s3://bucket"),
        ("9p", "share"),
        ("fuse.glusterfs", "server:/volume"),
        ("NFS", "server:/share"),
    ],
)
def test_network_file_systems_are_known(kind: str, source: str) -> None:
    assert network(kind, source)


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        *(("ext4", "/dev/vda"), ("xfs", "/dev/nvme0n1"), ("btrfs", "/dev/sda"), ("overlay", "overlay")),
        *(("tmpfs", "tmpfs"), ("zfs", "tank/home"), ("fuseblk", "/dev/sda1"), ("fuse.mergerfs", "/a:/b")),
        *(("gpfs", "cpfs01"), ("cpfs", "fs"), ("lustre", "10.0.0.1@tcp:/fs"), ("ceph", "10.0.0.1:/")),
        ("nfs", "cpfs-0123.cn-wulanchabu.cpfs.aliyuncs.com:/share"),
        ("cpfs-nfs", "127.0.1.255:/share"),
        ("nfs", "127.0.1.255:/share"),
        ("fuse.aliyun-alinas-efc", "cpfs-0123-vpc.cn-beijing.cpfs.aliyuncs.com:/"),
    ],
)
def test_local_disks_and_cpfs_are_not_refused_e17(kind: str, source: str) -> None:
    assert not network(kind, source)


def test_a_server_whose_name_only_contains_the_letters_of_cpfs_is_refused() -> None:
    assert network("nfs", "mycpfsbackup:/share")


def test_a_run_folder_on_nas_is_refused_with_the_reason_and_the_way_out_e17() -> None:
    mounts = parse_mounts(MOUNTINFO)
    with pytest.raises(PlacementError, match=r"network file system nfs4 \(server:.*local disk.*--allow-network-fs"):
        check_file_system(Path("/home/not/there/yet"), mounts=mounts)
    allowed = check_file_system(Path("/home/not/there/yet"), allow_network=True, mounts=mounts)
    assert allowed == mounts[2]
    assert check_file_system(Path("/runs"), mounts=mounts) == mounts[1]


def test_a_link_is_judged_by_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    mounts = [Mount("/", "ext4", "a"), Mount(str((tmp_path / "real").resolve()), "nfs", "b:/c")]
    with pytest.raises(PlacementError):
        check_file_system(tmp_path / "link" / "run", mounts=mounts)


def test_this_machine_says_what_the_test_folder_lies_on(tmp_path: Path) -> None:
    mounts = read_mounts()
    found = mount_of(str(tmp_path.resolve()), mounts)
    assert found is not None
    assert found in mounts


def test_what_does_not_fit_is_refused_before_it_is_written_e24(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=200 << 20))
    assert require_space(tmp_path, 100 << 20, reserve=100 << 20) == 200 << 20
    with pytest.raises(OSError, match=r"no space for 101 MiB .*200 MiB are free; delete old checkpoints") as caught:
        require_space(tmp_path, 101 << 20, reserve=100 << 20)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path)


def test_the_temporary_folder_lies_in_the_run_folder_and_starts_empty_e17(tmp_path: Path) -> None:
    folder = make_temporary(tmp_path / "run")
    assert folder == tmp_path / "run" / "tmp"
    (folder / "left" / "over").mkdir(parents=True)
    assert list(make_temporary(tmp_path / "run").iterdir()) == []
    remove_temporary(tmp_path / "run")
    remove_temporary(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_link_in_place_of_the_temporary_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    (tmp_path / "tmp").symlink_to(tmp_path / "precious")
    make_temporary(tmp_path)
    assert (tmp_path / "precious" / "file").read_text() == "kept"
    assert not (tmp_path / "tmp").is_symlink()


@pytest.mark.parametrize(
    ("count", "rollout", "learner", "expected"),
    [
        (0, "auto", "auto", ("cpu", "cpu")),
        (1, "auto", "auto", ("cuda:0", "cuda:0")),
        (2, "auto", "auto", ("cuda:1", "cuda:0")),
        (8, "auto", "auto", ("cuda:1", "cuda:0")),
        (2, "auto", "cuda:1", ("cuda:0", "cuda:1")),
        (2, "auto", "cuda", ("cuda:1", "cuda")),
        (2, "cuda:0", "auto", ("cuda:0", "cuda:1")),
        (1, "cuda:0", "auto", ("cuda:0", "cuda:0")),
        (1, "cpu", "auto", ("cpu", "cuda:0")),
        (0, "auto", "cpu", ("cpu", "cpu")),
        (4, "cuda:3", "cuda:2", ("cuda:3", "cuda:2")),
    ],
)
def test_two_gpus_work_side_by_side_one_does_both_none_means_cpu_e18(
    count: int, rollout: str, learner: str, expected: tuple[str, str]
) -> None:
    *devices, plan = plan_devices(count, "cpu", rollout, learner)
    assert tuple(devices) == expected
    assert f"rollouts on {expected[0]}, learning on {expected[1]}" in plan


def test_the_plan_says_what_was_found() -> None:
    found = [plan_devices(count, "cpu")[2].partition("; ")[2] for count in range(3)]
    assert found == ["no CUDA device found", "1 CUDA device found", "2 CUDA devices found"]
    assert plan_devices(0, "mps")[2] == "rollouts on mps, learning on mps; no CUDA device found"


def test_without_a_gpu_everything_runs_on_the_cpu_and_a_named_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fedmoe.runtime.device import DeviceError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    rollout, learner, plan = place()
    assert (rollout.type, learner.type) == ("cpu", "cpu")
    assert plan == "rollouts on cpu, learning on cpu; no CUDA device found"
    with pytest.raises(DeviceError, match="cuda:1 was asked for"):
        place(rollout="cuda:1")
