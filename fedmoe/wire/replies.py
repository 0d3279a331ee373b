"""Reads HTTP responses: size-bounded, never decompressed; tells the coordinator's from a proxy's."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Literal, Self, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from fedmoe.lora.manifest import Manifest
from fedmoe.lora.safetensors_bytes import MAX_HEADER_BYTES
from fedmoe.runtime.safe_text import inert_json, shortened
from fedmoe.wire.answer import Answer, media_type
from fedmoe.wire.contract.messages import SAFETENSORS, Problem
from fedmoe.wire.foreign_answers import foreign

MessageT = TypeVar("MessageT", bound=BaseModel)
# Length and padding of a safetensors header.
_HEADER_SLACK = 64
_ASK = "this is not a FedMoE coordinator's answer: check the URL, and whether a proxy stands in between"


@dataclass(frozen=True, slots=True)
class BodySizeLimits:
    """The largest body that is read, in bytes: of JSON, and of weights (by default a gateway of many experts)."""

    json: int = 4 << 20
    weights: int = 64 << 30

    @classmethod
    def of(cls, manifest: Manifest | None) -> Self:
        """What the float32 weights of one expert of this kind take at most."""
        return cls() if manifest is None else cls(weights=4 * manifest.layout.size + MAX_HEADER_BYTES + _HEADER_SLACK)


def read(response: httpx2.Response, bounds: BodySizeLimits, via: str = "", sent: bytes = b"") -> Answer:
    """The whole answer, within `bounds`; its body is not decoded.

    A coordinator never compresses, and a bomb must not be unpacked. Memory grows with what arrives, not with what is
    announced.
    """
    headers = response.headers
    empty = Answer(response.request.url.host, response.status_code, headers, b"", via, len(sent), _numbers(sent))
    if headers.get("content-encoding", "identity") != "identity":
        raise foreign(empty)
    bound = bounds.weights if media_type(headers) == SAFETENSORS else bounds.json
    announced = _announced(headers)
    if announced is not None and announced > bound:
        raise foreign(empty, f"a body of {announced:,} bytes is announced, at most {bound:,} are expected; {_ASK}")
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > bound:
            raise foreign(empty, f"the body goes on after {bound:,} bytes, and no more are expected; {_ASK}")
    if announced is not None and announced != len(body):
        raise foreign(empty)
    return replace(empty, body=body)


def _numbers(body: bytes) -> int:
    """The bytes of a safetensors body behind its header."""
    return max(0, len(body) - 8 - int.from_bytes(body[:8], "little"))


def _announced(headers: httpx2.Headers) -> int | None:
    length = str(headers.get("content-length", ""))
    return int(length) if length.isdecimal() and len(length) < 20 else None


def parsed(answer: Answer, kind: type[MessageT], text: str | None = None) -> MessageT:
    """The message in an answer's body, or in `text` where a header carries it.

    Keys that this version does not know are left out: a newer coordinator may say more. Texts come out inert.
    """
    unknown: Literal["allow", "ignore"] = "allow" if kind is Problem else "ignore"
    try:
        return kind.model_validate(inert_json(json.loads(answer.body if text is None else text)), extra=unknown)
    except (ValidationError, ValueError, RecursionError) as error:
        raise foreign(answer) from error


def parsed_problem(answer: Answer, text: str | None = None) -> Problem:
    """The problem an error's body describes, or `text` where a header carries it; its texts are inert and not long."""
    problem = parsed(answer, Problem, text)
    return problem.model_copy(
        update={"code": shortened(problem.code, 80), "detail": shortened(problem.detail), "fix": shortened(problem.fix)}
    )


def expect_nothing(answer: Answer) -> None:
    """Raise unless the answer says that the work was done and there is nothing to tell."""
    if answer.status != 204:
        raise foreign(answer)
