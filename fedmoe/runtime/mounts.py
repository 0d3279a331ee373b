"""Mounted file systems: which one a folder lies on, and whether it is a network file system."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

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
    nearest: Mount | None = None
    for mount in mounts:
        covers = PurePosixPath(path).is_relative_to(mount.point)
        if covers and (nearest is None or len(mount.point) >= len(nearest.point)):
            nearest = mount
    return nearest


def read_mounts() -> list[Mount]:
    """What is mounted for this process."""
    if _MOUNTS.is_file():
        return parse_mounts(_MOUNTS.read_text("utf-8", "surrogateescape"))
    return [Mount(part.mountpoint, part.fstype, part.device) for part in psutil.disk_partitions(all=True)]
