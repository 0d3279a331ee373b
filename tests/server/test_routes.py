from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from live import House, content_digest, open_house, push_headers, push_parameters
from safetensors.numpy import load
from starlette.testclient import TestClient
from support import LAYOUT, MANIFEST, make_body, make_flat

from fedmoe.coordinator import Aggregation
from fedmoe.lora.adapter import Layout
from fedmoe.lora.codec import WIRE_DTYPES, decode, encode
from fedmoe.lora.manifest import BaseModel, Manifest
from fedmoe.wire.contract.messages import SAFETENSORS, ManifestMessage

BINARY = {"Accept": SAFETENSORS}


def push(client: TestClient, seed: int, sequence: int, base_version: int, **others: str | float) -> dict[str, object]:
    """A push that must be accepted."""
    body = make_body(seed)
    parameters = push_parameters(sequence, base_version, **others)
    answer = client.post("/push_expert_update", params=parameters, content=body, headers=push_headers(body))
    assert answer.status_code == 200, answer.text
    found: dict[str, object] = answer.json()
    return found


def register(client: TestClient, expert: str, manifest: Manifest = MANIFEST) -> object:
    message = {"expert": expert, "worker": "w1", "manifest": ManifestMessage.of(manifest).model_dump(mode="json")}
    return client.post("/register_expert", json=message)


def test_an_expert_that_is_registered_is_listed_with_its_workers_and_the_gateway_b3(house: House) -> None:
    with house.client() as client:
        assert client.get("/list_experts").json() == {"experts": [], "gateway": None, "enable_gateway": True}
        info = register(client, "python").json()  # type: ignore[attr-defined]
        assert (info["name"], info["version"], info["parameters"]) == ("python", 0, LAYOUT.size)
        push(client, 1, 0, 0, loss=1.5, steps=7, tokens=900)
        while not (listing := client.get("/list_experts").json())["experts"][0]["workers"]:
            pass  # the roster follows the answer, it does not hold it up
    (expert,) = listing["experts"]
    assert (expert["name"], expert["version"]) == ("python", 1)
    (worker,) = expert["workers"]
    assert (worker["worker"], worker["loss"], worker["steps"], worker["tokens"]) == ("w1", 1.5, 7, 900)
    assert listing["gateway"]["sources"] == {"python": 1}


def test_registering_an_expert_twice_gives_the_one_there_is(house: House) -> None:
    with house.client() as client:
        first = register(client, "python").json()  # type: ignore[attr-defined]
        assert register(client, "python").json() == first  # type: ignore[attr-defined]
    assert house.journal.count() == 1


def test_an_update_lands_with_its_weight_by_staleness_b4_d2(house: House, http: TestClient) -> None:
    before = house.service.coordinator.expert("python").adapter.flat
    first, second = push(http, 1, 0, 0), push(http, 2, 1, 0)
    assert (first["version"], first["staleness"], first["coefficient"]) == (1, 0, 1.0)
    assert (second["version"], second["staleness"], second["coefficient"]) == (2, 1, pytest.approx(2**-0.5))
    after = house.service.coordinator.expert("python").adapter.flat
    expected = (before + make_flat(1)) + np.float32(2**-0.5) * make_flat(2)
    np.testing.assert_allclose(after, expected, rtol=0, atol=1e-7)


def test_every_accepted_update_raises_the_gateways_version_d3(http: TestClient) -> None:
    versions = [push(http, seed, seed, seed)["gateway_version"] for seed in range(3)]
    assert versions == [2, 3, 4]
    assert http.get("/get_gateway_info").json()["version"] == 4


