"""Where a run writes and computes: refuses network file systems and full disks; temporary folder, CUDA devices."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from fedmoe.runtime.errors import ExpectedError

if TYPE_CHECKING:
    import torch


import re
from pathlib import PurePosixPath

import psutil

#: Types of network file systems (NAS): fsync, rename and locks on them do not hold what a crash needs of them.
NETWORK_TYPES = frozenset(
    {
        *("nfs", "nfs3", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "9p", "afs", "afpfs", "davfs", "glusterfs"),
        *("sshfs", "davfs2", "s3fs", "ossfs", "goofys", "gcsfuse", "blobfuse", "blobfuse2", "rclone", "mountpoint-s3"),
        *("alinas", "aliyun-alinas-efc"),
    }
)
#: Parallel file systems that keep what they promise (CPFS is mounted as one of them), never refused.
PARALLEL_TYPES = frozenset({"cpfs", "cpfs-nfs", "gpfs", "lustre", "beegfs", "ceph", "wekafs", "pvfs2", "ocfs2", "gfs2"})
#: FUSE programs that name a bucket or a server as their source, whatever they call themselves.
_REMOTE_SOURCE = re.compile(r"^([\w.@-]+:/|//|https?://|s3://|oss://|gs://)")
#: CPFS over NFS or EFC says so in the name of its server; its client maps that to the address 127.0.1.255.
_CPFS = re.compile(r"\bcpfs\b|^127\.0\.1\.255:", re.IGNORECASE)
_MOUNTS = Path("/proc/self/mountinfo")
_RESERVE_BYTES = 64 << 20
_TEMPORARY = "tmp"
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted file system: where, of which type, from what."""

    point: str
    kind: str
    source: str

    @property
    def network(self) -> bool:
        """Whether it is a network file system to stay off; CPFS and other parallel file systems are not."""
        names = {self.kind.lower(), self.kind.lower().removeprefix("fuse.")}
        if names & PARALLEL_TYPES or _CPFS.search(self.source):
            return False
        if names & NETWORK_TYPES:
            return True
        return self.kind.startswith("fuse") and _REMOTE_SOURCE.match(self.source) is not None


def parse_mounts(mountinfo: str) -> list[Mount]:
    """The mounts in the text of /proc/self/mountinfo, in its order; lines of another form are left out.

    Format: https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html
    """
    mounts = []
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        left, right = before.split(" "), after.split(" ")
        if separator and len(left) >= 6 and len(right) >= 2:
            mounts.append(Mount(_unescaped(left[4]), right[0], _unescaped(right[1])))
    return mounts


def _unescaped(text: str) -> str:
    """The kernel writes space, tab, newline and backslash in names as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def mount_of(path: str, mounts: Sequence[Mount]) -> Mount | None:
    """The mount that an absolute path without links lies on: the longest prefix, of equal ones the last mounted."""
    covering = [mount for mount in reversed(mounts) if PurePosixPath(path).is_relative_to(mount.point)]
    return max(covering, key=lambda mount: len(mount.point), default=None)


def read_mounts() -> list[Mount]:
    """What is mounted for this process."""
    if _MOUNTS.is_file():
        return parse_mounts(_MOUNTS.read_text("utf-8", "surrogateescape"))
    return [Mount(part.mountpoint, part.fstype, part.device) for part in psutil.disk_partitions(all=True)]


class PlacementError(ExpectedError, RuntimeError):
    """A folder, disk or device that a run cannot use; says why and what to do."""


def check_file_system(folder: Path, allow_network: bool = False, mounts: Sequence[Mount] | None = None) -> Mount | None:
    """Refuse a run folder on a network file system with PlacementError; returns the mount it lies on, if known.

    The folder need not exist yet. With `allow_network` it is only a warning in the log.
    """
    mount = mount_of(str(folder.resolve()), read_mounts() if mounts is None else mounts)
    if mount is None or not mount.network:
        return mount
    place = f"{folder} lies on the network file system {mount.kind} ({mount.source} at {mount.point})"
    if not allow_network:
        raise PlacementError(
            f"{place}; checkpoints there may be lost in a crash and many small writes are slow. "
            "Choose a folder on a local disk or CPFS, or pass --allow-network-fs to use it all the same"
        )
    _log.warning("network_file_system", folder=str(folder), type=mount.kind, mount=mount.point)
    return mount


def require_space(folder: Path, needed: int, reserve: int = _RESERVE_BYTES) -> int:
    """Refuse to begin what does not fit: `needed` bytes and a reserve; returns the free bytes.

    Raises OSError (ENOSPC) with what to do, before anything is written.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + reserve:
        text = (
            f"no space for {_mebibytes(needed)} (and a reserve of {_mebibytes(reserve)}): {_mebibytes(free)} are free; "
            "delete old checkpoints, keep fewer of them, or move the run folder to a larger disk"
        )
        raise OSError(errno.ENOSPC, text, str(folder))
    return free


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def make_temporary(run_folder: Path) -> Path:
    """A fresh, empty `tmp/` inside the run folder; what an earlier run left in it is removed.

    To be called by the process that owns the run folder.
    """
    remove_temporary(run_folder)
    folder = run_folder / _TEMPORARY
    folder.mkdir(parents=True, mode=0o700)
    return folder


def remove_temporary(run_folder: Path) -> None:
    """Remove `tmp/` of a run folder, if there; a link of that name is removed, not followed."""
    folder = run_folder / _TEMPORARY
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def plan_devices(cuda_count: int, fallback: str, rollout: str = "auto", learner: str = "auto") -> tuple[str, str, str]:
    """The devices of (rollout, learner), and why, in words for people.

    Two GPUs or more work side by side, one does both, without one `fallback` does. Devices asked for by name are taken
    as they are.
    """
    pool = [f"cuda:{index}" for index in range(cuda_count)] or [fallback]
    if learner == rollout == "auto":
        learner, rollout = pool[0], pool[min(1, len(pool) - 1)]
    elif rollout == "auto":
        rollout = _free(pool, learner)
    elif learner == "auto":
        learner = _free(pool, rollout)
    seen = f"{cuda_count} CUDA device{'' if cuda_count == 1 else 's'} found" if cuda_count else "no CUDA device found"
    return rollout, learner, f"rollouts on {rollout}, learning on {learner}; {seen}"


def _free(pool: Sequence[str], taken: str) -> str:
    """The first device that is not taken, or the first one."""
    name = "cuda:0" if taken == "cuda" else taken
    return next((device for device in pool if device != name), pool[0])


def place(rollout: str = "auto", learner: str = "auto") -> tuple[torch.device, torch.device, str]:
    """The devices of (rollout, learner) on this machine and the plan to print; DeviceError for one that is not there.

    The CUDA devices seen are those that CUDA_VISIBLE_DEVICES leaves.
    """
    import torch

    from fedmoe.runtime.device import choose_device

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    rollout, learner, plan = plan_devices(count, str(choose_device("auto")), rollout, learner)
    return choose_device(rollout), choose_device(learner), plan
