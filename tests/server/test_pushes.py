from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from live import House, LiveServer, content_digest, open_house, push_headers, push_parameters
from numpy.typing import NDArray
from starlette.testclient import TestClient
from support import LAYOUT, make_body, make_flat

from fedmoe.coordinator import Aggregation
from fedmoe.lora.adapter import FloatVector
from fedmoe.lora.codec import encode
from fedmoe.lora.safetensors_bytes import header_bytes
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.messages import SAFETENSORS, UpdateHeader

Answer = tuple[int, str, str]
Array = NDArray[np.generic]
Named = dict[str, Array]


def send(
    client: TestClient, body: bytes, sequence: int = 0, base: int = 0, headers: dict[str, str | None] | None = None
) -> Answer:
    """Push a body; status, code and detail of the answer. A header given as None is left out."""
    given = {name.replace("_", "-").title(): value for name, value in (headers or {}).items()}
    wanted = {name: value for name, value in (push_headers(body) | given).items() if value is not None}
    answer = client.post("/push_expert_update", params=push_parameters(sequence, base), content=body, headers=wanted)
    found = answer.json()
    return answer.status_code, found.get("code", "ok"), found.get("detail", "")


def tensors(flat: FloatVector | None = None) -> Named:
    """The tensors of a correct update by their names."""
    numbers = make_flat(1) if flat is None else flat
    named: Named = {}
    for module, a, b in LAYOUT.factors(numbers):
        named |= {f"{module.name}.lora_A": a, f"{module.name}.lora_B": b}
    return named


_FORMAT = {"float32": "F32", "float64": "F64", "int8": "I8", "float16": "F16", "bfloat16": "BF16"}


def written(named: Named) -> bytes:
    """Arrays as safetensors bytes, in the order given, of whatever type."""
    header: dict[str, object] = {}
    data = b""
    for name, array in named.items():
        raw = np.ascontiguousarray(array).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": _FORMAT[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
        data += raw
    return header_bytes(header) + data


def raw(header: str, data: bytes = b"") -> bytes:
    """A body with this header text, right or wrong."""
    text = header.encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(offsets: str = "[0,4]", shape: str = "[1]", dtype: str = "F32") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