@pytest.mark.parametrize("dtype", WIRE_DTYPES)
def test_an_expert_is_pulled_as_safetensors_in_every_precision_b5(house: House, http: TestClient, dtype: str) -> None:
    push(http, 1, 0, 0)
    answer = http.post("/get_expert_weights", json={"expert": "python", "dtype": dtype}, headers=BINARY)
    assert answer.headers["content-digest"] == content_digest(answer.content)
    got = decode(answer.content, LAYOUT)
    assert got.wire_dtype == dtype
    wanted = house.service.coordinator.expert("python")
    assert answer.headers["fedmoe-digest"] == wanted.digest
    tolerance = {"fp32": 0.0, "bf16": 2**-8, "int8": 1 / 127}[dtype] * np.abs(wanted.adapter.flat).max()
    np.testing.assert_allclose(got.flat, wanted.adapter.flat, rtol=0, atol=tolerance)
    info = json.loads(got.metadata["fedmoe"])
    assert (info["expert"], info["version"], info["manifest"]["rank"]) == ("python", 1, LAYOUT.rank)


@pytest.mark.parametrize("dtype", WIRE_DTYPES)
def test_an_update_is_taken_in_every_precision_b4(house: House, http: TestClient, dtype: str) -> None:
    before = house.service.coordinator.expert("python").adapter.flat
    body = encode(LAYOUT, make_flat(1), dtype)  # type: ignore[arg-type]
    answer = http.post("/push_expert_update", params=push_parameters(), content=body, headers=push_headers(body))
    assert answer.json()["version"] == 1
    after = house.service.coordinator.expert("python").adapter.flat
    np.testing.assert_array_equal(after, before + decode(body, LAYOUT).flat)


def test_people_with_curl_get_json_with_every_number_b5(house: House, http: TestClient) -> None:
    answer = http.post("/get_expert_weights", json={"expert": "python"})
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()
    assert (found["expert"], found["version"]) == ("python", 0)
    for module, a, b in house.service.coordinator.expert("python").adapter.factors():
        np.testing.assert_array_equal(np.array(found["modules"][module.name]["lora_A"], np.float32), a)
        np.testing.assert_array_equal(np.array(found["modules"][module.name]["lora_B"], np.float32), b)


def test_the_gateway_is_served_with_its_sources_and_equal_weights_b1_d4(house: House) -> None:
    house.register("python", "law")
    with house.client() as client:
        push(client, 1, 0, 0)
        push(client, 2, 0, 0, expert="law", worker="w2")
        answer = client.get("/get_gateway_weights", headers=BINARY)
        as_json = client.get("/get_gateway_weights").json()
    info = json.loads(decode(answer.content, Layout(LAYOUT.modules, 4)).metadata["fedmoe"])
    assert info["sources"] == {"law": 1, "python": 1} == as_json["sources"]
    assert info["weights"] == {"law": 0.5, "python": 0.5}
    experts = house.service.coordinator.experts
    for module in LAYOUT.modules:
        factors = as_json["modules"][module.name]
        product = np.array(factors["lora_B"]) @ np.array(factors["lora_A"]) * (as_json["alpha"] / as_json["rank"])
        parts = [(e.adapter.scale, *e.adapter.module(module.name)) for e in experts.values()]
        np.testing.assert_allclose(product, sum(0.5 * scale * (b @ a) for scale, a, b in parts), atol=1e-7)


def test_the_strategy_sum_gives_every_expert_its_whole_weight_d5(tmp_path: Path) -> None:
    with open_house(tmp_path, Aggregation(strategy="sum")) as house:
        house.register("python", "law")
        with house.client() as client:
            push(client, 1, 0, 0, expert="python")
            push(client, 2, 1, 0, expert="law")
            info = client.get("/get_gateway_info").json()
    assert (info["strategy"], info["weights"]) == ("sum", {"law": 1.0, "python": 1.0})


