"""The incarnations of a coordinator that is restored from backups, and what must hold within and between them."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crash_load import IN_FOLDER, Storage, Told, landed, read_journal
from push_histories import Backup, Landed, client_faults, faults_of, restore_faults

from fedmoe.server.storage.backup import make_backup
from fedmoe.server.storage.restore import restore


@dataclass
class Era:
    """One incarnation: what it began with, and what had landed when it ended, both since the very first version."""

    incarnation: str
    began: list[Landed] = field(default_factory=list)
    ended: list[Landed] = field(default_factory=list)

    @property
    def own(self) -> list[Landed]:
        return self.ended[len(self.began) :]


@dataclass(frozen=True)
class Copy:
    """A backup on disk: of which era, and taken between which moments."""

    folder: Path
    era: int
    began: float
    ended: float


@dataclass
class Eras:
    """Takes backups of a running coordinator, restores one of a killed coordinator, and remembers all of it.

    `incarnation` is the first one's name. Of a journal in a database nothing here takes backups.
    """

    state_dir: Path
    incarnation: str
    storage: Storage = IN_FOLDER
    eras: list[Era] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    restored: list[tuple[Copy, Backup]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.eras.append(Era(self.incarnation))

    def back_up(self) -> int:
        """Take a backup; how many were taken."""
        folder = self.state_dir.parent / f"backup-{len(self.eras)}-{len(self.copies)}"
        began = time.monotonic()
        make_backup(self.state_dir, folder, time.time())
        self.copies.append(Copy(folder, len(self.eras) - 1, began, time.monotonic()))
        return 1

    def restore(self, moments: random.Random) -> int:
        """Bring one of the last backups back, of whichever era; how many were brought back."""
        if not self.copies:
            return 0
        copy = moments.choice(self.copies[-3:])
        self.eras[-1].ended = landed(read_journal(self.state_dir))
        made = restore(copy.folder, self.state_dir, replace=True)
        if made.moved is not None:
            shutil.rmtree(made.moved)
        held = landed(read_journal(self.state_dir))
        if held != self.eras[copy.era].ended[: len(held)]:
            self.wrong.append(f"backup {copy.folder.name} does not hold the beginning of its history")
        self.restored.append((copy, Backup(copy.began, copy.ended, versions(held))))
        self.eras.append(Era(made.incarnation, held))
        return 1

    def faults(self, told: Told) -> list[str]:
        """Everything that is wrong, once the last era has ended."""
        self.eras[-1].ended = landed(read_journal(self.state_dir, self.storage))
        known = [era.incarnation for era in self.eras]
        found = [*self.wrong]
        if len(set(known)) < len(known):
            found.append("two incarnations have one name")
        for era in self.eras:
            pushes = [one for one in told.pushes if one.incarnation == era.incarnation]
            reads = [one for one in told.reads if one.incarnation == era.incarnation]
            began = versions(era.began)
            found += faults_of(pushes, reads, began_with=began)
            found += faults_of(pushes, reads, era.own, began)
            found += client_faults(pushes)
        found += [f"{one} names no history there was" for one in told.pushes if one.incarnation not in known]
        # Which history turned a push away must be a later one than it was made for.
        order = {incarnation: number for number, incarnation in enumerate(known)}
        for one in told.pushes:
            if one.turned_away and order.get(one.turned_away, -1) <= order.get(one.incarnation, -1):
                found.append(f"{one} was turned away by {one.turned_away}")
        for copy, backup in self.restored:
            incarnation = self.eras[copy.era].incarnation
            found += restore_faults([one for one in told.pushes if one.incarnation == incarnation], backup)
        return found


def versions(journal: Sequence[Landed]) -> dict[str, int]:
    """The newest version of each expert."""
    newest: dict[str, int] = {}
    for one in journal:
        newest[one.expert] = one.version
    return newest
