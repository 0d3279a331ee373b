"""Pruning plans: updates and snapshots that no version in the undo range needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedmoe.federation.events import Event, UpdateAccepted
from fedmoe.federation.lineage import Lineage
from fedmoe.federation.transitions import lineages
from fedmoe.server.history.replay import best_snapshot


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """Blobs of updates, and snapshots by version, that undoing the newest changes of an expert does without."""

    updates: frozenset[str]
    snapshots: frozenset[int]


def prune_plan(events: Sequence[Event], snapshots: Mapping[int, str], newest: int, oldest: int) -> PrunePlan:
    """What none of the versions from `oldest` to `newest` of ONE expert needs, given its events in order."""
    updates, chains = [event for event in events if isinstance(event, UpdateAccepted)], lineages(events)
    needed = {update.digest for update in updates if update.version > oldest}
    bases = {version for version in snapshots if version >= oldest}
    # Rollbacks and retractions make new versions of old updates, so each version's own beginning is asked for.
    seen: dict[int, Lineage | None] = {}
    for beginning in {_until(chains[version], oldest, seen) for version in range(oldest, newest + 1)}:
        start = best_snapshot(snapshots, chains, beginning)
        bases |= {start.version} if start else set()
        needed |= {update.digest for update in (start.rest if start else Lineage.updates(beginning))}
    needed |= {snapshots[version] for version in bases}
    return PrunePlan(frozenset({update.digest for update in updates} - needed), frozenset(snapshots.keys() - bases))


def _until(chain: Lineage | None, version: int, seen: dict[int, Lineage | None]) -> Lineage | None:
    """The beginning of a chain that only holds updates up to `version`; `seen` has those of parts seen before."""
    passed: list[int] = []
    while chain is not None and chain.update is not None and chain.update.version > version:
        if id(chain) in seen:
            chain = seen[id(chain)]
            break
        passed.append(id(chain))
        chain = chain.before
    seen.update(dict.fromkeys(passed, chain))
    return chain


def made_of(events: Iterable[Event], versions: Iterable[int], worker: str) -> set[int]:
    """Those of the `versions` of ONE expert that hold an update of a worker."""
    chains, seen = lineages(events), dict[int, bool]()

    def holds(chain: Lineage | None) -> bool:
        passed: list[int] = []
        while chain is not None and chain.update is not None and id(chain) not in seen:
            passed.append(id(chain))
            if chain.update.worker == worker:
                seen[id(chain)] = True
                break
            chain = chain.before
        contains = seen.get(id(chain), False)
        seen.update(dict.fromkeys(passed, contains))
        return contains

    return {version for version in sorted(versions) if holds(chains[version])}


def first_to_go(updates: Iterable[tuple[str, int, str]], sizes: Mapping[str, int], most: int) -> dict[str, int]:
    """Expert -> the newest of its versions whose update's bytes must go so that the rest are at most `most` bytes.

    `updates` are (expert, version, digest) in order, the oldest first; equal bytes are one blob and count once.
    """
    digests, total = set[str](), 0
    versions: dict[str, int] = {}
    for expert, version, digest in reversed(list(updates)):
        if digest in digests or digest not in sizes:
            continue
        if total + sizes[digest] > most:
            versions.setdefault(expert, version)
            total = most  # whatever is older goes too
            continue
        digests.add(digest)
        total += sizes[digest]
    return versions
