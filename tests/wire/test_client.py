from __future__ import annotations

import json
import time
from pathlib import Path

import httpx2
import numpy as np
import pytest
from live import ADMIN, JOIN, House, LiveServer, content_digest, listening, open_house
from support import LAYOUT, MANIFEST, make_body, make_flat

from fedmoe.coordinator import Aggregation
from fedmoe.lora.codec import WIRE_DTYPES, WireDtype, encode
from fedmoe.lora.prompt_statistics import PromptStatistics, add_statistics
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError, TooStaleError
from fedmoe.wire.contract.administration import TokenRequest
from fedmoe.wire.contract.messages import (
    PROBLEM,
    SAFETENSORS,
    DataStatisticsHeader,
    StatisticRequest,
    UpdateHeader,
)


def header(sequence: int = 0, base_version: int = 0, answer: str = "result") -> UpdateHeader:
    fixed = {"expert": "python", "worker": "w1", "epoch": "e1", "loss": 1.5, "steps": 3}
    return UpdateHeader.model_validate(fixed | {"sequence": sequence, "base_version": base_version, "answer": answer})


def test_a_worker_registers_pulls_trains_pushes_and_pulls_again_d1(client: CoordinatorClient) -> None:
    assert client.healthy()
    assert client.federation().manifest is None
    assert client.register("python", "w1", MANIFEST).version == 0
    pulled = client.pull_expert("python")
    assert pulled is not None
    assert (pulled.name, pulled.version, pulled.manifest) == ("python", 0, MANIFEST)
    assert client.pull_expert("python", pulled.etag) is None
    pushed = client.push(header(), make_body(1))
    assert (pushed.result.version, pushed.newest) == (1, None)
    newer = client.pull_expert("python", pulled.etag)
    assert newer is not None
    np.testing.assert_array_equal(newer.weights, pulled.weights + make_flat(1))
    assert newer.adapter.alpha == MANIFEST.alpha


def test_data_statistics_travel_both_ways(client: CoordinatorClient) -> None:
    client.register("python", "w1", MANIFEST)
    bodies = [PromptStatistics.of(np.eye(4, dtype=np.float32) + seed).to_bytes() for seed in range(2)]
    for worker, body in zip(("w1", "w2"), bodies, strict=True):
        told = client.push_data_statistics(DataStatisticsHeader(expert="python", worker=worker, kind="prompts"), body)
        assert (told.expert, told.kind, told.duplicate) == ("python", "prompts", False)
    pulled = client.data_statistics("python", "prompts")
    assert pulled == add_statistics([PromptStatistics.from_bytes(body) for body in bodies]).to_bytes()
    with pytest.raises(RefusedError, match="no worker of 'python'") as refused:
        client.data_statistics("python", "moments")
    assert refused.value.code == "no_statistics"


@pytest.mark.parametrize("dtype", WIRE_DTYPES)
def test_every_precision_travels_both_ways(client: CoordinatorClient, dtype: WireDtype) -> None:
    client.register("python", "w1", MANIFEST)
    assert client.push(header(), encode(LAYOUT, make_flat(1), dtype)).result.version == 1
    exact, pulled = client.pull_expert("python"), client.pull_expert("python", dtype=dtype)
    gateway = client.pull_gateway()
    assert exact is not None
    assert pulled is not None
    assert pulled.digest == exact.digest
    np.testing.assert_allclose(pulled.weights, exact.weights, rtol=0, atol=0.01 * np.abs(exact.weights).max())
    assert gateway.sources == {"python": 1}


def test_the_gateway_comes_with_what_it_is_made_of_d8(client: CoordinatorClient) -> None:
    client.register("python", "w1", MANIFEST)
    client.register("law", "w2", MANIFEST)
    client.push(header(), make_body(1))
    client.push(header(sequence=1).model_copy(update={"expert": "law"}), make_body(2))
    pulled = client.pull_gateway()
    assert pulled.sources == {"law": 1, "python": 1}
    assert pulled.adapter.rank == 2 * LAYOUT.rank
    assert pulled.base["weights_hash"] == MANIFEST.base.weights_hash
    assert (pulled.version, pulled.digest) == (client.gateway_info().version, client.gateway_info().digest)


