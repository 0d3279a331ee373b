"""Histories that clients recorded, checked against a model (after Porcupine and etcd's robustness tests).

The model of an expert is a register whose version rises by one. A push takes effect at one moment between its first
attempt and its acknowledgement, or never; one that nobody answered may take effect later, and at most once. A read sees
the version of one moment between its call and its answer. `faults_of` says what no order of such moments explains.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

Identity = tuple[str, str, int]


@dataclass(frozen=True)
class Answer:
    """An acknowledgement: when it came, with which version, whether it was that of a repeated push, from whom."""

    at: float
    version: int
    duplicate: bool
    staleness: int
    coefficient: float = 1.0
    incarnation: str = ""


@dataclass(frozen=True)
class Push:
    """An update as its client knows it: when it was first sent, how often, and every answer; no answer: nobody knows.

    `refused` is the code of an answer that says it did not land; `incarnation` names the history it was made for, and
    `turned_away` another one, in which it was refused for that reason: whether it landed in its own stays open.
    """

    expert: str
    identity: Identity
    base_version: int
    digest: str
    invoked: float
    attempts: int = 1
    answers: tuple[Answer, ...] = ()
    refused: str = ""
    incarnation: str = ""
    turned_away: str = ""

    @property
    def version(self) -> int | None:
        """Where it landed, as its client was told."""
        return self.answers[0].version if self.answers else None

    @property
    def answered(self) -> float:
        """When its client first knew that it had landed."""
        return self.answers[0].at if self.answers else math.inf


@dataclass(frozen=True)
class Read:
    """A pull: which version and content of an expert a client saw, between which moments."""

    expert: str
    version: int
    digest: str
    invoked: float
    answered: float
    incarnation: str = ""


@dataclass(frozen=True)
class Landed:
    """An update as the journal has it."""

    expert: str
    identity: Identity
    version: int
    base_version: int
    digest: str
    staleness: int
    coefficient: float = 1.0


@dataclass(frozen=True)
class Backup:
    """A copy that was taken between two moments, and brought back; `held` is the version of each expert in it."""

    began: float
    ended: float
    held: Mapping[str, int]


def faults_of(
    pushes: Sequence[Push],
    reads: Sequence[Read] = (),
    journal: Sequence[Landed] | None = None,
    began_with: Mapping[str, int] | None = None,
) -> list[str]:
    """What is wrong with the history of one incarnation; empty: the model explains all of it.

    `journal` is what landed in it; without one only the clients are believed: a version that nobody was told of must
    then be a push that nobody was answered. `began_with` are the versions that one made from a backup began with.
    """
    begins = dict(began_with or {})
    found = [*_wrong_answers(pushes), *_contents(reads)]
    known = list(pushes) if journal is None else _with_journal(pushes, journal, begins, found)
    for expert in sorted({push.expert for push in pushes} | {read.expert for read in reads}):
        mine = [push for push in known if push.expert == expert]
        seen = [read for read in reads if read.expert == expert]
        found += _order_faults(expert, mine, seen, begins.get(expert, 0), every_landing_known=journal is not None)
    return found


def restore_faults(pushes: Sequence[Push], backup: Backup) -> list[str]:
    """Pushes of the copied history that the copy should hold and does not, or holds and cannot."""
    found = []
    for push in pushes:
        held = backup.held.get(push.expert, 0)
        if push.version is None:
            continue
        if push.answered < backup.began and push.version > held:
            found.append(f"{_name(push)} was acknowledged before the backup, which does not hold it")
        if push.invoked > backup.ended and push.version <= held:
            found.append(f"{_name(push)} was made after the backup, which holds its version {push.version}")
    return found


def landed_faults(journal: Sequence[Landed], began_with: Mapping[str, int] | None = None) -> list[str]:
    """What is wrong with a journal by itself: a version missing or twice, an identity twice, a staleness miscounted."""
    begins = began_with or {}
    found = [
        f"{_identity(identity)} landed {count} times"
        for identity, count in Counter(one.identity for one in journal).items()
        if count > 1
    ]
    by_expert: dict[str, list[int]] = defaultdict(list)
    for one in journal:
        by_expert[one.expert].append(one.version)
        if one.base_version != one.version - 1 - one.staleness:
            found.append(f"{_identity(one.identity)}: version {one.version} with staleness {one.staleness}")
    for expert, versions in by_expert.items():
        expected = range(begins.get(expert, 0) + 1, begins.get(expert, 0) + len(versions) + 1)
        wrong = next((pair for pair in zip(versions, expected, strict=True) if pair[0] != pair[1]), None)
        if wrong is not None:
            found.append(f"{expert}: version {wrong[0]} stands where version {wrong[1]} should")
    return found


def _wrong_answers(pushes: Iterable[Push]) -> Iterator[str]:
    for identity, count in Counter(push.identity for push in pushes).items():
        if count > 1:
            yield f"{_identity(identity)} stands in the history {count} times"
    for push in pushes:
        if push.answers and push.refused:
            yield f"{_name(push)} was acknowledged and refused with {push.refused}"
        if len({(one.version, one.staleness, one.coefficient) for one in push.answers}) > 1:
            yield f"{_name(push)} was told several outcomes: {[one.version for one in push.answers]}"
        if push.answers and push.answers[0].duplicate and push.attempts == 1:
            yield f"{_name(push)} was called a repetition of what was never sent"
        if any(not one.duplicate for one in push.answers[1:]):
            yield f"{_name(push)} was acknowledged as new twice"
        if any(one.incarnation != push.incarnation for one in push.answers):
            yield f"{_name(push)} was made in the history {push.incarnation} and taken in another one"
        for one in push.answers[:1]:
            if one.staleness != one.version - 1 - push.base_version or one.staleness < 0:
                yield f"{_name(push)}: version {one.version} from {push.base_version} with staleness {one.staleness}"


def _contents(reads: Iterable[Read]) -> Iterator[str]:
    seen: dict[tuple[str, int], str] = {}
    for read in reads:
        first = seen.setdefault((read.expert, read.version), read.digest)
        if first != read.digest:
            yield f"{read.expert} version {read.version} was read with two contents"


def _with_journal(
    pushes: Sequence[Push], journal: Sequence[Landed], begins: Mapping[str, int], found: list[str]
) -> list[Push]:
    """The pushes, those without an answer with the version that the journal gives them; adds what does not fit."""
    found += landed_faults(journal, begins)
    landed = {one.identity: one for one in journal}
    sent = {push.identity for push in pushes}
    found += [f"{_identity(one.identity)} landed, and nobody sent it" for one in journal if one.identity not in sent]
    known = []
    for push in pushes:
        one = landed.get(push.identity)
        if one is None:
            if push.answers:
                found.append(f"{_name(push)} was acknowledged and is lost")
            known.append(replace(push, refused=push.refused or "never landed"))
            continue
        if push.refused:
            found.append(f"{_name(push)} was refused with {push.refused} and landed")
        if (one.expert, one.base_version, one.digest) != (push.expert, push.base_version, push.digest):
            found.append(f"{_name(push)} landed with another expert, base version or content")
        told = push.answers[0] if push.answers else None
        if told and (told.version, told.staleness, told.coefficient) != (one.version, one.staleness, one.coefficient):
            found.append(f"{_name(push)} was told version {told.version} and landed as {one.version}")
        silent = Answer(math.inf, one.version, False, one.staleness, one.coefficient)
        known.append(push if told else replace(push, answers=(silent,)))
    return known


def _order_faults(
    expert: str, pushes: Sequence[Push], reads: Sequence[Read], began: int, every_landing_known: bool
) -> list[str]:
    """Whether moments can be found at which the pushes of one expert landed in the order of their versions.

    A version cannot land before the pushes at or below it were sent and lower versions were still read, nor after
    anything at or above it was acknowledged or read. Both bounds rise with the version: if no pair crosses, the moments
    `max(lower bounds so far)` are an order, and gaps are filled by silent pushes from the oldest on.
    """
    told = {push.version: push for push in pushes if push.version is not None}
    if len(told) < sum(push.version is not None for push in pushes):
        return [f"{expert}: a version was acknowledged for two pushes"]
    last = max([began, *told, *(read.version for read in reads)])
    lowest = min([began + 1, *told, *(read.version + 1 for read in reads)])
    if lowest <= began:
        return [f"{expert}: version {lowest} was seen, and the history began with {began}"]
    latest = _latest_moments(told, reads, began, last)
    found, not_before = [], -math.inf
    gaps = []
    for version in range(began + 1, last + 1):
        seen_without = [read.invoked for read in reads if read.version == version - 1]
        push = told.get(version)
        not_before = max([not_before, *seen_without, *([push.invoked] if push else [])])
        if push is None:
            gaps.append((version, latest[version]))
        if not_before > latest[version]:
            found.append(f"{expert}: version {version} was seen before it could be there")
    if every_landing_known:
        return found + [f"{expert}: version {version} was seen and is not in the journal" for version, _ in gaps]
    silent = [push for push in pushes if push.version is None and not push.refused]
    return found + _gap_faults(expert, gaps, silent)


def _latest_moments(told: Mapping[int, Push], reads: Sequence[Read], began: int, last: int) -> dict[int, float]:
    """For every version the moment at which it, or a later one, was seen by somebody."""
    seen: dict[int, float] = {}
    for read in reads:
        seen[read.version] = min(read.answered, seen.get(read.version, math.inf))
    latest, soonest = {}, math.inf
    for version in range(last, began, -1):
        push = told.get(version)
        soonest = min([soonest, seen.get(version, math.inf), *([push.answered] if push else [])])
        latest[version] = soonest
    return latest


def _gap_faults(expert: str, gaps: Sequence[tuple[int, float]], silent: Sequence[Push]) -> list[str]:
    """Versions nobody was told of that no silent push explains, each at most once (bounds rise, so greedy is right)."""
    first = []
    for push in silent:
        fits = (n for n, (version, until) in enumerate(gaps) if push.invoked <= until and push.base_version < version)
        first.append(next(fits, len(gaps)))
    per_gap = Counter(first)
    free, found = 0, []
    for n, (version, _) in enumerate(gaps):
        free += per_gap[n] - 1
        if free < 0:
            found.append(f"{expert}: version {version} came from nobody")
            free = 0
    return found


def client_faults(pushes: Sequence[Push]) -> list[str]:
    """Whether each client, which sends one push after the other, saw its versions rise."""
    found = []
    by_client: dict[tuple[str, str], list[Push]] = defaultdict(list)
    for push in sorted(pushes, key=lambda one: one.invoked):
        if push.version is not None:
            by_client[push.expert, push.identity[0]].append(push)
    for mine in by_client.values():
        for before, after in pairwise(mine):
            if (after.version or 0) <= (before.version or 0) and after.incarnation == before.incarnation:
                found.append(f"{_name(after)} saw version {after.version} after {before.version}")
    return found


def _name(push: Push) -> str:
    return f"{push.expert} {_identity(push.identity)}"


def _identity(identity: Identity) -> str:
    return "/".join(map(str, identity))
