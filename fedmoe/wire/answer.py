"""An HTTP answer as received, and the error for one that is unusable."""

from __future__ import annotations

from dataclasses import dataclass

import httpx2


class CoordinatorUnavailableError(Exception):
    """No usable answer: not reachable, shedding load, or something in between answered; try again later.

    `retry_after` is what the server asked to wait, in seconds. `advised` says that the message tells what to do.
    """

    def __init__(self, message: str, retry_after: float | None = None, advised: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.advised = advised


@dataclass(frozen=True)
class Answer:
    """A complete answer, its body as it travelled; `via` names the proxy it came through, `sent` the bytes it is to.

    Of these `numbers` are those of the tensors; the rest are their names.
    """

    host: str
    status: int
    headers: httpx2.Headers
    body: bytes | bytearray
    via: str = ""
    sent: int = 0
    numbers: int = 0

    @property
    def type(self) -> str:
        return media_type(self.headers)


def media_type(headers: httpx2.Headers) -> str:
    """The Content-Type without its parameters, in lower case."""
    return str(headers.get("content-type", "")).partition(";")[0].strip().lower()