@pytest.mark.parametrize("dtype", WIRE_DTYPES)
def test_all_experts_come_in_one_answer_b2(house: House, dtype: str) -> None:
    house.register("python", "law", "python-2")
    with house.client() as client:
        push(client, 1, 0, 0)
        answer = client.get("/get_all_expert_weights", params={"dtype": dtype}, headers=BINARY)
        alone = client.post("/get_expert_weights", json={"expert": "python", "dtype": dtype}, headers=BINARY)
    assert answer.headers["content-digest"] == content_digest(answer.content)
    assert int(answer.headers["content-length"]) == len(answer.content)
    tensors = names_to_bytes(answer.content)
    assert {name.partition("/")[0] for name in tensors} == {"python", "law", "python-2"}
    expected = names_to_bytes(alone.content)
    assert {
        name.removeprefix("python/"): raw for name, raw in tensors.items() if name.startswith("python/")
    } == expected


def names_to_bytes(body: bytes) -> dict[str, bytes]:
    length = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + length])
    header.pop("__metadata__")
    data = body[8 + length :]
    return {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}


def test_fifty_experts_of_many_modules_still_come_in_one_answer_b2(house: House) -> None:
    """The header then outgrows the cap of our own reader; safetensors itself reads it."""
    names = [f"expert-{index}" for index in range(50)]
    many = Layout(tuple(type(LAYOUT.modules[0])(f"model.layers.{i}.self_attn.q_proj", 2, 2) for i in range(120)), 1)
    house.register(*names, manifest=Manifest(MANIFEST.base, many, 1.0))
    with house.client() as client:
        answer = client.get("/get_all_expert_weights", headers=BINARY)
        as_json = client.get("/get_all_expert_weights").json()
    assert len(load(answer.content)) == 2 * 120 * 50 == 2 * len(as_json["modules"])


def test_without_experts_there_is_nothing_to_get_b2(house: House) -> None:
    with house.client() as client:
        answer = client.get("/get_all_expert_weights")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_expert")


@pytest.mark.parametrize("accept", [SAFETENSORS, "*/*"])
def test_weights_that_the_caller_has_are_not_sent_again(http: TestClient, accept: str) -> None:
    def pull(tag: str | None) -> tuple[int, bytes, str]:
        headers = {"Accept": accept} | ({"If-None-Match": tag} if tag else {})
        answer = http.post("/get_expert_weights", json={"expert": "python"}, headers=headers)
        return answer.status_code, answer.content, answer.headers["etag"]

    status, body, tag = pull(None)
    assert status == 200
    assert len(body) > 0
    assert pull(tag) == (304, b"", tag)
    assert pull(f'"other", W/{tag}')[0] == 304
    push(http, 1, 0, 0)
    status, body, newer = pull(tag)
    assert (status, newer != tag, len(body) > 0) == (200, True, True)


def test_a_newer_version_is_never_answered_with_what_was_encoded_before(house: House, http: TestClient) -> None:
    """Also not after a rollback, which brings the same numbers back as another version."""

    def pull() -> tuple[int, bytes]:
        body = http.post("/get_expert_weights", json={"expert": "python"}, headers=BINARY).content
        got = decode(body, LAYOUT)
        return json.loads(got.metadata["fedmoe"])["version"], got.flat.tobytes()

    first = pull()
    push(http, 1, 0, 0)
    second = pull()
    http.post("/rollback", json={"expert": "python", "to_version": 0})
    third = pull()
    assert [version for version, _ in (first, second, third)] == [0, 1, 2]
    assert first[1] == third[1] != second[1]


def test_every_form_of_the_same_weights_has_its_own_tag(http: TestClient) -> None:
    forms = [(BINARY, dtype) for dtype in WIRE_DTYPES] + [({}, "fp32")]
    tags = [http.get("/get_gateway_weights", params={"dtype": d}, headers=h).headers["etag"] for h, d in forms]
    assert len(set(tags)) == 4


