"""Verification of a state directory: every file against its hash, every version rebuilt.

Nothing is changed. The coordinator must not run on it meanwhile.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from fedmoe.coordinator import Aggregation
from fedmoe.federation.events import Event, ExpertRegistered, GatewayMerged
from fedmoe.federation.lineage import Chains
from fedmoe.federation.transitions import lineages
from fedmoe.lora.adapter import Adapter, FloatVector
from fedmoe.lora.codec import digest
from fedmoe.lora.manifest import Manifest
from fedmoe.lora.safetensors_bytes import CodecError
from fedmoe.lora.update_rules import RuleState
from fedmoe.server.gate.publication import published_blobs
from fedmoe.server.history.history import History
from fedmoe.server.history.replay import past_of, registration
from fedmoe.server.storage.acknowledged import read_acknowledged
from fedmoe.server.storage.audit import AUDIT_FILE, AUDIT_HEAD, AuditHead, check_file
from fedmoe.server.storage.blobs import BlobStore, CorruptBlobError, MissingBlobError, StorageFailedError
from fedmoe.server.storage.event_rows import GATEWAY, blob_of
from fedmoe.server.storage.journal import Journal
from fedmoe.server.storage.object_store import blobs_beside
from fedmoe.server.storage.sqlite_journal import SqliteJournal, problems
from fedmoe.server.storage.state_dir import StateDirError, lock_state, odd_files
from fedmoe.server.storage.tables import UPDATE_RULE


@dataclass
class VerificationReport:
    """What was looked at, and `findings`: what is not as it was written, in words.

    `absent` blobs are named and not there, as after `--keep-updates`; `unproven` versions could not be rebuilt for
    that reason or have no digest, as those of schema 1.
    """

    events: int = 0
    versions: int = 0
    unproven: int = 0
    blobs: int = 0
    absent: int = 0
    unnamed: int = 0
    incarnation: str = ""
    findings: list[str] = field(default_factory=list)


def verify_state(path: Path) -> VerificationReport:
    """Look at everything in a state directory; raises StateDirError for one that is in use or not there."""
    if not (path / "journal.sqlite").is_file():
        raise StateDirError(f"{path} is no state directory: there is no journal.sqlite in it")
    lock = lock_state(path)
    try:
        return _verify(path)
    finally:
        lock.close()


def check_start(path: Path) -> None:
    """Raise what a coordinator's start on a state directory that nobody uses would: no version but the newest is read.

    Raises StorageFailedError or CorruptBlobError.
    """
    file = path / "journal.sqlite"
    with closing(SqliteJournal(file)) as journal:
        _Verifier(journal, blobs_beside(file), VerificationReport()).recover_newest()


def count_rebuilt(journal: Journal, blobs: BlobStore) -> int:
    """Rebuild every expert as a start does, held against its journalled digest; how many there are.

    Raises StorageFailedError or CorruptBlobError.
    """
    return _Verifier(journal, blobs, VerificationReport()).recover_newest()


def _verify(path: Path) -> VerificationReport:
    report = VerificationReport(findings=odd_files(path))
    blobs = blobs_beside(path / "journal.sqlite")
    try:
        damage = problems(path / "journal.sqlite")
        report.findings += damage
        for name in sorted(blobs.digests()):
            report.blobs += 1
            try:
                blobs.read(name)
            except (CorruptBlobError, MissingBlobError, OSError) as error:
                report.findings.append(str(error))
        if damage:
            return report  # a journal that is not as it was written says nothing about the rest
        with closing(SqliteJournal(path / "journal.sqlite")) as journal:
            report.events, report.incarnation = journal.head.events, journal.head.incarnation
            gap = journal.gap_since(read_acknowledged(path / "acknowledged"))
            report.findings += [f"the journal is not the newest: {gap.reason}"] if gap is not None else []
            audit = check_file(path, AuditHead.of_text(journal.meta(AUDIT_HEAD)))
            report.findings += [f"{AUDIT_FILE}: {what}" for what in audit.breaks]
            _Verifier(journal, blobs, report).run()
    except (StorageFailedError, sqlite3.Error) as error:
        report.findings.append(str(error))
    return report


class _Verifier(History):
    """Rebuilds every version in order and holds it against the digest that was journalled with it."""

    def __init__(self, journal: Journal, blobs: BlobStore, report: VerificationReport) -> None:
        optimizer, _, size = (journal.meta(UPDATE_RULE) or "sgd").partition(", buffer of ")
        super().__init__(journal, blobs, Aggregation(server_optimizer=optimizer, buffer_size=int(size or 1)))
        self._report = report

    def run(self) -> None:
        """Rebuild every version of every expert and gateway."""
        events = list(self._journal.events())
        past, there = past_of(events), set(self._blobs.digests())
        named = {blob_of(event) for event in events} | self._statistics.blobs().replaced
        named |= published_blobs(self._journal).replaced
        self._report.absent = len(named - {None} - there)
        for name in past.experts:
            named |= set(self._journal.snapshots(name).values())
        self._report.unnamed = len(there - named)
        for merge in past.merges:
            self._check_merge(merge, registration(next(iter(past.experts.values()))).manifest)
        for of_expert in past.experts.values():
            self._check_expert(of_expert)

    def recover_newest(self) -> int:
        """Rebuild every expert as a start does; how many there are."""
        experts = past_of(self._journal.events()).experts
        for events in experts.values():
            self._recover_whole(events)
        return len(experts)

    def _check_merge(self, merge: GatewayMerged, manifest: Manifest) -> None:
        try:
            weights: FloatVector | None = self._gateway_weights(merge.digest, manifest)
        except (MissingBlobError, CorruptBlobError, CodecError):
            weights = None  # one that no expert branches from may be gone; a damaged one is reported with the blobs
        self._check_version(GATEWAY, merge.number, manifest, weights)

    def _check_expert(self, events: list[Event]) -> None:
        registered, chains = registration(events), lineages(events)
        state: RuleState | None = self._beginning(registered, None)
        problem = ""
        for version in range(1, max(chains) + 1):
            try:
                state = self._next(state, registered, chains, version)
            except (MissingBlobError, CorruptBlobError, CodecError) as error:
                state, problem = None, str(error)
            self._check_version(registered.expert, version, registered.manifest, state.weights if state else None)
        if state is None:
            self._report.findings.append(
                f"{registered.expert} cannot be rebuilt at its newest version {max(chains)}: {problem}"
            )

    def _next(self, before: RuleState | None, registered: ExpertRegistered, chains: Chains, version: int) -> RuleState:
        """The state of a version, from that of the version before where it is an update more."""
        chain = chains[version]
        update = chain.update if chain is not None else None
        if before is not None and update is not None and update.version == version:
            return self._land(before, [update], registered.manifest)
        return self._rebuild(registered, chains, chain)

    def _check_version(self, name: str, version: int, manifest: Manifest, weights: FloatVector | None) -> None:
        self._report.versions += 1
        expected = self._journal.version_digest(name, version)
        if weights is None or expected is None:
            self._report.unproven += 1
            return
        rebuilt = digest(Adapter(manifest.layout, manifest.alpha, weights))
        if rebuilt != expected:
            made = f"version {version} of {name}"
            self._report.findings.append(f"{made} was rebuilt with the digest {rebuilt}, journalled is {expected}")
