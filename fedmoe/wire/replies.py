"""Answers as they come over the wire: read whole, bounded, never unpacked, and known for ours or foreign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from fedmoe.wire.messages import SAFETENSORS, Problem

_MAX_JSON_BYTES = 64 << 20
# A gateway of many experts; the float32 factors of one expert are 4 GiB at most.
_MAX_WEIGHT_BYTES = 64 << 30

Message = TypeVar("Message", bound=BaseModel)


class CoordinatorUnavailableError(Exception):
    """No usable answer: not reachable, shedding load, or something in between answered; try again later.

    `retry_after` is what the server asked to wait, in seconds.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Answer:
    """A complete answer, its body as it travelled."""

    host: str
    status: int
    headers: httpx2.Headers
    body: bytes | bytearray

    @property
    def type(self) -> str:
        return str(self.headers.get("content-type", "")).partition(";")[0].strip().lower()


def read(response: httpx2.Response) -> Answer:
    """The whole answer, its body not decoded: a coordinator never compresses, and a bomb must not be unpacked."""
    headers = response.headers
    host = response.request.url.host
    if headers.get("content-encoding", "identity") != "identity":
        raise foreign(Answer(host, response.status_code, headers, b""))
    weights = headers.get("content-type") == SAFETENSORS
    length = headers.get("content-length", "")
    in_one_piece = weights and length.isdecimal() and int(length) <= _MAX_WEIGHT_BYTES
    body = _into_one_buffer(response, int(length)) if in_one_piece else _gathered(response, _MAX_JSON_BYTES)
    if body is None:
        raise foreign(Answer(host, response.status_code, headers, b""))
    return Answer(host, response.status_code, headers, body)


def _into_one_buffer(response: httpx2.Response, length: int) -> bytearray | None:
    body = bytearray(length)
    position = 0
    for chunk in response.iter_raw():
        body[position : position + len(chunk)] = chunk
        position += len(chunk)
    return body if position == length == len(body) else None


def _gathered(response: httpx2.Response, most: int) -> bytes | None:
    chunks: list[bytes] = []
    size = 0
    for chunk in response.iter_raw():
        size += len(chunk)
        if size > most:
            return None
        chunks.append(chunk)
    return b"".join(chunks)


def parsed(answer: Answer, kind: type[Message], text: str | None = None) -> Message:
    """The message in an answer's body, or in `text` where a header carries it."""
    try:
        return kind.model_validate_json(answer.body if text is None else text)
    except ValidationError as error:
        raise foreign(answer) from error


def parsed_problem(answer: Answer, text: str | None = None) -> Problem:
    """The problem an error's body describes, or `text` where a header carries it."""
    return parsed(answer, Problem, text)


def expect_nothing(answer: Answer) -> None:
    """Raise unless the answer says that the work was done and there is nothing to tell."""
    if answer.status != 204:
        raise foreign(answer)


def foreign(answer: Answer) -> CoordinatorUnavailableError:
    """The error for an answer that no coordinator gives."""
    kind = answer.headers.get("content-type", "no content type")[:80]
    return CoordinatorUnavailableError(
        f"{answer.host} answered {answer.status} ({kind}), which is not a FedMoE coordinator's "
        "answer; check the URL, and whether a proxy stands in between"
    )