def test_a_push_can_be_answered_with_the_newest_weights(house: House, http: TestClient) -> None:
    push(http, 1, 0, 0)
    body = make_body(2)
    parameters = push_parameters(1, 0, answer="weights")
    answer = http.post("/push_expert_update", params=parameters, content=body, headers=push_headers(body) | BINARY)
    result = json.loads(answer.headers["fedmoe-result"])
    assert (result["version"], result["staleness"]) == (2, 1)
    np.testing.assert_array_equal(
        decode(answer.content, LAYOUT).flat, house.service.coordinator.expert("python").adapter.flat
    )
    shown = http.post("/push_expert_update", params=parameters, content=body, headers=push_headers(body)).json()
    assert shown["result"]["duplicate"] is True
    assert set(shown["modules"]) == {module.name for module in LAYOUT.modules}


def test_whoever_is_too_stale_gets_the_newest_version_in_the_same_answer_48(tmp_path: Path) -> None:
    with open_house(tmp_path, Aggregation(max_staleness=1)) as house:
        house.register("python")
        with house.client() as client:
            for sequence in range(3):
                push(client, sequence, sequence, sequence)
            before, body = house.kept(), make_body(9)
            plain, binary = (
                client.post(
                    "/push_expert_update",
                    params=push_parameters(9, 0, answer=wanted),
                    content=body,
                    headers=push_headers(body) | headers,
                )
                for wanted, headers in (("result", {}), ("weights", BINARY))
            )
            newest = house.service.coordinator.expert("python")
        assert (plain.status_code, plain.json()["code"]) == (409, "too_stale")
        assert (plain.json()["newest_version"], plain.json()["staleness"]) == (3, 3)
        assert "Pull the newest version" in plain.json()["fix"]
        assert (binary.status_code, binary.headers["fedmoe-version"]) == (409, "3")
        assert json.loads(binary.headers["fedmoe-result"])["code"] == "too_stale"
        np.testing.assert_array_equal(decode(binary.content, LAYOUT).flat, newest.adapter.flat)
        assert house.kept() == before


def test_rollback_and_retraction_over_http(house: House, http: TestClient) -> None:
    start = house.service.coordinator.expert("python").digest
    push(http, 1, 0, 0)
    first = house.service.coordinator.expert("python").digest
    push(http, 2, 0, 1, worker="w2")
    changed = http.post("/retract", json={"expert": "python", "worker": "w2", "reason": "bad data"}).json()
    assert (changed["version"], changed["removed"], changed["digest"]) == (3, 1, first)
    changed = http.post("/rollback", json={"expert": "python", "to_version": 0}).json()
    assert (changed["version"], changed["digest"]) == (4, start)
    assert http.get("/get_gateway_info").json()["version"] == 5
    again = http.post("/retract", json={"expert": "python", "worker": "w2"})
    assert (again.status_code, again.json()["code"]) == (409, "nothing_to_retract")
    future = http.post("/rollback", json={"expert": "python", "to_version": 99})
    assert (future.status_code, future.json()["code"]) == (409, "unknown_version")


def test_statistics_are_kept_and_told(http: TestClient) -> None:
    told = {"expert": "python", "worker": "w1", "kind": "held_out_loss", "values": {"loss": 1.25}}
    assert http.post("/push_statistics", json=told).status_code == 204
    (kept,) = http.get("/statistics", params={"expert": "python"}).json()
    assert (kept["worker"], kept["kind"], kept["values"]) == ("w1", "held_out_loss", {"loss": 1.25})
    assert http.get("/statistics", params={"expert": "law"}).json() == []
    assert http.post("/push_statistics", json=told | {"expert": "law"}).json()["code"] == "unknown_expert"


def test_a_gateway_without_experts_says_what_to_start_d9(house: House) -> None:
    with house.client() as client:
        answer = client.get("/get_gateway_weights")
    found = answer.json()
    assert (answer.status_code, found["code"]) == (404, "gateway_not_initialised")
    assert "Start at least one worker" in found["fix"]