MALFORMED = {
    "26 empty": b"",
    "26 seven bytes": b"1234567",
    "27 header length 2^63": (1 << 63).to_bytes(8, "little") + b"{}",
    "27 header longer than the body": (1000).to_bytes(8, "little") + b"{}",
    "27 header of 101 MB": (101 << 20).to_bytes(8, "little") + b"{}",
    "28 bad JSON": raw("{'a': 1}"),
    "28 bad UTF-8": (4).to_bytes(8, "little") + b'{"\xff"',
    "28 an array": raw("[1,2]"),
    "28 nesting": raw('{"a":' + "[" * 50_000 + "]" * 50_000 + "}"),
    "28 half a surrogate pair": raw('{"\\ud800":' + entry() + "}", b"1234"),
    "29 overlap": raw(f'{{"a":{entry()},"b":{entry("[2,6]")}}}', b"123456"),
    "29 hole": raw(f'{{"a":{entry()},"b":{entry("[8,12]")}}}', b"x" * 12),
    "29 trailing bytes": raw(f'{{"a":{entry()}}}', b"12345"),
    "29 shape does not fit the bytes": raw(f'{{"a":{entry(shape="[2]")}}}', b"1234"),
    "29 shape 2^62": raw(f'{{"a":{entry(shape="[4611686018427387904]")}}}', b"1234"),
    "29 negative": raw(f'{{"a":{entry(offsets="[4,0]", shape="[-1]")}}}', b"1234"),
    "30 duplicate key": raw(f'{{"a":{entry()},"a":{entry()}}}', b"1234"),
    "31 100,000 tensors": raw("{" + ",".join(f'"t{i}":{entry("[0,0]", "[0]")}' for i in range(100_000)) + "}"),
    "31 100,000 dimensions": raw(f'{{"a":{entry(shape="[" + ",".join(["1"] * 100_000) + "]")}}}', b"1234"),
    "42 a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "42 a zip as torch.save writes": b"PK\x03\x04" + b"\x00" * 60,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_body_is_400_and_changes_nothing_26_to_31(house: House, http: TestClient, name: str) -> None:
    before = house.kept()
    status, code, detail = send(http, MALFORMED[name])
    expected = {"30 duplicate key": "duplicate_key", "31 100,000 tensors": "too_large"}.get(name, "malformed")
    assert (status, code) == (413 if expected == "too_large" else 400, expected)
    assert len(detail) < 2100
    assert house.kept() == before


def changed(name: str, array: Array | None) -> Named:
    """A correct update with one tensor replaced, or dropped."""
    named = tensors()
    named.pop(name)
    return named if array is None else named | {name: array}


F32 = np.float32
MISMATCHED: dict[str, tuple[Named, str, list[str]]] = {
    "32 missing": (changed("layers.0.q.lora_A", None), "tensor_mismatch", ["missing", "layers.0.q.lora_A"]),
    "32 extra": (
        changed("layers.0.q.lora_A", np.ones((2, 6), F32)) | {"x": np.ones(1, F32)},
        "tensor_mismatch",
        ["'x'"],
    ),
    "32 many others": (
        {f"wrong.{i}": np.ones(1, F32) for i in range(9)},
        "tensor_mismatch",
        ["13 tensors", "'wrong.4' and 4 more"],
    ),
    "33 rank": (changed("layers.0.q.lora_A", np.ones((8, 6), F32)), "rank_mismatch", ["rank 2", "rank 8"]),
    "33 shape": (changed("layers.0.q.lora_A", np.ones((2, 5), F32)), "shape_mismatch", ["[2, 6]", "[2, 5]"]),
    "33 swapped": (changed("layers.0.q.lora_A", np.ones((6, 2), F32)), "shape_mismatch", ["A is r x in"]),
    "34 F64": ({n: a.astype(np.float64) for n, a in tensors().items()}, "dtype_not_accepted", ["F64", "BF16"]),
    "34 F16": ({n: a.astype(np.float16) for n, a in tensors().items()}, "dtype_not_accepted", ["F16"]),
    "34 I8 without scales": ({n: a.astype(np.int8) for n, a in tensors().items()}, "tensor_mismatch", [".scale"]),
    "34 one tensor of another type": (
        changed("layers.0.q.lora_A", np.ones((2, 6), ml_dtypes.bfloat16)),
        "dtype_not_accepted",
        ["BF16", "F32"],
    ),
}


@pytest.mark.parametrize("name", MISMATCHED)
def test_a_body_that_is_not_the_manifests_is_422_with_the_difference_32_to_34(
    house: House, http: TestClient, name: str
) -> None:
    before = house.kept()
    named, code, shown = MISMATCHED[name]
    status, got, detail = send(http, written(named))
    assert (status, got) == (422, code)
    for text in shown:
        assert text in detail
    assert house.kept() == before


def test_an_fp8_tensor_is_422_and_no_key_error_34(http: TestClient) -> None:
    body = raw('{"layers.0.q.lora_A":' + entry("[0,12]", "[2,6]", "F8_E4M3") + "}", b"x" * 12)
    assert send(http, body)[:2] == (422, "dtype_not_accepted")


def test_the_order_of_names_does_not_matter_32(house: House, http: TestClient) -> None:
    before = house.service.coordinator.expert("python").adapter.flat
    assert send(http, written(dict(reversed(tensors().items()))))[0] == 200
    np.testing.assert_array_equal(house.service.coordinator.expert("python").adapter.flat, before + make_flat(1))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_numbers_that_are_not_finite_are_refused_by_name_36(
    house: House, http: TestClient, value: float, dtype: str
) -> None:
    before = house.kept()
    flat = make_flat(1)
    flat[LAYOUT.spans["layers.0.v"].middle + 1] = value
    named = tensors(flat)
    if dtype == "bf16":
        named = {name: array.astype(ml_dtypes.bfloat16) for name, array in named.items()}
    status, code, detail = send(http, written(named))
    assert (status, code) == (422, "not_finite")
    assert "layers.0.v.lora_B" in detail
    assert house.kept() == before


def test_a_scale_that_is_not_finite_is_refused_36(http: TestClient) -> None:
    body = bytearray(encode(LAYOUT, make_flat(1), "int8"))
    data = 8 + int.from_bytes(body[:8], "little")
    body[data : data + 4] = np.float32(np.inf).tobytes()
    assert send(http, bytes(body))[:2] == (422, "not_finite")


@pytest.mark.parametrize("value", [1e-40, -0.0, 0.0, 3.0e7])
def test_subnormal_zero_and_large_numbers_are_taken_36(house: House, http: TestClient, value: float) -> None:
    body = encode(LAYOUT, np.full(LAYOUT.size, value, np.float32))
    assert send(http, body)[0] == 200
    assert np.isfinite(house.service.coordinator.expert("python").adapter.flat).all()


@pytest.mark.parametrize("value", [1e10, 3e38])
def test_an_update_that_could_overflow_an_expert_is_refused_37(house: House, http: TestClient, value: float) -> None:
    """Two finite updates of 3e38 would make an infinite expert."""
    before = house.kept()
    status, code, detail = send(http, encode(LAYOUT, np.full(LAYOUT.size, value, np.float32)))
    assert (status, code) == (422, "norm_too_large")
    assert f"{value * LAYOUT.size**0.5:.3g}" in detail
    assert house.kept() == before


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"content_type": None}, 415, "unsupported_type"),
        ({"content_type": "application/octet-stream"}, 415, "unsupported_type"),
        ({"content_type": "application/x-pickle"}, 415, "unsupported_type"),
        ({"content_type": "multipart/form-data; boundary=x"}, 415, "unsupported_type"),
        ({"content_encoding": "gzip"}, 415, "unsupported_type"),
        ({"content_encoding": "zstd"}, 415, "unsupported_type"),
        ({"content_encoding": "br, identity"}, 415, "unsupported_type"),
        ({"content_digest": None}, 400, "digest_mismatch"),
        ({"content_digest": "sha-256=:AAAA:"}, 400, "digest_mismatch"),
        ({"content_digest": "sha-256=:!!!!:"}, 400, "digest_mismatch"),
        ({"content_digest": "md5=:1B2M2Y8AsgTpgAmY7PhCfg==:"}, 400, "digest_mismatch"),
        ({"content_digest": content_digest(b"another body")}, 400, "digest_mismatch"),
    ],
)
def test_wrong_types_encodings_and_digests_are_refused_24_25_42(
    house: House, http: TestClient, headers: dict[str, str | None], status: int, code: str
) -> None:
    """Fault 40."""
    before = house.kept()
    assert send(http, make_body(1), headers=headers)[:2] == (status, code)
    assert house.kept() == before


