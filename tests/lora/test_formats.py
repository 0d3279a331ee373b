from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from lora_cases import adapters, bulk, dense, distance, laws, norm, random_adapter

from fedmoe.lora.adapter import Adapter, Layout, ModuleShape
from fedmoe.lora.formats import PEFT_CONFIG, PEFT_WEIGHTS, npz_bytes, peft_files, read_npz, read_peft
from fedmoe.lora.safetensors_bytes import CodecError, MalformedError, MismatchError, encode_named

LAYOUT = Layout((ModuleShape("model.layers.0.q_proj", 6, 4), ModuleShape("model.layers.0.up_proj", 3, 5)), 2)
PREFIX = "base_model.model.model.layers.0.q_proj."
Files = dict[str, bytes]


def with_config(**changes: object) -> Files:
    files = peft_files(random_adapter(LAYOUT, 0, alpha=2.0), "base")
    config = json.loads(files[PEFT_CONFIG]) | changes
    return files | {PEFT_CONFIG: json.dumps(config).encode()}


def with_tensors(change: Callable[[dict[str, np.ndarray]], None]) -> Files:
    adapter = random_adapter(LAYOUT, 0, alpha=2.0)
    tensors = {}
    for module, a, b in adapter.factors():
        tensors[f"base_model.model.{module.name}.lora_A.weight"] = a
        tensors[f"base_model.model.{module.name}.lora_B.weight"] = b
    change(tensors)
    return with_config() | {PEFT_WEIGHTS: encode_named(tensors)}


@laws
@given(adapters())
def test_a_peft_folder_gives_the_product_back(adapter: Adapter) -> None:
    again = read_peft(peft_files(adapter, "base", "abc"))
    assert (again.layout, again.scale) == (adapter.layout, 1)
    assert distance(dense(again), dense(adapter)) <= 1e-6 * bulk(adapter)


def test_a_peft_config_holds_what_every_reader_agrees_on() -> None:
    config = json.loads(peft_files(random_adapter(LAYOUT, 0), "org/base", "abc")[PEFT_CONFIG])
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["use_dora"]) == (2, 2, False, False)
    assert config["target_modules"] == ["q_proj", "up_proj"]
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "abc")


def test_alpha_and_rslora_are_read_into_the_scale() -> None:
    product = dense(read_peft(with_config()))
    for changes, scale in (({"lora_alpha": 16}, 8.0), ({"lora_alpha": 16, "use_rslora": True}, 16 / 2**0.5)):
        adapter = read_peft(with_config(**changes))
        assert adapter.scale == pytest.approx(scale)
        expected = {name: scale * values for name, values in product.items()}
        assert distance(dense(adapter), expected) <= 1e-6 * norm(expected)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("lora_bias", True),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["w"]),
        ("peft_type", "LOHA"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
    ],
)
def test_anything_but_plain_lora_is_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(MismatchError, match=option) as caught:
        read_peft(with_config(**{option: value}))
    assert caught.value.code == "not_plain_lora"


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_as_it_is_are_plain_lora(start: object) -> None:
    assert read_peft(with_config(init_lora_weights=start)).layout == LAYOUT


def test_a_rank_that_is_not_the_tensors_is_refused() -> None:
    with pytest.raises(MismatchError, match="says r = 3, the tensors have rank 2") as caught:
        read_peft(with_config(r=3))
    assert caught.value.code == "rank_mismatch"


TENSOR_FAULTS: dict[str, tuple[str, Callable[[dict[str, np.ndarray]], None]]] = {
    "no B": ("tensor_mismatch", lambda tensors: tensors.__delitem__(f"{PREFIX}lora_B.weight")),
    "nothing": ("tensor_mismatch", lambda tensors: tensors.clear()),
    "magnitude": ("not_plain_lora", lambda t: t.update({f"{PREFIX}lora_magnitude_vector": np.ones(4, np.float32)})),
    "embedding": ("not_plain_lora", lambda t: t.update({f"{PREFIX}lora_embedding_A": np.ones((2, 4), np.float32)})),
    "no prefix": ("not_plain_lora", lambda t: t.update({"q.lora_A.weight": np.ones((2, 4), np.float32)})),
    "odd name": ("not_plain_lora", lambda t: t.update({f"{PREFIX}../.lora_A.weight": np.ones((2, 4), np.float32)})),
    "one axis": ("not_plain_lora", lambda t: t.update({f"{PREFIX}lora_A.weight": np.ones(4, np.float32)})),
    "empty": ("not_plain_lora", lambda t: t.update({f"{PREFIX}lora_A.weight": np.ones((0, 4), np.float32)})),
    "two ranks": ("rank_mismatch", lambda t: t.update({f"{PREFIX}lora_A.weight": np.ones((3, 6), np.float32)})),
}


