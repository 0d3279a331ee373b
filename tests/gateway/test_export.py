"""Exports: what other libraries read is the model, and the manifest says what it was made of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from builders import random_adapter
from small_models import exportable, layout_of, load, logits, other_base, save_llama

from fedmoe.gateway.export import (
    MANIFEST_NAME,
    ExportError,
    ExportSource,
    check_base,
    check_untied,
    export_npz,
    export_peft,
)
from fedmoe.lora.codec import digest
from fedmoe.lora.formats import read_npz
from fedmoe.models.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def source(base: Path) -> ExportSource:
    return exportable(base, random_adapter(layout_of(load(base)), 1, 0.15))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_peft_computes_with_the_folder_what_we_compute(base: Path, source: ExportSource, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    export_peft(source, tmp_path / "out")
    ours = logits(load(base), source.adapter)
    theirs = logits(peft.PeftModel.from_pretrained(load(base), str(tmp_path / "out")).eval())
    assert np.abs(ours - theirs).max() < 1e-4
    assert np.abs(ours - logits(load(base))).max() > 0.1


def test_the_npz_gives_the_product_back(source: ExportSource, tmp_path: Path) -> None:
    export_npz(source, tmp_path / "gateway.npz")
    found = read_npz((tmp_path / "gateway.npz").read_bytes())
    assert found.layout == source.adapter.layout
    for module, a, b in found.factors():
        our_a, our_b = source.adapter.module(module.name)
        np.testing.assert_allclose(found.scale * b @ a, source.adapter.scale * our_b @ our_a, rtol=1e-5, atol=1e-6)


def test_the_manifest_names_sources_base_and_the_hash_of_every_file(source: ExportSource, tmp_path: Path) -> None:
    export_peft(source, tmp_path / "out")
    said = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())
    assert (said["format"], said["model"], said["version"], said["rank"]) == ("peft", "gateway", 7, 3)
    assert said["digest"] == digest(source.adapter)
    assert said["sources"] == {"python": {"version": 3, "digest": "c" * 64}, "sql": {"version": 4, "digest": None}}
    assert said["base"]["name"] == "small/base"
    assert said["base"]["weights_hash"] == source.base.weights_hash
    assert said["libraries"].keys() == {"fedmoe", "numpy"}
    assert set(said["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    for name, expected in said["files"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == expected


def test_a_file_has_its_manifest_beside_it(source: ExportSource, tmp_path: Path) -> None:
    export_npz(source, tmp_path / "new" / "gateway.npz")
    said = json.loads((tmp_path / "new" / f"gateway.npz.{MANIFEST_NAME}").read_text())
    found = hashlib.sha256((tmp_path / "new" / "gateway.npz").read_bytes()).hexdigest()
    assert said["files"] == {"gateway.npz": found}


def test_the_same_model_gives_the_same_manifest(source: ExportSource) -> None:
    assert source.manifest("npz", {}, ("numpy",)) == source.manifest("npz", {}, ("numpy",))


def test_what_is_there_is_replaced_with_force_only(source: ExportSource, tmp_path: Path) -> None:
    for export, target in ((export_npz, tmp_path / "a.npz"), (export_peft, tmp_path / "folder")):
        export(source, target)
        with pytest.raises(FileExistsError, match="--force"):
            export(source, target)
        export(source, target, force=True)


def test_another_base_model_is_refused_by_its_hash(source: ExportSource) -> None:
    with pytest.raises(ExportError, match=r"trained on small/base \(weights 000000000000\), but here has weights"):
        check_base(f"{source.name} was", other_base(source).base, "here", source.base.weights_hash)


def test_an_adapted_head_that_is_the_embedding_too_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    source = exportable(tmp_path, random_adapter(layout_of(load(tmp_path), "lm_head"), 1, 0.15))
    with pytest.raises(ExportError, match="lm_head, which is tied"):
        check_untied(source, {"tie_word_embeddings": True})
    check_untied(source, {"tie_word_embeddings": False})
