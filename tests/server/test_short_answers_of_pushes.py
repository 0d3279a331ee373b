"""Short answers to pushes: the one update of another worker that landed in between, instead of the weights."""

from __future__ import annotations

import json
from dataclasses import replace

import httpx2
import numpy as np
import pytest
from live import House, push_headers, push_parameters
from starlette.testclient import TestClient
from support import MANIFEST as SMALL
from support import make_body, make_flat, sha256

from fedmoe.lora.adapter import Layout, ModuleShape
from fedmoe.lora.codec import decode, encode
from fedmoe.lora.update_rules import add_scaled
from fedmoe.wire.contract.messages import SAFETENSORS

# Wide enough that its numbers are longer than their names.
LAYOUT = Layout((ModuleShape("layers.0.q", 256, 256),), 8)
MANIFEST = replace(SMALL, layout=LAYOUT)
SHORT = {"Accept": SAFETENSORS, "Prefer": "return=minimal, fedmoe-other-update"}


def narrow(seed: int) -> bytes:
    """An update in the narrowest precision, so that few are shorter than the weights."""
    return encode(LAYOUT, make_flat(seed, LAYOUT), "int8")


def push(http: TestClient, body: bytes, worker: str, base: int, headers: dict[str, str] = SHORT) -> httpx2.Response:
    parameters = push_parameters(0, base, worker=worker, answer="weights")
    answer = http.post("/push_expert_update", params=parameters, content=body, headers=push_headers(body) | headers)
    assert answer.status_code == 200, answer.text
    return answer


def is_short(answer: httpx2.Response) -> bool:
    """Whether no weights came."""
    assert ("preference-applied" in answer.headers) != ("fedmoe-version" in answer.headers)
    return "preference-applied" in answer.headers


@pytest.fixture
def http(house: House) -> TestClient:
    house.register("python", "law", manifest=MANIFEST)
    return house.client()


def test_base_plus_what_comes_plus_what_was_sent_is_the_newest_version_to_the_bit(
    house: House, http: TestClient
) -> None:
    start = house.service.coordinator.expert("python").state.weights
    push(http, narrow(1), "w1", 0)
    answer = push(http, narrow(2), "w2", 0)
    result = json.loads(answer.headers["fedmoe-result"])
    assert is_short(answer)
    assert answer.content == narrow(1)
    assert result["other"]["digest"] == sha256(narrow(1))
    weights = add_scaled(start, decode(answer.content, LAYOUT).flat, result["other"]["coefficient"])
    weights = add_scaled(weights, decode(narrow(2), LAYOUT).flat, result["coefficient"])
    newest = house.service.coordinator.expert("python")
    assert (result["version"], result["weights_digest"]) == (2, newest.digest)
    np.testing.assert_array_equal(weights, newest.state.weights)
    again = push(http, narrow(2), "w2", 0)
    assert again.content == answer.content


def test_an_older_program_gets_the_weights(http: TestClient) -> None:
    push(http, narrow(1), "w1", 0)
    assert not is_short(push(http, narrow(2), "w2", 0, SHORT | {"Prefer": "return=minimal"}))


def test_of_several_updates_only_the_sum_is_told(http: TestClient) -> None:
    """Each of them is as confidential as the data it was made of."""
    push(http, narrow(1), "w1", 0)
    push(http, narrow(2), "w2", 1)
    assert not is_short(push(http, narrow(3), "w3", 0))


def test_an_update_that_is_longer_than_the_weights_or_not_kept_does_not_come(house: House, http: TestClient) -> None:
    push(http, make_body(1, LAYOUT), "w1", 0)
    assert not is_short(push(http, narrow(2), "w2", 0)), "one in float32 is as long as the weights"
    assert is_short(push(http, narrow(3), "w3", 1))
    house.blobs.delete(sha256(narrow(3)))
    assert not is_short(push(http, narrow(4), "w4", 2))


def test_what_is_no_update_in_between_does_not_come(house: House, http: TestClient) -> None:
    push(http, narrow(1), "w1", 0)
    assert http.post("/rollback", json={"expert": "python", "to_version": 0}).status_code == 200
    assert not is_short(push(http, narrow(2), "w2", 1))
