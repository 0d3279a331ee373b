"""Responses that no coordinator sent: their likely sender (proxy, web server), and what to do.

What only another setting cures (a size limit, a proxy's password) is a refusal; all else may pass and is waited out.
"""

from __future__ import annotations

from fedmoe.runtime.errors import RefusedError
from fedmoe.runtime.safe_text import shortened
from fedmoe.wire.answer import Answer, CoordinatorUnavailableError

_SHOWN_CHARACTERS = 120
_MEBIBYTE = 1 << 20
# More is no honest wish: the usual pauses are kept instead.
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
    return CoordinatorUnavailableError(
        f"{_summary(answer)}, which is not a FedMoE coordinator's answer; {_advice(answer)}",
        seconds_asked(answer),
        advised=True,
    )


def _too_large(answer: Answer) -> RefusedError:
    limit = max(1, -(-answer.sent * 21 // (20 * _MEBIBYTE)))
    return RefusedError(
        "proxy_size_limit",
        f"{_sender(answer)} answered 413: a body of {answer.sent:,} bytes ({answer.numbers:,} of them the numbers) "
        "is too large for it, though not for the coordinator.",
        f"Raise its size limit for request bodies to {limit} MiB or more (nginx: client_max_body_size {limit}m), or "
        "send less with --wire-dtype int8 or a smaller --lora-r.",
    )


def _sender(answer: Answer) -> str:
    if answer.via:
        return f"the proxy {answer.via}"
    server = shortened(str(answer.headers.get("server", "")), _SHOWN_CHARACTERS)
    return f"a proxy in front of {answer.host}" + (f" ({server})" if server else "")


def _summary(answer: Answer) -> str:
    kind = shortened(str(answer.headers.get("content-type", "no content type")), _SHOWN_CHARACTERS)
    sender = _sender(answer) if answer.status in _FROM_A_PROXY else answer.host
    return f"{sender} answered {answer.status} ({kind})"


def _advice(answer: Answer) -> str:
    if answer.status == 400 and any(words in answer.body for words in _WANTS_TLS):
        return "this port speaks https: write https:// in the URL"
    if known := _FROM_A_PROXY.get(answer.status):
        return f"it {known}; or check the URL"
    if 300 <= answer.status < 400 and (target := str(answer.headers.get("location", ""))):
        return f"it redirects to {shortened(target, _SHOWN_CHARACTERS)}, and a token follows no redirect: check the URL"
    return "check the URL, and whether a proxy stands in between"


def seconds_asked(answer: Answer) -> float | None:
    """How long the server asks to wait, in seconds; None where it does not say, or says what nobody can mean."""
    asked = str(answer.headers.get("retry-after", ""))
    return float(asked) if asked.isdecimal() and len(asked) < 6 and int(asked) <= _LONGEST_ASKED else None