def test_a_type_with_parameters_and_other_case_is_taken_24(http: TestClient) -> None:
    headers: dict[str, str | None] = {"content_type": f"{SAFETENSORS.upper()}; x=1", "content_encoding": "identity"}
    assert send(http, make_body(1), headers=headers)[0] == 200


def test_after_a_damaged_body_the_same_number_may_be_sent_again_25(http: TestClient) -> None:
    assert send(http, make_body(1), headers={"content_digest": content_digest(b"")})[1] == "digest_mismatch"
    assert send(http, make_body(1))[0] == 200


def test_the_same_push_again_is_answered_without_a_second_effect_43(house: House, http: TestClient) -> None:
    body = make_body(1)

    def pushed() -> dict[str, object]:
        answer = http.post("/push_expert_update", params=push_parameters(), content=body, headers=push_headers(body))
        found: dict[str, object] = answer.json()
        return found

    first, before = pushed(), house.kept()
    again = pushed()
    assert again == first | {"duplicate": True}
    assert house.kept() == before


def test_a_duplicate_is_answered_even_if_its_base_is_too_old_by_now_43(house: House, http: TestClient) -> None:
    object.__setattr__(house.service.coordinator.aggregation, "max_staleness", 1)
    for sequence in range(4):
        assert send(http, make_body(sequence), sequence, sequence)[0] == 200
    assert send(http, make_body(0), 0, 0)[:2] == (200, "ok")
    assert send(http, make_body(9), 9, 0)[:2] == (409, "too_stale")


def test_other_bytes_under_a_used_number_are_409_and_leave_no_blob_44(house: House, http: TestClient) -> None:
    assert send(http, make_body(1))[0] == 200
    before = house.kept()
    status, code, detail = send(http, make_body(2))
    assert (status, code) == (409, "sequence_reused")
    assert "number 0" in detail
    assert house.kept() == before


