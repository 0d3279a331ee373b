"""Refuses updates and rollbacks made from weights that a restore has undone, even if the version number fits.

After a restore, the versions that were lost are numbered once more, with other weights. By its number alone an update
of the lost history would be taken for one of this.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedmoe.experts import ExpertModel
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage.journal import Journal
from fedmoe.server.storage.tables import INCARNATION
from fedmoe.wire.contract.messages import RollbackRequest, UpdateHeader


class CurrentHistory:
    """The history in a journal: its incarnation, and the content digest of each version, None where it is not known."""

    def __init__(self, journal: Journal) -> None:
        self.incarnation = journal.meta(INCARNATION) or ""
        self.digest_of = journal.version_digest

    def digests(self, versions: Mapping[str, int]) -> dict[str, str]:
        """The content digests of versions of experts, of those that are known."""
        digests = {name: self.digest_of(name, version) for name, version in versions.items()}
        return {name: digest for name, digest in digests.items() if digest is not None}

    def check_update(self, header: UpdateHeader, expert: ExpertModel) -> None:
        """Refuse an update that says it was made in another history; one that says nothing is taken at its number."""
        if header.incarnation is not None and header.incarnation != self.incarnation:
            raise self._refusal(
                f"the update was made from version {header.base_version} of {expert.name} in the history "
                f"{header.incarnation}; this coordinator goes on with the history {self.incarnation}, "
                f"version {expert.version}.",
                expert,
            )
        version, digest = header.base_version, header.base_digest
        if digest is None or version > expert.version:
            return
        here = expert.digest if version == expert.version else self.digest_of(expert.name, version)
        if here is not None and here != digest:
            raise self._refusal(_unlike(expert, version, digest, here), expert)

    def check_rollback(self, request: RollbackRequest, expert: ExpertModel, digest: str) -> None:
        """Refuse to go back to a version that was named in another history; `digest` is the digest it has here."""
        if request.incarnation not in (None, self.incarnation):
            raise self._refusal(
                f"version {request.to_version} of {expert.name} was named in the history {request.incarnation}; "
                f"this coordinator goes on with the history {self.incarnation}.",
                expert,
            )
        if request.to_digest is not None and not digest.startswith(request.to_digest):
            raise self._refusal(_unlike(expert, request.to_version, request.to_digest, digest), expert)

    def _refusal(self, detail: str, expert: ExpertModel) -> RefusedError:
        return RefusedError(
            "other_history",
            detail,
            "The state was restored or made anew: pull the newest version and push again what was not acknowledged.",
            newest_version=expert.version,
            newest_digest=expert.digest,
            incarnation=self.incarnation,
        )


def _unlike(expert: ExpertModel, version: int, theirs: str, ours: str) -> str:
    return (
        f"version {version} of {expert.name} has digest {ours[:12]} here, and {theirs[:12]} in the history that this "
        "request comes from."
    )
