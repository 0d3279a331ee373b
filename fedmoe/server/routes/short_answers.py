"""Short answers to pushes: what the newest weights are made of, for a sender that has the rest, instead of the weights.

With one other update in between, that update is what the weights before and after it would tell too. Of several the
weights tell only the sum, so they are sent then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.responses import JSONResponse, Response

from fedmoe.experts import ExpertModel
from fedmoe.federation.events import UpdateAccepted
from fedmoe.server.storage.blobs import BlobStore, MissingBlobError
from fedmoe.server.storage.journal import Journal
from fedmoe.server.updates.upload import content_digest
from fedmoe.wire.contract.messages import MINIMAL, SAFETENSORS, LandedUpdate

_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class ShortAnswer:
    """The digest of the newest weights: the sender's base, plus the `other` update whose bytes come, plus its own."""

    weights_digest: str
    other: LandedUpdate | None = None
    body: bytes = b""

    def response(self, result: Mapping[str, object]) -> Response:
        """The answer to a push that had this `result`."""
        facts, headers = {**result, "weights_digest": self.weights_digest}, {"Preference-Applied": MINIMAL}
        if self.other is None:
            return JSONResponse(facts, headers=headers)
        headers["Content-Digest"] = content_digest(bytes.fromhex(self.other.digest))
        headers["FedMoE-Result"] = json.dumps({**facts, "other": self.other.model_dump()}, separators=(",", ":"))
        return Response(self.body, headers=headers, media_type=SAFETENSORS)


def answer_with_other(journal: Journal, blobs: BlobStore, expert: ExpertModel, own: str) -> ShortAnswer | None:
    """The answer for a sender whose update `own`, by digest, made the expert's version, and who has the last but two.

    None where no update made the last but one, where its bytes are gone, or where they are not shorter than weights.
    """
    updates = list(journal.events(expert.name, after_version=expert.version - 2))
    if len(updates) != 2 or not all(isinstance(update, UpdateAccepted) for update in updates):
        return None
    other, newest = updates
    assert isinstance(other, UpdateAccepted)
    assert isinstance(newest, UpdateAccepted)
    if newest.digest != own or not 0 < blobs.size(other.digest) < _FLOAT32 * expert.manifest.layout.size:
        return None
    try:
        body = blobs.read(other.digest)
    except MissingBlobError:
        return None
    return ShortAnswer(expert.digest, LandedUpdate(digest=other.digest, coefficient=other.coefficient), body)
