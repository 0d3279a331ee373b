from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from live import House, LiveServer, listening, open_house, push_headers, push_parameters
from starlette.testclient import TestClient
from support import LAYOUT, MANIFEST, make_body

from fedmoe.lora.adapter import Layout, ModuleShape
from fedmoe.server.routes.json_weights import JsonPolicy, json_pieces
from fedmoe.server.routes.routes import create_app
from fedmoe.wire.contract.messages import SAFETENSORS

#: A million numbers, 20 MB of JSON: more than the buffers of a connection take.
LARGE = replace(MANIFEST, layout=Layout((ModuleShape("layer", 200_000, 50_000),), 4))
PATH = "/get_all_expert_weights"
floats = st.floats(allow_nan=False, allow_infinity=False, width=32)
matrices = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=floats)


@contextmanager
def serving(folder: Path, policy: JsonPolicy) -> Iterator[LiveServer]:
    """A coordinator with one large expert, on a socket."""
    with open_house(folder) as house:
        house.register("python", manifest=LARGE)
        with listening(create_app(house.service, house.gate, json=policy)) as running:
            yield running


def ask(server: LiveServer) -> socket.socket:
    """A connection that has asked for JSON, has its first bytes, and reads no further."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(f"GET {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    assert connection.recv(12) == b"HTTP/1.1 200"
    return connection


def comes_free(server: LiveServer, seconds: float = 20.0) -> bool:
    """Whether an answer in JSON begins within the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with httpx2.stream("GET", server.url + PATH) as answer:
            if answer.status_code == 200:
                return True
        time.sleep(0.02)
    return False


@given(matrices, matrices)
def test_every_number_is_written_as_python_writes_it_and_none_is_changed(a: np.ndarray, b: np.ndarray) -> None:
    text = b"".join(json_pieces({"version": 3}, [("m.1", a, b), ("m.2", b, a)]))
    expected = {name: {"lora_A": x.tolist(), "lora_B": y.tolist()} for name, x, y in (("m.1", a, b), ("m.2", b, a))}
    found = json.loads(text)
    assert json.dumps(found) == json.dumps({"version": 3, "modules": expected})  # tells -0.0 from 0.0 too
    assert (np.array(found["modules"]["m.1"]["lora_A"], np.float32).view(np.uint32) == a.view(np.uint32)).all()


@pytest.mark.parametrize("shape", [(1, 100_000), (3, 40_000), (40_000, 3), (16_384, 1), (1, 16_384), (2, 16_385)])
def test_an_answer_is_written_in_small_pieces(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    pieces = list(json_pieces({"version": 0}, [("m", values, values.T)]))
    assert max(map(len, pieces)) < 500_000
    modules = json.loads(b"".join(pieces))["modules"]
    assert modules["m"]["lora_A"] == values.tolist()
    assert modules["m"]["lora_B"] == values.T.tolist()


def test_many_small_modules_are_written_in_few_pieces() -> None:
    small = np.ones((2, 2), np.float32)
    pieces = list(json_pieces({"version": 0}, [(f"m{number}", small, small) for number in range(6_000)]))
    assert len(pieces) <= sum(map(len, pieces)) // 60_000 + 1
    assert len(json.loads(b"".join(pieces))["modules"]) == 6_000


def test_more_numbers_than_are_written_as_json_are_406_and_the_advice_works(house: House) -> None:
    house.register("python", "law")
    for limit, status in ((2 * LAYOUT.size, 200), (2 * LAYOUT.size - 1, 406)):
        app = create_app(house.service, house.gate, json=JsonPolicy(limit))
        with TestClient(app, base_url="http://127.0.0.1") as client:
            answer = client.get(PATH)
            assert answer.status_code == status
    told = answer.json()
    assert (told["code"], told["numbers"], told["json_limit"]) == ("not_acceptable", 2 * LAYOUT.size, limit)
    assert f"'Accept: {SAFETENSORS}'" in told["fix"]
    with TestClient(app, base_url="http://127.0.0.1", headers={"Accept": SAFETENSORS}) as client:
        assert client.get(PATH).status_code == 200


def test_a_push_that_asks_for_too_much_json_is_refused_before_it_changes_anything(house: House) -> None:
    house.register("python")
    before, body = house.kept(), make_body(1)
    app = create_app(house.service, house.gate, json=JsonPolicy(LAYOUT.size - 1))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        parameters, headers = push_parameters(answer="weights"), push_headers(body)
        answer = client.post("/push_expert_update", params=parameters, content=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (406, "not_acceptable")
        assert house.kept() == before
        headers["Accept"] = SAFETENSORS
        answer = client.post("/push_expert_update", params=parameters, content=body, headers=headers)
        assert (answer.status_code, answer.headers["fedmoe-version"]) == (200, "1")


def test_two_answers_are_written_at_once_and_whoever_leaves_gives_the_slot_back(tmp_path: Path) -> None:
    with serving(tmp_path, JsonPolicy()) as server, ExitStack() as open_ones:
        first, _ = (open_ones.enter_context(ask(server)) for _ in range(2))
        refused = httpx2.get(server.url + PATH)
        assert (refused.status_code, refused.json()["code"]) == (429, "json_busy")
        assert int(refused.headers["retry-after"]) > 0
        binary = httpx2.get(server.url + PATH, headers={"Accept": SAFETENSORS})
        assert binary.status_code == 200
        assert httpx2.get(server.url + "/healthz").status_code == 200
        first.close()
        assert comes_free(server)


def test_a_receiver_that_reads_too_slowly_loses_its_slot_21(tmp_path: Path) -> None:
    with serving(tmp_path, JsonPolicy(receiver_seconds=0.5)) as server, ExitStack() as open_ones:
        slow = [open_ones.enter_context(ask(server)) for _ in range(2)]
        assert comes_free(server)
        for connection in slow:
            while part := connection.recv(1 << 20):
                last = part
            assert not last.endswith(b"0\r\n\r\n")  # an answer that was broken off does not pass for a whole one


def test_a_push_that_has_landed_waits_for_a_slot_instead_of_being_refused(tmp_path: Path) -> None:
    with serving(tmp_path, JsonPolicy(receiver_seconds=1.0)) as server, ExitStack() as open_ones:
        for _ in range(2):
            open_ones.enter_context(ask(server))
        body = make_body(1, layout=LARGE.layout)
        parameters, headers = push_parameters(answer="weights"), push_headers(body)
        with httpx2.stream(
            "POST", server.url + "/push_expert_update", params=parameters, content=body, headers=headers, timeout=30
        ) as answer:
            assert answer.status_code == 200
