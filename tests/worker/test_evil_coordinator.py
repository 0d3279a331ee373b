"""A worker in front of a coordinator that answers wrongly for a while: it trains on, says why, and takes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx2
import numpy as np
import pytest
import structlog
from workers import PUSH, Federation, Road, Setup, local, wait_for_answer

from fedmoe.distributed_worker import DistributedWorker
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.codec import decode, digest, encode
from fedmoe.lora.manifest import Manifest
from fedmoe.lora.safetensors_bytes import read_header
from fedmoe.qwen_worker import StepRecord
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.contract.messages import PROBLEM, SAFETENSORS
from fedmoe.wire.pulled_weights import body_headers

Lie = Callable[[httpx2.Response, bytes], httpx2.Response]


def answered(status: int, body: bytes, kind: str, **headers: str) -> httpx2.Response:
    named = {"Content-Type": kind} | {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx2.Response(status, headers=named, stream=httpx2.ByteStream(body))


def altered(change: Callable[[dict[str, object], np.ndarray], None], honest: bool = True) -> Lie:
    """The real answer with other weights or facts; `honest`: with the digest of what is sent."""

    def lie(response: httpx2.Response, body: bytes) -> httpx2.Response:
        _, metadata, _ = read_header(body)
        info = json.loads(metadata["fedmoe"])
        manifest = Manifest.from_json(info["manifest"])
        flat = decode(body, manifest.layout).flat.copy()
        change(info, flat)
        if honest:
            info["digest"] = digest(Adapter(manifest.layout, manifest.alpha, flat))
        changed = encode(manifest.layout, flat, "fp32", {"fedmoe": json.dumps(info)})
        kept = {name: value for name, value in response.headers.items() if name.startswith("fedmoe")}
        return httpx2.Response(200, headers=kept | body_headers(changed), stream=httpx2.ByteStream(changed))

    return lie


def fill(value: float) -> Callable[[dict[str, object], np.ndarray], None]:
    return lambda info, flat: flat.fill(value)


ESCAPES = json.dumps({"title": "x", "status": 503, "code": "busy", "detail": "x\x1b[31mRED\x1b]0;pwn\x07"}).encode()
LIES: dict[str, tuple[Lie, str]] = {
    "login page": (lambda _, body: answered(200, b"<html>login</html>", "text/html"), "not a FedMoE coordinator"),
    "broken JSON": (lambda _, body: answered(200, b'{"a": [1,2,', "application/json"), "not a FedMoE coordinator"),
    "rubbish": (lambda _, body: answered(200, b"\xff" * 99, SAFETENSORS, **_described(b"\xff" * 99)), "not a FedMoE"),
    "NaN": (altered(fill(np.nan)), "not finite"),
    "1e30": (altered(fill(1e30)), "as large as 1e"),
    "zeros of another digest": (altered(fill(0.0), honest=False), "other weights than its digest names"),
    "another expert": (altered(lambda info, flat: info.update(expert="evil")), "the expert 'evil'"),
    "below all versions": (altered(lambda info, flat: info.update(version=-7)), "version -7"),
    "40 GiB": (lambda _, body: answered(200, b"x", SAFETENSORS, Content_Length=str(40 << 30)), "is announced"),
    "redirect": (lambda _, body: answered(302, b"", "text/html", Location="file:///etc/passwd"), "redirects to file"),
    "gzip": (lambda _, body: answered(200, b"\x1f\x8b00", SAFETENSORS, Content_Encoding="gzip"), "not a FedMoE"),
    "busy for ever": (lambda _, body: answered(503, ESCAPES, PROBLEM, Retry_After="1000000000"), r"\x1b[31mRED"),
}


def _described(body: bytes) -> dict[str, str]:
    return {"Content_Digest": body_headers(body)["Content-Digest"]}


class Lying(Road):
    """The way to a coordinator whose next `times` answers with weights are replaced by a lie."""

    def __init__(self, lie: Lie, times: int) -> None:
        super().__init__()
        self._lie, self.times = lie, times
        self.without = "prefer"  # so that there are weights to lie about

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = super().handle_request(request)
        if self.times and request.url.path == PUSH and response.status_code == 200:
            self.times -= 1
            body = response.read()
            response.close()
            return self._lie(response, body)
        return response


@pytest.mark.parametrize("name", LIES)
def test_rubbish_is_waited_out_and_nothing_of_it_is_taken_69(
    name: str, house: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmoe.wire.delivery._FIRST_PAUSE", 0.01)
    monkeypatch.setattr("fedmoe.wire.delivery._LONGEST_ASKED", 0.01)
    lie, words = LIES[name]
    road = Lying(lie, times=2)
    taken: list[int] = []

    def follow(worker: DistributedWorker, record: StepRecord) -> None:
        wait_for_answer(worker, record)
        assert worker._base is not None
        taken.append(worker._base.version)

    with structlog.testing.capture_logs() as said:
        worker = Setup(house.url, tmp_path / "w1", steps=6, every=2, road=road, after_step=follow).run()
    away = [line for line in said if line["event"] == "coordinator_away"]
    assert len(away) == 2
    assert all(words in str(line["reason"]) and str(line["reason"]).isprintable() for line in away)
    assert taken == sorted(taken), "no version fell"
    assert [update.sequence for update in house.updates()] == [0, 1, 2]
    assert np.isfinite(local(worker)).all()
    np.testing.assert_array_equal(house.weights, local(worker))


@pytest.mark.parametrize("code", ["forbidden", "upgrade_required", "made_up"])
def test_a_refusal_ends_it_with_the_update_kept_and_it_goes_on_when_the_coordinator_is_right_again(
    code: str, house: Federation, tmp_path: Path
) -> None:
    told = {"title": "x", "status": 403, "code": code, "detail": "evil\x1b[2J"}

    def refuse(response: httpx2.Response, body: bytes) -> httpx2.Response:
        return answered(403, json.dumps(told).encode(), PROBLEM)

    road = Lying(refuse, times=1)
    setup = Setup(house.url, tmp_path / "w1", steps=6, every=2, road=road, after_step=wait_for_answer)
    with pytest.raises(RefusedError, match=r"evil\\x1b\[2J"):
        setup.run()
    assert (tmp_path / "w1" / "update-0.safetensors").exists()
    setup.road = Road()
    worker = setup.run()
    assert [update.sequence for update in house.updates()] == sorted({u.sequence for u in house.updates()})
    np.testing.assert_array_equal(house.weights, local(worker))
