"""What workers tell of their data: taken whole or not at all, merged, kept over a restart, and in the gateway."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import JOIN, House, content_digest, open_house, push_headers, push_parameters
from reported_data import REGMEAN, SIZES, body_of, moments, prompts, send
from starlette.testclient import TestClient
from support import make_body

from fedmoe.cli.gateway import _show_info
from fedmoe.coordinator import Aggregation, GatewayModel
from fedmoe.lora.moments import InputMoments, merge_moments
from fedmoe.lora.prompt_statistics import add_statistics
from fedmoe.lora.regmean import regmean
from fedmoe.lora.safetensors_bytes import encode_named, read_named
from fedmoe.server.statistics import data_statistics
from fedmoe.server.statistics.data_statistics import newest_of_each
from fedmoe.server.storage.records import DataStatistic
from fedmoe.wire.contract.experts import GatewayInfo
from fedmoe.wire.contract.messages import SAFETENSORS

GET = "/data_statistics"


def fetched(client: TestClient, kind: str, expert: str = "python") -> bytes:
    answer = client.get(GET, params={"expert": expert, "kind": kind})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == SAFETENSORS
    assert answer.headers["content-digest"] == content_digest(answer.content)
    return answer.content


@pytest.fixture
def two(tmp_path: Path) -> Iterator[House]:
    """Two trained experts whose gateway is to be made by regmean."""
    with open_house(tmp_path, REGMEAN) as opened:
        opened.register("python", "sql")
        with opened.client() as client:
            for seed, expert in enumerate(["python", "sql"]):
                body = make_body(seed)
                parameters = push_parameters(seed, expert=expert)
                assert client.post(
                    "/push_expert_update", params=parameters, content=body, headers=push_headers(body)
                ).is_success
        yield opened


# What arrives.


@pytest.mark.parametrize("kind", ["prompts", "moments"])
def test_statistics_of_one_worker_come_back_as_they_were_sent(http: TestClient, kind: str) -> None:
    body = body_of(kind, 1)
    status, told = send(http, kind, body)
    assert (status, told["duplicate"], told["digest"]) == (200, False, hashlib.sha256(body).hexdigest())
    assert fetched(http, kind) == body


def test_those_of_several_workers_are_merged_in_the_order_of_their_names(http: TestClient) -> None:
    for worker, seed in (("w2", 2), ("w1", 1), ("w3", 3)):
        assert send(http, "moments", body_of("moments", seed), worker)[0] == 200
        assert send(http, "prompts", body_of("prompts", seed), worker)[0] == 200
    assert fetched(http, "moments") == merge_moments([moments(1), moments(2), moments(3)]).to_bytes()
    assert fetched(http, "prompts") == add_statistics([prompts(1), prompts(2), prompts(3)]).to_bytes()


def test_newer_ones_of_a_worker_take_the_place_of_earlier_ones(http: TestClient) -> None:
    for seed in (1, 2):
        assert send(http, "moments", body_of("moments", seed))[0] == 200
    assert fetched(http, "moments") == body_of("moments", 2)


def test_moments_raise_the_gateways_version_and_nothing_else_does(house: House, http: TestClient) -> None:
    found = [
        send(http, kind, body_of(kind, seed))[1]
        for kind, seed in (("prompts", 1), ("moments", 1), ("moments", 1), ("prompts", 2), ("moments", 2))
    ]
    assert [told["gateway_version"] for told in found] == [1, 2, 2, 2, 3]
    assert [told["duplicate"] for told in found] == [False, False, True, False, False]
    assert house.service.coordinator.gateway_version == 3
    assert len(house.journal.data_statistics()) == 4


def test_who_has_them_already_gets_304(http: TestClient) -> None:
    send(http, "moments", body_of("moments", 1))
    parameters = {"expert": "python", "kind": "moments"}
    tag = http.get(GET, params=parameters).headers["etag"]
    assert http.get(GET, params=parameters, headers={"If-None-Match": tag}).status_code == 304
    send(http, "moments", body_of("moments", 2), "w2")
    assert http.get(GET, params=parameters, headers={"If-None-Match": tag}).status_code == 200


# What is refused, and leaves nothing behind.


def tampered(part: str, values: object) -> bytes:
    """Good moments with one tensor replaced."""
    tensors = read_named(moments(1).to_bytes()) | {part: np.asarray(values, np.float32)}
    return encode_named(tensors, {"format": "fedmoe-weighted-input-moments", "tokens": "50", "seed": "0"})


def scalar_spread() -> bytes:
    named = {f"{half}.{part}": np.zeros(3, np.float32) for half in ("first", "second") for part in ("mean", "rest")}
    named |= {f"{half}.spread": np.zeros((), np.float32) for half in ("first", "second")}
    return encode_named(named, {"format": "fedmoe-prompt-statistics", "version": "2", "first": "1", "second": "1"})


NAN = [[np.nan] * 3] * 6
BAD = {
    "empty": ("moments", b"", 400, "malformed"),
    "no safetensors": ("moments", b"\x80\x04pickle..........", 400, "malformed"),
    "an update": ("moments", make_body(1), 422, "format"),
    "the other kind": ("prompts", moments(1).to_bytes(), 422, "format"),
    "a module too few": ("moments", moments(1, {"layers.0.q": 6}).to_bytes(), 422, "statistics_mismatch"),
    "a module too many": ("moments", moments(1, SIZES | {"x": 6}).to_bytes(), 422, "statistics_mismatch"),
    "another width": ("moments", moments(1, SIZES | {"layers.0.q": 7}).to_bytes(), 422, "statistics_mismatch"),
    "a NaN": ("moments", tampered("layers.0.q.sketch", NAN), 422, "statistics_mismatch"),
    "a negative square": ("moments", tampered("layers.0.q.diagonal", [-1] * 6), 422, "statistics_mismatch"),
    "absurd numbers": ("moments", tampered("layers.0.q.diagonal", [1e30] * 6), 422, "statistics_mismatch"),
    "a number for a matrix": ("prompts", scalar_spread(), 422, "statistics_mismatch"),
    "too many bytes": ("prompts", bytes((32 << 20) + 1), 413, "too_large"),
    "moments beyond their cap": ("moments", bytes(2 << 20), 413, "too_large"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_body_is_refused_and_changes_nothing(house: House, http: TestClient, name: str) -> None:
    kind, body, status, code = BAD[name]
    before = house.kept()
    found, told = send(http, kind, body)
    assert (found, told["code"]) == (status, code)
    assert house.kept() == before
    assert house.journal.data_statistics() == []
    assert house.service.coordinator.gateway_version == 1


def test_what_does_not_go_with_other_workers_is_refused_but_may_replace_ones_own(
    house: House, http: TestClient
) -> None:
    assert send(http, "moments", moments(1, columns=3).to_bytes())[0] == 200
    before = house.kept()
    status, told = send(http, "moments", moments(2, columns=4).to_bytes(), "w2")
    assert (status, told["code"]) == (422, "statistics_mismatch")
    assert "other workers" in str(told["detail"])
    assert house.kept() == before
    assert send(http, "moments", moments(1, columns=4).to_bytes())[0] == 200


def test_prompt_features_of_one_federation_have_one_width(house: House, http: TestClient) -> None:
    house.register("sql")
    assert send(http, "prompts", prompts(1, 5).to_bytes())[0] == 200
    status, told = send(http, "prompts", prompts(2, 4).to_bytes(), expert="sql")
    assert (status, told["code"]) == (422, "statistics_mismatch")
    assert send(http, "prompts", prompts(1, 4).to_bytes())[0] == 200


def test_a_body_that_is_not_what_its_digest_promised_is_refused(house: House, http: TestClient) -> None:
    before = house.kept()
    status, told = send(http, "moments", body_of("moments", 1), Content_Digest=content_digest(b"other"))
    assert (status, told["code"]) == (400, "digest_mismatch")
    assert send(http, "moments", body_of("moments", 1), Content_Type="application/octet-stream")[0] == 415
    assert house.kept() == before


def test_an_unknown_expert_kind_or_statistic_is_told(http: TestClient) -> None:
    assert send(http, "moments", body_of("moments", 1), expert="nobody")[1]["code"] == "unknown_expert"
    assert send(http, "texts", b"x")[1]["code"] == "invalid_request"
    answers = [http.get(GET, params={"expert": name, "kind": "prompts"}) for name in ("nobody", "python")]
    assert [answer.json()["code"] for answer in answers] == ["unknown_expert", "no_statistics"]


def test_a_token_is_asked_for(locked_house: House) -> None:
    locked_house.register("python")
    body = body_of("moments", 1)
    with locked_house.client() as stranger, locked_house.client(JOIN) as member:
        assert send(stranger, "moments", body)[0] == 401
        assert stranger.get(GET, params={"expert": "python", "kind": "moments"}).status_code == 401
        assert send(member, "moments", body)[0] == 200
        assert fetched(member, "moments") == body


# What the gateway makes of them.


def logged(capsys: pytest.CaptureFixture[str]) -> str:
    """What was logged, wherever earlier tests have led the log."""
    return "".join(capsys.readouterr())


def gateway(house: House) -> GatewayModel:
    return house.service.gateway()


def test_regmean_falls_back_until_every_expert_has_moments_and_says_so(
    two: House, capsys: pytest.CaptureFixture[str]
) -> None:
    with two.client() as client:
        send(client, "moments", body_of("moments", 1))
        before = client.get("/get_gateway_info", params={"merged": True}).json()
        assert (before["strategy"], before["statistics"]) == ("scaled", {})
        assert before["notes"] == ["regmean was asked for; without input moments of sql it became scaled"]
        assert "it became scaled" in logged(capsys)
        send(client, "moments", body_of("moments", 2), expert="sql")
        after = client.get("/get_gateway_info", params={"merged": True}).json()
    assert (after["strategy"], after["notes"]) == ("regmean", [])
    assert after["version"] == before["version"] + 1
    assert after["digest"] != before["digest"]
    sent = {"python": body_of("moments", 1), "sql": body_of("moments", 2)}
    assert after["statistics"] == {name: hashlib.sha256(body).hexdigest() for name, body in sent.items()}
    assert after["statistics_tokens"] == {"python": 5_000, "sql": 5_000}


def test_the_command_shows_of_how_many_tokens_moments_are_and_that_they_are_thin(
    two: House, capsys: pytest.CaptureFixture[str]
) -> None:
    with two.client() as client:
        send(client, "moments", body_of("moments", 1))
        send(client, "moments", moments(2, tokens=417).to_bytes(), expert="sql")
        told = GatewayInfo.model_validate(client.get("/get_gateway_info", params={"merged": True}).json())
    capsys.readouterr()
    _show_info(told, as_json=False)
    shown = capsys.readouterr().out
    assert "input moments of so many tokens: python 5,000, sql 417" in shown
    assert "note: sql has input moments of 417 tokens only, fewer than 1,024" in shown


def test_a_regmean_gateway_is_what_its_experts_and_the_served_moments_make(two: House) -> None:
    with two.client() as client:
        for seed, (expert, worker) in enumerate((("python", "w1"), ("python", "w2"), ("sql", "w1"))):
            send(client, "moments", body_of("moments", seed), worker, expert)
        served = {name: fetched(client, "moments", name) for name in ("python", "sql")}
    built = gateway(two)
    assert built.statistics == {name: hashlib.sha256(body).hexdigest() for name, body in served.items()}
    experts = {name: expert.adapter for name, expert in two.service.coordinator.experts.items()}
    expected = regmean(experts, {name: InputMoments.from_bytes(body) for name, body in served.items()}, energy=0.99)
    assert built.adapter.rank == expected.adapter.rank <= 4
    np.testing.assert_array_equal(built.adapter.flat, expected.adapter.flat)


def test_the_rank_asked_for_wins_over_the_energy(tmp_path: Path) -> None:
    with open_house(tmp_path, Aggregation(strategy="regmean", gateway_rank=1)) as house:
        house.register("python", "sql")
        with house.client() as client:
            for seed, expert in enumerate(["python", "sql"]):
                send(client, "moments", body_of("moments", seed), expert=expert)
        assert (gateway(house).strategy, gateway(house).adapter.rank) == ("regmean", 1)


def test_other_strategies_do_not_look_at_moments(house: House, http: TestClient) -> None:
    before = gateway(house).digest
    send(http, "moments", body_of("moments", 1))
    assert (gateway(house).digest, gateway(house).statistics, gateway(house).notes) == (before, {}, ())
    assert house.service.coordinator.transaction().moments == {}


# After a restart.


def test_a_restart_keeps_statistics_gateway_and_version(two: House, tmp_path: Path) -> None:
    with two.client() as client:
        for seed, (expert, worker) in enumerate((("python", "w1"), ("python", "w2"), ("sql", "w1"), ("python", "w1"))):
            send(client, "moments", body_of("moments", seed), worker, expert)
        send(client, "prompts", body_of("prompts", 1))
        kept = {kind: fetched(client, kind) for kind in ("moments", "prompts")}
    before, replaced = gateway(two), hashlib.sha256(body_of("moments", 0)).hexdigest()
    assert replaced in set(two.blobs.digests())
    two.service.close()
    with open_house(tmp_path, REGMEAN) as again, again.client() as client:
        after = gateway(again)
        assert (after.version, after.digest, after.statistics) == (before.version, before.digest, before.statistics)
        assert {kind: fetched(client, kind) for kind in kept} == kept
        assert replaced not in set(again.blobs.digests())


def test_lost_statistics_are_said_to_be_missing_and_taken_again(
    two: House, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with two.client() as client:
        for seed, expert in enumerate(["python", "sql"]):
            send(client, "moments", body_of("moments", seed), expert=expert)
    before = gateway(two)
    two.service.close()
    two.blobs.delete(hashlib.sha256(body_of("moments", 0)).hexdigest())
    with open_house(tmp_path, REGMEAN) as again, again.client() as client:
        assert "statistics_lost" in logged(capsys)
        assert "without input moments of python" in gateway(again).notes[0]
        status, told = send(client, "moments", body_of("moments", 0))
        assert (status, told["duplicate"]) == (200, False)
        assert (gateway(again).digest, gateway(again).version) == (before.digest, before.version + 1)


NAMES = st.sampled_from(["a", "b"])


@given(st.lists(st.tuples(NAMES, NAMES, st.sampled_from(["prompts", "moments"]))))
def test_of_every_expert_worker_and_kind_the_last_counts(keys: list[tuple[str, str, str]]) -> None:
    arrived = [DataStatistic(*key, str(place), 1, float(place)) for place, key in enumerate(keys)]
    found = newest_of_each(arrived)
    last = {key: str(place) for place, key in enumerate(keys)}
    assert {(one.expert, one.worker, one.kind): one.digest for one in found} == last
    assert [(one.expert, one.kind, one.worker) for one in found] == sorted(
        (expert, kind, worker) for expert, worker, kind in last
    )


# What a listing says, and what an older fedmoe left.


def listed(client: TestClient) -> dict[str, str | None]:
    return {expert["name"]: expert["prompts"] for expert in client.get("/list_experts").json()["experts"]}


def test_a_listing_names_the_prompt_statistics_of_every_expert(two: House) -> None:
    with two.client() as client:
        assert listed(client) == {"python": None, "sql": None}
        send(client, "moments", body_of("moments", 1))
        send(client, "prompts", body_of("prompts", 1))
        before = listed(client)
        tag = client.get(GET, params={"expert": "python", "kind": "prompts"}).headers["etag"].strip('"')
        assert before == {"python": tag, "sql": None}
        send(client, "prompts", body_of("prompts", 1))
        assert listed(client) == before
        send(client, "prompts", body_of("prompts", 2), "w2")
        assert listed(client)["python"] not in (None, tag)


def test_statistics_of_an_older_version_count_as_none(two: House) -> None:
    old = encode_named(
        dict(read_named(body_of("prompts", 1))), {"format": "fedmoe-prompt-statistics", "first": "10", "second": "10"}
    )
    writer = two.service.intake._blobs.writer()
    writer.write(old)
    digest = writer.commit()
    two.service.journal.add_data_statistic(DataStatistic("python", "old", "prompts", digest, len(old), 1.0))
    with two.client() as client:
        assert client.get(GET, params={"expert": "python", "kind": "prompts"}).json()["code"] == "no_statistics"
        assert send(client, "prompts", body_of("prompts", 2))[0] == 200
        assert fetched(client, "prompts") == body_of("prompts", 2)
        status, told = send(client, "prompts", old, "w2")
        assert (status, told["code"]) == (422, "version")


def test_statistics_of_too_many_workers_are_refused_and_a_known_worker_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_statistics, "_MOST_WORKERS", 2)
    with open_house(tmp_path) as house, house.client() as client:
        house.register("python")
        codes = [send(client, "prompts", body_of("prompts", seed), worker=f"w{seed}")[0] for seed in range(3)]
        assert codes == [200, 200, 429]
        assert send(client, "prompts", body_of("prompts", 9), worker="w0")[0] == 200
        monkeypatch.setattr(data_statistics, "_MOST_BYTES", 10)
        _, refused = send(client, "prompts", body_of("prompts", 8), worker="w0")
        assert (refused["code"], "--no-send-statistics" in str(refused["fix"])) == ("too_many_statistics", True)
