"""A coordinator that answers wrongly, by mistake or on purpose: nothing of it is taken, and the reason is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import httpcore2
import httpx2
import numpy as np
import pytest
from support import LAYOUT, MANIFEST, make_flat

from fedmoe.lora.adapter import Adapter, FloatVector
from fedmoe.lora.codec import digest, encode
from fedmoe.lora.manifest import Manifest
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire import transport
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError, ExpectedWeights
from fedmoe.wire.contract.messages import PROBLEM, SAFETENSORS, UpdateHeader
from fedmoe.wire.pulled_weights import body_headers

URL = "http://coordinator.example"
HEADER = UpdateHeader(expert="python", worker="w1", epoch="e1", sequence=4, base_version=6, answer="weights")


def weights(
    flat: FloatVector | None = None,
    expert: str = "python",
    version: int = 7,
    manifest: Manifest = MANIFEST,
    told: str | None = None,
) -> bytes:
    """An expert's weights as a coordinator sends them."""
    numbers = make_flat(1, manifest.layout) if flat is None else flat
    info = {"expert": expert, "version": version, "manifest": manifest.to_json()}
    info["digest"] = told or digest(Adapter(manifest.layout, manifest.alpha, numbers))
    return encode(manifest.layout, numbers, "fp32", {"fedmoe": json.dumps(info)})


def result(expert: str = "python", version: int = 7) -> str:
    fixed = {"gateway_version": 1, "staleness": 0, "coefficient": 1.0, "digest": "0" * 64}
    return json.dumps(fixed | {"expert": expert, "version": version})


def answering(body: bytes, status: int = 200, kind: str = SAFETENSORS, **headers: str) -> CoordinatorClient:
    """A client of a coordinator that always gives this answer."""
    named = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    named |= (
        {name.encode(): value.encode() for name, value in body_headers(body).items()} if kind == SAFETENSORS else {}
    )
    named[b"Content-Type"] = kind.encode("latin-1")
    reply = httpx2.MockTransport(lambda _: httpx2.Response(status, headers=named, stream=httpx2.ByteStream(body)))
    return CoordinatorClient(URL, attempts=1, transport=reply)


def test_what_is_asked_for_is_taken() -> None:
    with answering(weights()) as client:
        pulled = client.pull_expert("python", expected=ExpectedWeights(MANIFEST, 7))
    assert pulled is not None
    np.testing.assert_array_equal(pulled.weights, make_flat(1))


other = Manifest(MANIFEST.base, LAYOUT, 8.0)
smaller = Manifest(MANIFEST.base, type(LAYOUT)(LAYOUT.modules, 1), MANIFEST.alpha)
spoilt = make_flat(1)
spoilt[3] = np.nan
EVIL = {
    "not finite": (weights(spoilt), "not finite"),
    "infinite": (weights(np.full(LAYOUT.size, np.inf, np.float32)), "not finite"),
    "far too large": (weights(np.full(LAYOUT.size, 1e30, np.float32)), "as large as 1e\\+30"),
    "another expert": (weights(expert="evil"), "sent the expert 'evil' instead of 'python'"),
    "a name that moves the cursor": (weights(expert="e\x1b[2J"), r"sent the expert 'e\\x1b\[2J'"),
    "an earlier version": (weights(version=6), "sent version 6 of python, though version 7"),
    "a version below all": (weights(version=-7), "sent version -7"),
    "another alpha": (weights(manifest=other), "another kind of expert"),
    "another rank": (weights(manifest=smaller), "another kind of expert"),
    "numbers of another digest": (weights(told="0" * 64), "other weights than its digest names"),
    "no safetensors": (b"\xff" * 100, "not a FedMoE coordinator"),
}


@pytest.mark.parametrize("name", EVIL)
def test_weights_that_are_not_those_asked_for_are_refused_by_name(name: str) -> None:
    body, words = EVIL[name]
    with (
        answering(body) as client,
        pytest.raises(CoordinatorUnavailableError, match=words),
    ):
        client.pull_expert("python", expected=ExpectedWeights(MANIFEST, 7))


@pytest.mark.parametrize("name", EVIL)
def test_nor_are_they_with_the_answer_to_a_push(name: str) -> None:
    body, words = EVIL[name]
    words = words.replace("though version 7", "though version 6") if name != "an earlier version" else "version 7 of"
    with answering(body, fedmoe_result=result()) as client, pytest.raises(CoordinatorUnavailableError, match=words):
        client.push(HEADER, b"body", MANIFEST)


@pytest.mark.parametrize(("expert", "version"), [("evil", 7), ("python", 5), ("python", -1)])
def test_a_result_of_another_update_is_refused(expert: str, version: int) -> None:
    told = result(expert, version)
    with (
        answering(told.encode(), kind="application/json") as client,
        pytest.raises(CoordinatorUnavailableError, match="it answered an update of python from version 6"),
    ):
        client.push(HEADER, b"body")


def test_a_version_may_fall_where_the_coordinator_says_that_its_history_is_another() -> None:
    told = {"title": "Conflict", "status": 409, "code": "unknown_version", "detail": "no version 6."}
    with (
        answering(weights(version=2), 409, fedmoe_result=json.dumps(told)) as client,
        pytest.raises(RefusedError, match="no version 6") as refused,
    ):
        client.push(HEADER, b"body", MANIFEST)
    assert refused.value.newest.version == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("length", [40 << 30, 1 << 62, (4 * LAYOUT.size) + (2 << 20)])
