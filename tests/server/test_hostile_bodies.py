"""Bodies that are meant to be shown or unpacked."""

from __future__ import annotations

import gzip
import zlib

import psutil
import pytest
from live import House, push_headers, push_parameters
from starlette.testclient import TestClient
from support import LAYOUT, make_body, make_flat

from fedmoe.lora.codec import encode
from fedmoe.lora.safetensors_bytes import MAX_METADATA_CHARACTERS

ESCAPES = "\x1b[2J\x1b]0;owned\x07\u202etxt.exe\r\n"


def send(http: TestClient, body: bytes, **headers: str) -> tuple[int, str, str]:
    answer = http.post(
        "/push_expert_update", params=push_parameters(), content=body, headers={**push_headers(body), **headers}
    )
    return answer.status_code, answer.json().get("code", ""), answer.text


def test_metadata_with_control_characters_is_never_shown_39(
    house: House, http: TestClient, capfd: pytest.CaptureFixture[str]
) -> None:
    body = encode(LAYOUT, make_flat(1), metadata={ESCAPES: ESCAPES})
    status, _, text = send(http, body)
    assert status == 200
    shown = text + http.get("/list_experts").text + http.get("/get_gateway_info").text + "".join(capfd.readouterr())
    assert "owned" not in shown


def test_metadata_beyond_its_cap_and_names_with_control_characters_are_refused_inertly_39(
    house: House, http: TestClient, capfd: pytest.CaptureFixture[str]
) -> None:
    before = house.kept()
    good = make_body(1)
    length = int.from_bytes(good[:8], "little")
    names = good[8 : 8 + length].replace(b"layers.0.q.lora_A", b"layers.0\\u001b[2J.A")
    wrong = len(names).to_bytes(8, "little") + names + good[8 + length :]
    huge = b'{"__metadata__":{"a":"%s"}}' % (b"x" * (MAX_METADATA_CHARACTERS + 1))
    huge += b" " * (-len(huge) % 8)
    for body, code in ((wrong, "tensor_mismatch"), (len(huge).to_bytes(8, "little") + huge, "malformed")):
        status, found, text = send(http, body)
        assert (status, found) == (422 if code == "tensor_mismatch" else 400, code)
        assert len(text) < 3000
        assert "\x1b" not in text + "".join(capfd.readouterr())
    assert house.kept() == before


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd", "br", "identity, gzip"])
def test_a_compressed_body_is_refused_and_never_unpacked_40(house: House, http: TestClient, encoding: str) -> None:
    before = house.kept()
    bomb = gzip.compress(bytes(64 << 20), 9) if "gzip" in encoding else zlib.compress(bytes(64 << 20), 9)
    used = psutil.Process().memory_info().rss
    status, code, _ = send(http, bomb, **{"Content-Encoding": encoding})
    assert (status, code) == (415, "unsupported_type")
    assert psutil.Process().memory_info().rss - used < 32 << 20
    assert house.kept() == before
