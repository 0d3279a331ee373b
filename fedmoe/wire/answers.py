"""Reads HTTP answers: size-bounded, never decompressed; recognises those of proxies and web servers.

What only another setting cures (a size limit, a proxy's password) is a refusal; all else may pass and is waited out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Literal, Self, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from fedmoe.lora.manifest import Manifest
from fedmoe.lora.safetensors_bytes import MAX_HEADER_BYTES
from fedmoe.runtime.errors import RefusedError
from fedmoe.runtime.safe_text import inert_json, shortened
from fedmoe.wire.contract.messages import SAFETENSORS, Problem

MessageT = TypeVar("MessageT", bound=BaseModel)
_SHOWN_CHARACTERS = 120
# Nobody means more: the usual pauses are kept instead.
_LONGEST_ASKED = 3600
# Of nginx and of Go, on a port that speaks TLS.
_WANTS_TLS = (b"plain HTTP request was sent to HTTPS port", b"HTTP request to an HTTPS server")
_FROM_A_PROXY = {
    403: "forbids the request; let its operator allow the coordinator's address and routes",
    429: "sheds load",
    502: "does not reach the coordinator behind it; see that it runs, and where the proxy looks for it",
    503: "has no coordinator to hand the request to; see that it runs, and where the proxy looks for it",
    504: "waited in vain for the coordinator behind it; see that it runs, or raise the proxy's read timeout",
    511: "wants somebody to log in to the network first",
}
# Length and padding of a safetensors header.
_HEADER_SLACK = 64
_ASK = "this is not a FedMoE coordinator's answer: check the URL, and whether a proxy stands in between"


class CoordinatorUnavailableError(Exception):
    """No usable answer: not reachable, shedding load, or something in between answered; try again later.

    `retry_after` is what the server asked to wait, in seconds. `advised`: the message says what to do.
    """

    def __init__(self, message: str, retry_after: float | None = None, advised: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.advised = advised


@dataclass(frozen=True)
class Answer:
    """A complete answer, its body as it travelled; `via` names the proxy it came through, `sent` the body it is to."""

    host: str
    status: int
    headers: httpx2.Headers
    body: bytes | bytearray = b""
    via: str = ""
    sent: bytes = b""

    @property
    def type(self) -> str:
        """The Content-Type without its parameters, in lower case."""
        return str(self.headers.get("content-type", "")).partition(";")[0].strip().lower()


def foreign(answer: Answer, why: str = "") -> CoordinatorUnavailableError | RefusedError:
    """The error for an answer that no coordinator gives; `why` says what is wrong with one that looks like it."""
    if why:
        return CoordinatorUnavailableError(f"{answer.host}: {why}", advised=True)
    if answer.status == 413:
        return _too_large(answer)
    if answer.status == 407:
        return RefusedError(
            "proxy_authentication",
            f"{_sender(answer)} answered 407: it wants a user and a password.",
            "Set HTTP_PROXY or HTTPS_PROXY to http://USER:PASSWORD@HOST:PORT, or put the coordinator's host into "
            "NO_PROXY.",
        )
    kind = shortened(str(answer.headers.get("content-type", "no content type")), _SHOWN_CHARACTERS)
    sender = _sender(answer) if answer.status in _FROM_A_PROXY else answer.host
    text = f"{sender} answered {answer.status} ({kind}), which is not a FedMoE coordinator's answer; {_advice(answer)}"
    return CoordinatorUnavailableError(text, seconds_asked(answer), advised=True)


def _too_large(answer: Answer) -> RefusedError:
    size = len(answer.sent)
    # Those of a safetensors body behind its header.
    numbers = max(0, size - 8 - int.from_bytes(answer.sent[:8], "little"))
    limit = max(1, -(-size * 21 // (20 << 20)))
    return RefusedError(
        "proxy_size_limit",
        f"{_sender(answer)} answered 413: a body of {size:,} bytes ({numbers:,} of them the numbers) "
        "is too large for it, though not for the coordinator.",
        f"Raise its size limit for request bodies to {limit} MiB or more (nginx: client_max_body_size {limit}m), or "
        "send less with --wire-dtype int8 or a smaller --lora-r.",
    )


def _sender(answer: Answer) -> str:
    if answer.via:
        return f"the proxy {answer.via}"
    server = shortened(str(answer.headers.get("server", "")), _SHOWN_CHARACTERS)
    return f"a proxy in front of {answer.host}" + (f" ({server})" if server else "")


def _advice(answer: Answer) -> str:
    if answer.status == 400 and any(words in answer.body for words in _WANTS_TLS):
        return "this port speaks https: write https:// in the URL"
    if reason := _FROM_A_PROXY.get(answer.status):
        return f"it {reason}; or check the URL"
    if 300 <= answer.status < 400 and (target := str(answer.headers.get("location", ""))):
        return f"it redirects to {shortened(target, _SHOWN_CHARACTERS)}, and a token follows no redirect: check the URL"
    return "check the URL, and whether a proxy stands in between"


def seconds_asked(answer: Answer) -> float | None:
    """How long the server asks to wait, in seconds; None where it does not say, or says what nobody can mean."""
    asked = str(answer.headers.get("retry-after", ""))
    return float(asked) if asked.isdecimal() and len(asked) < 6 and int(asked) <= _LONGEST_ASKED else None


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
    empty = Answer(response.request.url.host, response.status_code, response.headers, via=via, sent=sent)
    if response.headers.get("content-encoding", "identity") != "identity":
        raise foreign(empty)
    bound = bounds.weights if empty.type == SAFETENSORS else bounds.json
    length = str(response.headers.get("content-length", ""))
    announced = int(length) if length.isdecimal() and len(length) < 20 else None
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
