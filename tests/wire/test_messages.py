from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from support import MANIFEST

from fedmoe.lora.adapter import Layout, ModuleShape
from fedmoe.lora.manifest import BaseModel, Manifest
from fedmoe.wire.contract.administration import TokenRequest
from fedmoe.wire.contract.messages import (
    MAX_PARAMETERS,
    ExpertName,
    ManifestMessage,
    UpdateHeader,
    WorkerName,
)

names = st.from_regex(r"[A-Za-z0-9_.-]{1,40}", fullmatch=True)
manifests = st.builds(
    lambda modules, rank, alpha: Manifest(
        BaseModel("base", "main", "a" * 64, "b" * 64),
        Layout(tuple(ModuleShape(name, *shape) for name, shape in modules.items()), rank),
        alpha,
    ),
    st.dictionaries(names, st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(1, 64),
    st.floats(0.001, 1e6),
)


@given(manifest=manifests)
def test_a_manifest_travels_unchanged(manifest: Manifest) -> None:
    message = ManifestMessage.of(manifest)
    assert ManifestMessage.model_validate_json(message.model_dump_json()).manifest() == manifest


@given(name=st.text(max_size=70))
def test_a_name_is_ascii_and_can_be_a_file_name_or_it_is_none(name: str) -> None:
    for kind in (ExpertName, WorkerName):
        try:
            TypeAdapter(kind).validate_python(name)
        except ValidationError:
            continue
        assert name.isascii()
        assert 0 < len(name) < 64
        assert not set(name) & set("./\\\x00 %")
        assert name[0] not in "-_"


def test_an_adapter_beyond_the_limit_is_no_manifest() -> None:
    message = ManifestMessage.of(MANIFEST).model_dump(mode="json")
    at_limit = message | {"rank": 1024, "modules": [["m", MAX_PARAMETERS // 2048, MAX_PARAMETERS // 2048]]}
    beyond = message | {"rank": 1024, "modules": [["m", MAX_PARAMETERS // 2048, MAX_PARAMETERS // 2048 + 1]]}
    assert ManifestMessage.model_validate(at_limit).manifest().layout.rank == 1024
    with pytest.raises(ValueError, match=str(MAX_PARAMETERS)):
        ManifestMessage.model_validate(beyond).manifest()


@pytest.mark.parametrize("field", ["sequence", "base_version", "steps", "tokens"])
@pytest.mark.parametrize("value", [-1, 2**53 + 1, 1.5, "x"])
def test_counts_are_whole_and_bounded(field: str, value: object) -> None:
    good = {"expert": "python", "worker": "w1", "epoch": "e1", "sequence": 0, "base_version": 0}
    with pytest.raises(ValidationError):
        UpdateHeader.model_validate(good | {field: value})


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e12])
def test_a_token_expires_within_ten_years_or_never(seconds: float) -> None:
    with pytest.raises(ValidationError):
        TokenRequest(expires_in=seconds)