def test_the_same_bytes_for_another_expert_under_a_used_number_are_409_44(house: House, http: TestClient) -> None:
    house.register("law")
    body = make_body(1)
    assert send(http, body)[0] == 200
    parameters = push_parameters() | {"expert": "law"}
    answer = http.post("/push_expert_update", params=parameters, content=body, headers=push_headers(body))
    assert (answer.status_code, answer.json()["code"]) == (409, "sequence_reused")


def test_reordered_pushes_are_judged_by_their_base_and_wait_for_nothing_45(http: TestClient) -> None:
    assert send(http, make_body(5), 5, 0)[0] == 200
    answer = http.post(
        "/push_expert_update",
        params=push_parameters(4, 0),
        content=make_body(4),
        headers=push_headers(make_body(4)),
    ).json()
    assert (answer["version"], answer["staleness"]) == (2, 1)


def test_a_base_version_from_the_future_is_409_and_shows_the_newest_47(house: House, http: TestClient) -> None:
    before, body = house.kept(), make_body(1)
    answer = http.post("/push_expert_update", params=push_parameters(0, 7), content=body, headers=push_headers(body))
    found = answer.json()
    assert (answer.status_code, found["code"], found["newest_version"]) == (409, "unknown_version", 0)
    assert "version 7" in found["detail"]
    assert "Pull the expert again" in found["fix"]
    assert house.kept() == before


def test_a_push_for_an_unknown_expert_lists_the_known_ones(http: TestClient) -> None:
    body = make_body(1)
    parameters = push_parameters() | {"expert": "law"}
    answer = http.post("/push_expert_update", params=parameters, content=body, headers=push_headers(body))
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_expert")
    assert "python" in answer.json()["detail"]


def header(sequence: int = 0, worker: str = "w1") -> UpdateHeader:
    return UpdateHeader(expert="python", worker=worker, epoch="e1", sequence=sequence, base_version=0)


def test_the_same_push_on_many_connections_at_once_lands_once_46(house: House, server: LiveServer) -> None:
    together = threading.Barrier(6)
    results = []

    def push() -> None:
        with CoordinatorClient(server.url) as client:
            client.healthy()
            together.wait()
            results.append(client.push(header(), make_body(1)).result)

    threads = [threading.Thread(target=push) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.version for result in results] == [1] * 6
    assert sorted(result.duplicate for result in results) == [False] + [True] * 5
    versions, events, files = house.kept()
    assert (versions, events, len(files)) == ({"python": 1}, 2, 1)


def test_after_an_io_error_on_disk_nothing_is_promised_any_more_9(
    house: House, http: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", broken)
        assert send(http, make_body(1))[:2] == (503, "storage_failed")
    assert send(http, make_body(2), sequence=1)[:2] == (503, "storage_failed")
    health = http.get("/healthz")
    assert (health.status_code, health.json()["status"]) == (503, "failed")
    assert house.service.coordinator.expert("python").version == 0
    assert http.get("/list_experts").status_code == 200


def test_an_update_far_above_the_usual_norm_is_scaled_down_visibly_and_for_ever_37(tmp_path: Path) -> None:
    aggregation = Aggregation(staleness="constant", clip_norm=3.0)
    with open_house(tmp_path, aggregation) as house, house.client() as http:
        house.register("python")
        for number in range(6):
            assert send(http, make_body(number), sequence=number)[0] == 200
        usual = sorted(float(np.linalg.norm(make_flat(number))) for number in range(6))
        huge = 1e4 * make_flat(7)
        answer = http.post(
            "/push_expert_update",
            params=push_parameters(6, 0),
            content=(body := encode(LAYOUT, huge)),
            headers=push_headers(body),
        ).json()
        expected = 3.0 * (usual[2] + usual[3]) / 2 / float(np.linalg.norm(huge))
        assert answer["coefficient"] == pytest.approx(expected, rel=1e-5)
        digest = house.service.coordinator.expert("python").digest
    with open_house(tmp_path, aggregation) as again:
        expert = again.service.coordinator.expert("python")
        assert expert.digest == digest
        assert expert.norms[-1] == pytest.approx(3.0 * (usual[2] + usual[3]) / 2, rel=1e-5)
        assert len(expert.norms) == 7