def test_a_coordinator_without_a_gateway_says_so_b6(tmp_path: Path) -> None:
    with open_house(tmp_path, Aggregation(enable_gateway=False)) as house:
        house.register("python")
        with house.client() as client:
            push(client, 1, 0, 0)
            answer = client.get("/get_gateway_weights")
            listing = client.get("/list_experts").json()
    assert (answer.status_code, answer.json()["code"]) == (404, "gateway_disabled")
    assert "--enable-gateway" in answer.json()["fix"]
    assert (listing["gateway"], listing["enable_gateway"], listing["experts"][0]["version"]) == (None, False, 1)


@pytest.mark.parametrize(
    ("manifest", "code", "shown"),
    [
        (Manifest(MANIFEST.base, LAYOUT.with_rank(8), 4.0), "lora_mismatch", ["expected 2", "got 8"]),
        (Manifest(MANIFEST.base, LAYOUT, 16.0), "lora_mismatch", ["expected 4", "got 16"]),
        (
            Manifest(MANIFEST.base, Layout(LAYOUT.modules[:1], 2), 4.0),
            "lora_mismatch",
            ["module missing: layers.0.v", "--target-modules"],
        ),
        (
            Manifest(BaseModel("other/base", "main", "c" * 64, "b" * 64), LAYOUT, 4.0),
            "base_mismatch",
            ["a" * 64, "c" * 64, "tiny/base", "other/base"],
        ),
        (
            Manifest(BaseModel("tiny/base", "main", "a" * 64, "d" * 64), LAYOUT, 4.0),
            "base_mismatch",
            ["b" * 64, "d" * 64],
        ),
    ],
)
def test_another_base_or_lora_configuration_is_refused_with_both_values_35_d7(
    house: House, http: TestClient, manifest: Manifest, code: str, shown: list[str]
) -> None:
    before = house.kept()
    answer = register(http, "law", manifest)
    found = answer.json()  # type: ignore[attr-defined]
    assert found["code"] == code
    assert found["status"] == 409
    for text in shown:
        assert text in found["detail"] + found["fix"]
    assert house.kept() == before


def test_a_worker_learns_where_experts_start_from(tmp_path: Path) -> None:
    with open_house(tmp_path, Aggregation(merge_after=7)) as online, online.client() as client:
        told = client.get("/federation").json()
    assert (told["start_from"], told["merge_after"]) == ("gateway", 7)


def test_a_worker_learns_the_federation_before_it_loads_a_model(house: House) -> None:
    with house.client() as client:
        assert client.get("/federation").json()["manifest"] is None
        register(client, "python")
        found = client.get("/federation").json()
    assert ManifestMessage.model_validate(found["manifest"]).manifest() == MANIFEST
    assert found["wire_dtypes"] == ["fp32", "bf16", "int8"]
    assert found["min_sync_interval"] == 1.0


def test_a_manifest_too_large_to_keep_or_to_send_is_refused_before_memory_is_taken(house: House) -> None:
    message = ManifestMessage.of(MANIFEST).model_dump(mode="json")
    giant = message | {"rank": 1024, "modules": [[f"m{i}", 1 << 24, 1 << 24] for i in range(100)]}
    wordy = message | {"modules": [[f"{'x' * 150}.{i}", 2, 2] for i in range(1000)]}
    with house.client() as client:
        for manifest, word in ((giant, "parameters"), (wordy, "characters")):
            answer = client.post("/register_expert", json={"expert": "e", "worker": "w", "manifest": manifest})
            assert (answer.status_code, answer.json()["code"]) == (409, "expert_too_large")
            assert word in answer.json()["detail"]
    assert house.journal.count() == 0


def test_unknown_routes_and_methods_are_problems_too(http: TestClient) -> None:
    missing, wrong = http.get("/nothing"), http.get("/push_expert_update")
    assert (missing.status_code, missing.json()["code"]) == (404, "unknown_route")
    assert (wrong.status_code, wrong.json()["code"]) == (405, "method_not_allowed")
    assert missing.headers["content-type"] == "application/problem+json"
