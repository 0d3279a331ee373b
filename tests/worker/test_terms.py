"""What a worker takes over from its federation, and what it is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedmoe.config import WorkerConfig
from fedmoe.lora.adapter import Layout, ModuleShape
from fedmoe.lora.manifest import BaseModel, Manifest
from fedmoe.models.known_bases import KNOWN_BASES
from fedmoe.models.stored_base import StoredBase
from fedmoe.wire.contract.messages import FederationInfo, ManifestMessage
from fedmoe.worker.options import OptionError
from fedmoe.worker.terms import settled, targets_of, with_base

NEEDED = {"coordinator_url": "http://127.0.0.1:5000", "worker_id": "w1", "specialty": "python", "dataset": "a.jsonl"}
SMOLLM2 = StoredBase("smollm2", KNOWN_BASES["smollm2"], None)
SHAPE = SMOLLM2.shape
assert SHAPE is not None
MODULES = SHAPE.modules
IDENTITY = BaseModel("Qwen/Qwen2.5-1.5B-Instruct", "1a2b", "a" * 64, "b" * 64)
MANIFEST = Manifest(IDENTITY, Layout(MODULES, 8), 24.0)


def config(**given: object) -> WorkerConfig:
    return WorkerConfig(**NEEDED | given)  # type: ignore[arg-type]


def info(manifest: Manifest | None = None, max_length: int | None = None) -> FederationInfo:
    message = ManifestMessage.of(manifest) if manifest is not None else None
    return FederationInfo(fedmoe="1", manifest=message, min_sync_interval=1, wire_dtypes=[], max_length=max_length)


def test_the_first_worker_starts_with_the_defaults() -> None:
    mine = config()
    assert with_base(mine, None) == mine
    assert settled(mine, info(), None, SMOLLM2) == mine
    assert (mine.lora_r, mine.lora_alpha, mine.target_modules, mine.max_length) == (16, 32, ("all-linear",), None)


def test_what_is_not_set_is_taken_over() -> None:
    mine = with_base(config(), MANIFEST)
    assert mine.base_model == "Qwen/Qwen2.5-1.5B-Instruct@1a2b"
    mine = settled(mine, info(MANIFEST, 512), MANIFEST, SMOLLM2)
    assert (mine.lora_r, mine.lora_alpha, mine.target_modules, mine.max_length) == (8, 24.0, ("all-linear",), 512)


def test_what_is_set_alike_is_no_difference() -> None:
    mine = config(base_model="here", lora_r=8, lora_alpha=24, target_modules=["all-linear"], max_length=512)
    assert with_base(mine, MANIFEST).base_model == "here"
    assert settled(mine, info(MANIFEST, 512), MANIFEST, SMOLLM2) == mine


def test_every_difference_is_told_with_both_values_and_its_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMOE_WORKER_LORA_R", "4")
    with pytest.raises(OptionError) as refused:
        settled(config(max_length=1024), info(MANIFEST, 512), MANIFEST, SMOLLM2)
    assert str(refused.value) == (
        "all experts share one LoRA configuration; rank: expected 8, got 4; max_length: expected 512, got 1024. "
        "To join, leave out --lora-r, --max-length (the flag, its environment variable, its line in the file)"
    )


@pytest.mark.parametrize("known", [True, False])
def test_target_modules_are_compared_by_name(known: bool) -> None:
    """Of a base model that is not known yet, only what is missing is."""
    layout = Layout(tuple(module for module in MODULES if module.name.endswith(("q_proj", "v_proj"))), 8)
    theirs, base = replace(MANIFEST, layout=layout), SMOLLM2 if known else None
    assert settled(config(target_modules=["v_proj", "q_proj"]), info(theirs), theirs, base).lora_r == 8
    with pytest.raises(OptionError, match=r"module missing: model\.layers\.0\.self_attn\.v_proj"):
        settled(config(target_modules=["q_proj"]), info(theirs), theirs, base)
    if known:
        with pytest.raises(OptionError, match=r"module not expected: model\.layers\.0\.mlp\.down_proj"):
            settled(config(target_modules=["all-linear"]), info(theirs), theirs, base)


def test_target_modules_are_named_as_shortly_as_they_can_be() -> None:
    assert targets_of(Layout(MODULES, 4), MODULES) == ("all-linear",)
    ends = Layout(tuple(module for module in MODULES if module.name.endswith(("q_proj", "v_proj"))), 4)
    assert targets_of(ends, MODULES) == ("q_proj", "v_proj")
    one = Layout((ModuleShape("model.layers.3.self_attn.q_proj", 576, 576),), 4)
    assert targets_of(one, MODULES) == ("model.layers.3.self_attn.q_proj",)
    assert targets_of(ends, None) == tuple(sorted(module.name for module in ends.modules))
