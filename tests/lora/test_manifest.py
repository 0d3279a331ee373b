from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fedmoe.lora.adapter import Layout, ModuleShape
from fedmoe.lora.manifest import BaseModel, Manifest

BASE = BaseModel("org/base", "main", "aa", "bb")
LAYOUT = Layout((ModuleShape("layers.0.q", 8, 4), ModuleShape("layers.0.v", 8, 2)), 4)
MANIFEST = Manifest(BASE, LAYOUT, 16.0)


def test_a_manifest_survives_json() -> None:
    again = Manifest.from_json(json.loads(json.dumps(MANIFEST.to_json())))
    assert again == MANIFEST
    assert again.differences(MANIFEST) == []


def test_equal_manifests_have_equal_json_however_alpha_was_written() -> None:
    assert json.dumps(replace(MANIFEST, alpha=16).to_json()) == json.dumps(MANIFEST.to_json())


def test_names_for_people_do_not_count() -> None:
    assert MANIFEST.differences(replace(MANIFEST, base=replace(BASE, name="copy", revision="other"))) == []


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (replace(MANIFEST, base=replace(BASE, weights_hash="cc")), ["weights_hash: expected aa (org/base), got cc"]),
        (
            replace(MANIFEST, base=replace(BASE, tokenizer_hash="dd")),
            ["tokenizer_hash: expected bb (org/base), got dd"],
        ),
        (replace(MANIFEST, layout=LAYOUT.with_rank(8)), ["rank: expected 4, got 8"]),
        (replace(MANIFEST, alpha=32.0), ["lora_alpha: expected 16, got 32"]),
        (replace(MANIFEST, layout=Layout(LAYOUT.modules[:1], 4)), ["module missing: layers.0.v"]),
        (
            replace(MANIFEST, layout=Layout((*LAYOUT.modules, ModuleShape("x", 1, 1)), 4)),
            ["module not expected: x"],
        ),
        (
            replace(MANIFEST, layout=Layout((LAYOUT.modules[0], ModuleShape("layers.0.v", 2, 8)), 4)),
            ["layers.0.v: expected 8 -> 2 features, got 2 -> 8"],
        ),
        (
            replace(MANIFEST, base=replace(BASE, weights_hash="cc"), layout=LAYOUT.with_rank(8), alpha=1.0),
            ["weights_hash", "rank", "lora_alpha"],
        ),
    ],
)
def test_every_difference_is_told_with_what_was_expected_and_got(other: Manifest, said: list[str]) -> None:
    found = MANIFEST.differences(other)
    assert len(found) == len(said)
    for part, line in zip(said, found, strict=True):
        assert part in line