@pytest.mark.parametrize("fault", sorted(TENSOR_FAULTS))
def test_tensors_that_are_not_pairs_of_factors_are_refused(fault: str) -> None:
    code, change = TENSOR_FAULTS[fault]
    with pytest.raises(MismatchError) as caught:
        read_peft(with_tensors(change))
    assert caught.value.code == code


@pytest.mark.parametrize(
    "config", [b"", b"[]", b"{", b"\xff", b"[" * 50_000, b'{"r": 2}', b'{"r": "2", "lora_alpha": 1}']
)
def test_a_config_that_cannot_be_read_is_malformed(config: bytes) -> None:
    with pytest.raises(MalformedError, match=r"adapter_config\.json"):
        read_peft(with_config() | {PEFT_CONFIG: config})
    with pytest.raises(MalformedError, match="needs a positive number as r"):
        read_peft(with_config(r=True))


@pytest.mark.parametrize("name", [PEFT_CONFIG, PEFT_WEIGHTS])
def test_a_missing_file_is_named(name: str) -> None:
    files = with_config()
    del files[name]
    with pytest.raises(MalformedError, match=name):
        read_peft(files)


def test_an_npz_holds_the_joined_factors_and_where_each_module_lies() -> None:
    adapter = random_adapter(LAYOUT, 3, alpha=8.0)
    data = npz_bytes(adapter, 17, {"sql": 4, "python": 9})
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        found = dict(arrays)
    assert found["lora_A"].shape == (2, 6 + 3)
    assert found["lora_B"].shape == (4 + 5, 2)
    assert found["in_offsets"].tolist() == [0, 6, 9]
    assert found["out_offsets"].tolist() == [0, 4, 9]
    assert found["modules"].tolist() == [module.name for module in LAYOUT.modules]
    assert (int(found["version"]), int(found["rank"])) == (17, 2)
    assert found["source_experts"].tolist() == ["python", "sql"]
    assert found["source_versions"].tolist() == [9, 4]
    products = dense(adapter)
    for index, name in enumerate(found["modules"]):
        a = found["lora_A"][:, found["in_offsets"][index] : found["in_offsets"][index + 1]]
        b = found["lora_B"][found["out_offsets"][index] : found["out_offsets"][index + 1]]
        np.testing.assert_allclose(b @ a, products[str(name)], rtol=1e-5, atol=1e-5)


@laws
@given(adapters())
def test_an_npz_gives_the_product_back_and_is_the_same_every_time(adapter: Adapter) -> None:
    data = npz_bytes(adapter, 1, {})
    again = read_npz(data)
    assert (again.layout, again.scale) == (adapter.layout, 1)
    assert distance(dense(again), dense(adapter)) <= 1e-6 * bulk(adapter)
    assert npz_bytes(again, 1, {}) == data


def test_no_array_of_an_npz_needs_pickle_even_without_sources() -> None:
    with np.load(io.BytesIO(npz_bytes(random_adapter(LAYOUT, 0), 0, {})), allow_pickle=False) as arrays:
        assert {name: arrays[name].dtype.kind for name in ("source_experts", "modules")} == dict.fromkeys(
            ("source_experts", "modules"), "U"
        )
        assert all(not arrays[name].dtype.hasobject for name in arrays.files)


def plain_npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def other_npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=True, **arrays)
    return buffer.getvalue()


def npz_of(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def lying_npy(shape: str) -> bytes:
    head = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + bytes(64)


#: 41: an archive that unpacks to far more than it is, arrays larger than the file, names that are paths.
NOT_NPZ = {
    "bomb": npz_of({"lora_A.npy": bytes(1 << 26)}, zipfile.ZIP_DEFLATED),
    "terabytes": npz_of({"lora_A.npy": lying_npy("(1099511627776, 8)")}),
    "less than nothing": npz_of({"lora_A.npy": lying_npy("(-8, -1)")}),
    "a path": npz_of({"../../lora_A.npy": plain_npy(), "/lora_B.npy": plain_npy()}),
    "another version": npz_of({"lora_A.npy": b"\x93NUMPY\x09\x00"}),
    "empty": b"",
    "text": b"hello",
    "pickle": pickle.dumps([1]),
    "one array": plain_npy(),
    "cut short": npz_bytes(random_adapter(LAYOUT, 0), 0, {})[:-40],
    "other arrays": other_npz(lora_A=np.zeros((1, 1))),
    "objects": other_npz(lora_A=np.array([{}], object)),
}


@pytest.mark.parametrize("fault", sorted(NOT_NPZ))
def test_what_is_not_a_gateway_npz_is_malformed_and_never_unpickled_41(fault: str) -> None:
    with pytest.raises(CodecError) as caught:
        read_npz(NOT_NPZ[fault])
    assert caught.value.code == "malformed"