def test_the_newest_weights_come_with_the_answer_to_a_push(client: CoordinatorClient) -> None:
    client.register("python", "w1", MANIFEST)
    pushed = client.push(header(answer="weights"), make_body(1))
    pulled = client.pull_expert("python")
    assert pushed.newest is not None
    assert pulled is not None
    assert (pushed.newest.version, pushed.newest.digest) == (1, pulled.digest)
    np.testing.assert_array_equal(pushed.newest.weights, pulled.weights)
    assert client.pull_expert("python", pushed.newest.etag) is None


def test_a_stale_worker_gets_the_version_to_go_on_from_48(tmp_path: Path) -> None:
    with (
        open_house(tmp_path, Aggregation(max_staleness=0)) as house,
        listening(house.app) as server,
        CoordinatorClient(server.url) as client,
    ):
        client.register("python", "w1", MANIFEST)
        client.push(header(), make_body(1))
        with pytest.raises(TooStaleError, match="1 versions behind") as told:
            client.push(header(1, answer="weights"), make_body(2))
        with pytest.raises(TooStaleError) as bare:
            client.push(header(1), make_body(2))
    assert told.value.newest is not None
    assert told.value.newest.version == 1
    assert told.value.facts == {"newest_version": 1, "staleness": 1} == bare.value.facts
    assert bare.value.newest is None


def test_refusals_arrive_with_code_fix_and_facts(client: CoordinatorClient) -> None:
    client.register("python", "w1", MANIFEST)
    client.push(header(), make_body(1))
    with pytest.raises(RefusedError, match="already sent another update") as refused:
        client.push(header(), make_body(2))
    assert refused.value.code == "sequence_reused"
    assert refused.value.fix.startswith("Every update needs its own number")
    assert len(str(refused.value.facts["accepted_digest"])) == 64
    with pytest.raises(RefusedError, match="there is no expert 'law'"):
        client.pull_expert("law")
    with pytest.raises(RefusedError, match="the header claims"):
        client.push(header(1, 1), b"12345678")


def test_operators_roll_back_retract_and_handle_tokens(tmp_path: Path) -> None:
    with open_house(tmp_path, tokens=True) as house, listening(house.app) as server:
        with CoordinatorClient(server.url, JOIN, attempts=1) as worker:
            worker.register("python", "w1", MANIFEST)
            worker.push(header(), make_body(1))
            worker.push_statistic(StatisticRequest(expert="python", worker="w1", kind="loss", values={"x": 1.0}))
        with CoordinatorClient(server.url, ADMIN, attempts=1) as admin:
            assert admin.retract("python", "w1").removed == 1
            assert admin.roll_back("python", 1).version == 3
            made = admin.make_token(TokenRequest(worker="w2", experts=["python"]))
            with CoordinatorClient(server.url, made.token, attempts=1) as scoped:
                assert scoped.list_experts().experts[0].version == 3
                admin.revoke_token(made.hash)
                with pytest.raises(RefusedError, match="revoked"):
                    scoped.list_experts()
        with CoordinatorClient(server.url, attempts=1) as nobody:
            assert nobody.healthy()
            with pytest.raises(RefusedError, match="--token or FEDMOE_TOKEN"):
                nobody.federation()


class LosesAnswers(httpx2.BaseTransport):
    """A network on which the request arrives and the answer does not, a given number of times."""

    def __init__(self, losses: int) -> None:
        self.inner = httpx2.HTTPTransport(verify=False)
        self.losses = losses

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = self.inner.handle_request(request)
        if self.losses:
            self.losses -= 1
            response.read()
            response.close()
            raise httpx2.ReadError("connection reset")
        return response

    def close(self) -> None:
        self.inner.close()


def test_a_push_whose_answer_was_lost_is_repeated_and_counts_once_66(house: House, server: LiveServer) -> None:
    house.register("python")
    with CoordinatorClient(server.url, transport=LosesAnswers(1)) as client:
        with pytest.raises(CoordinatorUnavailableError, match="does not answer"):
            client.push(header(), make_body(1))
        assert house.service.coordinator.expert("python").version == 1
        result = client.push(header(), make_body(1)).result
    assert (result.version, result.duplicate) == (1, True)
    assert house.journal.count() == 2