def test_a_body_that_is_announced_too_large_is_not_begun(length: int) -> None:
    read = 0

    class Counted(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            nonlocal read
            read += 1
            yield b"x"

    headers = {"Content-Type": SAFETENSORS, "Content-Length": str(length)}
    reply = httpx2.MockTransport(lambda _: httpx2.Response(200, headers=headers, stream=Counted()))
    with (
        CoordinatorClient(URL, attempts=1, transport=reply) as client,
        pytest.raises(CoordinatorUnavailableError, match=rf"a body of {length:,} bytes is announced"),
    ):
        client.pull_expert("python", expected=ExpectedWeights(MANIFEST))
    assert read == 0


@pytest.mark.parametrize("kind", [SAFETENSORS, "application/json", PROBLEM, "text/html"])
def test_a_body_without_a_length_is_cut_at_what_the_layout_allows(kind: str) -> None:
    sent = 0

    class Endless(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            nonlocal sent
            while True:
                sent += 1 << 16
                yield b" " * (1 << 16)

    reply = httpx2.MockTransport(lambda _: httpx2.Response(200, headers={"Content-Type": kind}, stream=Endless()))
    with (
        CoordinatorClient(URL, attempts=1, transport=reply) as client,
        pytest.raises(CoordinatorUnavailableError, match="no more are expected"),
    ):
        client.pull_expert("python", expected=ExpectedWeights(MANIFEST))
    assert sent <= 5 << 20


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b'{"a": [1, 2', b"\xff\xfe", b"9" * 5000, b'{"fedmoe": NaN}', b'{"min_sync_interval": 1e999}'],
)
def test_rubbish_in_json_is_told_as_such(body: bytes) -> None:
    with (
        answering(body, kind="application/json") as client,
        pytest.raises(CoordinatorUnavailableError, match="not a FedMoE coordinator"),
    ):
        client.federation()


@pytest.mark.parametrize("seconds", ["NaN", "Infinity", "-1", "1e9"])
def test_a_wait_no_worker_can_keep_is_no_answer(seconds: str) -> None:
    body = b'{"fedmoe": "1", "manifest": null, "min_sync_interval": %s, "wire_dtypes": ["fp32"]}' % seconds.encode()
    with (
        answering(body, kind="application/json") as client,
        pytest.raises(CoordinatorUnavailableError, match="seconds between pushes"),
    ):
        client.federation()


ESCAPES = "x\x1b[31mRED\x1b]0;pwn\x07\x9b2J\u202eevil\u2028"
SHOWN = "x\\x1b[31mRED\\x1b]0;pwn\\x07\\x9b2J\\u202eevil\\u2028"
CALLS: dict[str, Callable[[CoordinatorClient], object]] = {
    "pull": lambda client: client.pull_expert("python"),
    "push": lambda client: client.push(HEADER, b"body"),
    "list": lambda client: client.list_experts(),
}


@pytest.mark.parametrize("status", [400, 403, 404, 422, 503])
@pytest.mark.parametrize("call", CALLS)
def test_escapes_in_a_problem_reach_no_terminal(status: int, call: str) -> None:
    told = {"title": "x", "status": status, "code": ESCAPES[:40], "detail": ESCAPES, "fix": ESCAPES}
    with (
        answering(json.dumps(told).encode(), status, PROBLEM) as client,
        pytest.raises((RefusedError, CoordinatorUnavailableError)) as caught,
    ):
        CALLS[call](client)
    text = str(caught.value)
    assert SHOWN in text
    assert text.isprintable()
    assert getattr(caught.value, "code", "x").isprintable()


def test_nor_do_they_from_a_listing_or_a_header() -> None:
    row = {
        "name": "python",
        "version": 1,
        "rank": 2,
        "alpha": 4.0,
        "parameters": 9,
        "base": ESCAPES,
        "digest": "0" * 64,
    }
    listing = {"experts": [row | {ESCAPES: 1}], "gateway": None, "enable_gateway": True}
    with answering(json.dumps(listing).encode(), kind="application/json") as client:
        assert client.list_experts().experts[0].base == SHOWN
    with (
        answering(b"", 200, "text/\x9bhtml") as client,
        pytest.raises(CoordinatorUnavailableError) as caught,
    ):
        client.federation()
    assert str(caught.value).isprintable()


def test_a_message_without_end_is_shown_short() -> None:
    told = {"title": "x", "status": 422, "code": "y" * 9000, "detail": "z" * 1_000_000}
    with (
        answering(json.dumps(told).encode(), 422, PROBLEM) as client,
        pytest.raises(RefusedError) as caught,
    ):
        client.federation()
    assert len(str(caught.value)) < 3000


def test_an_answer_that_trickles_is_given_up() -> None:
    now = 0.0

    def clock() -> float:
        return now

    pace = transport._Pace(clock)
    pace.received(200)
    for _ in range(19):
        now += 1
        pace.received(1)
    now += 1
    with pytest.raises(httpcore2.ReadTimeout, match="trickles: 20 bytes in 20 s"):
        pace.received(1)


def test_a_slow_line_and_a_pause_on_it_are_no_trickle() -> None:
    now = 0.0
    pace = transport._Pace(lambda: now)
    for _ in range(100):  # 1.6 KiB/s, and before each piece a pause longer than the measurement
        pace.received(64 << 10)
        now += 40
    pace.sent()
    now += 500
    pace.received(1)