def test_a_coordinator_that_restarts_mid_push_takes_the_same_update_once_66(tmp_path: Path) -> None:
    with open_house(tmp_path) as house:
        house.register("python")
        with listening(house.app) as server, server.connect() as connection:
            target = "/push_expert_update?expert=python&worker=w1&epoch=e1&sequence=0&base_version=0"
            lines = [f"POST {target} HTTP/1.1", "Host: 127.0.0.1", f"Content-Type: {SAFETENSORS}"]
            lines += [f"Content-Digest: {content_digest(make_body(1))}", f"Content-Length: {len(make_body(1))}", "", ""]
            connection.sendall("\r\n".join(lines).encode() + make_body(1)[:20])
            while not house.service.intake.uploads:
                time.sleep(0.005)
            port = server.port
            connection.close()
    with CoordinatorClient(f"http://127.0.0.1:{port}", attempts=1) as client:
        with pytest.raises(CoordinatorUnavailableError):
            client.push(header(), make_body(1))
        with open_house(tmp_path) as again, listening(again.app, port):
            first, second = (client.push(header(), make_body(1)).result for _ in range(2))
            assert (first.version, first.duplicate, second.duplicate) == (1, False, True)
            assert again.journal.count() == 2


def test_weights_that_were_damaged_on_their_way_are_not_used(house: House, server: LiveServer) -> None:
    house.register("python")

    class Damages(LosesAnswers):
        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            response = self.inner.handle_request(request)
            body = bytearray(response.read())
            body[-1] ^= 1
            return httpx2.Response(
                response.status_code, headers=response.headers, stream=httpx2.ByteStream(bytes(body))
            )

    with (
        CoordinatorClient(server.url, attempts=1, transport=Damages(0)) as client,
        pytest.raises(CoordinatorUnavailableError, match="digest mismatch"),
    ):
        client.pull_expert("python")


def test_nobody_listening_is_unavailable_and_told_at_once() -> None:
    with CoordinatorClient("http://127.0.0.1:9", attempts=1) as client:
        assert not client.healthy()
        with pytest.raises(CoordinatorUnavailableError, match="does not answer"):
            client.federation()


def test_a_url_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"'http://\[::1' is not a usable URL"):
        CoordinatorClient("http://[::1")


def busy(times: int, retry_after: str) -> tuple[httpx2.MockTransport, list[float]]:
    """A server that sheds load so many times, then answers; and when it was asked."""
    asked: list[float] = []
    told = {"title": "Service Unavailable", "status": 503, "code": "busy", "detail": "too many."}

    def answer(_: httpx2.Request) -> httpx2.Response:
        asked.append(time.monotonic())
        if len(asked) <= times:
            headers = {"content-type": PROBLEM, "retry-after": retry_after}
            return httpx2.Response(503, headers=headers, stream=httpx2.ByteStream(json.dumps(told).encode()))
        body = b'{"experts": [], "gateway": null, "enable_gateway": true}'
        return httpx2.Response(200, headers={"content-type": "application/json"}, stream=httpx2.ByteStream(body))

    return httpx2.MockTransport(answer), asked


def test_reads_wait_as_long_as_the_server_asked_65() -> None:
    transport, asked = busy(1, "1")
    with CoordinatorClient("http://coordinator.example", transport=transport) as client:
        assert client.list_experts().enable_gateway
    assert 1.0 <= asked[1] - asked[0] < 3.0


def test_a_server_cannot_make_a_client_wait_for_ever_65(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmoe.wire.client._LONGEST_WAIT", 0.1)
    transport, asked = busy(2, "1000000")
    with CoordinatorClient("http://coordinator.example", transport=transport) as client:
        client.list_experts()
    assert asked[-1] - asked[0] < 5


def test_a_push_is_tried_once_and_tells_how_long_to_wait_65() -> None:
    transport, asked = busy(9, "2")
    with (
        CoordinatorClient("http://coordinator.example", transport=transport) as client,
        pytest.raises(CoordinatorUnavailableError, match="busy: too many") as told,
    ):
        client.push(header(), b"body")
    assert (told.value.retry_after, len(asked)) == (2.0, 1)


def test_reads_give_up_after_their_attempts() -> None:
    transport, asked = busy(99, "0")
    with (
        CoordinatorClient("http://coordinator.example", attempts=3, transport=transport) as client,
        pytest.raises(CoordinatorUnavailableError),
    ):
        client.list_experts()
    assert len(asked) == 3
