"""The merged checkpoint: the same model as base and adapter together, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import random_adapter
from safetensors.torch import load_file, save_file
from small_models import exportable, layout_of, load, logits, other_base, save_llama

from fedmoe.gateway import export_merged as module
from fedmoe.gateway.export import MANIFEST_NAME, ExportError, ExportSource
from fedmoe.gateway.export_merged import export_merged
from fedmoe.models.base import load_base
from fedmoe.models.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("own_cache")


def source_for(folder: Path, spread: float = 0.15) -> ExportSource:
    return exportable(folder, random_adapter(layout_of(load(folder)), 1, spread))


def nothing_beside(target: Path) -> bool:
    return [path.name for path in target.parent.iterdir() if path.name.startswith(f".{target.name}")] == []


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_the_merged_folder_computes_what_base_and_adapter_do(
    tmp_path: Path, shard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BAND", 100)  # several bands in every module
    base = save_llama(tmp_path / "base", shard=shard)
    assert (len(list(base.glob("*.safetensors"))) > 1) == (shard == "10KB")
    source = source_for(base)
    rounding = export_merged(source, base, tmp_path / "merged")
    assert np.abs(logits(load(tmp_path / "merged")) - logits(load(base), source.adapter)).max() < 1e-4
    assert rounding < 1e-6
    assert nothing_beside(tmp_path / "merged")


def test_a_merged_folder_is_a_base_model_with_its_tokenizer(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    export_merged(source_for(tmp_path / "base"), tmp_path / "base", tmp_path / "merged")
    loaded = load_base(str(tmp_path / "merged"), "cpu", "fp32")
    assert loaded.tokenizer.decode(loaded.tokenizer("def f(): return 1")["input_ids"]) == "def f(): return 1"
    assert loaded.identity.weights_hash != source_for(tmp_path / "base").base.weights_hash


def test_the_base_models_dtype_is_kept_and_the_sum_is_rounded_once(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", torch.bfloat16)
    source = source_for(base, spread=0.02)
    rounding = export_merged(source, base, tmp_path / "merged")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    error = total = 0.0
    for shape, a, b in source.adapter.factors():
        name = f"{shape.name}.weight"
        product = torch.from_numpy(source.adapter.scale * b @ a)
        exact = before[name].float() + product
        assert after[name].dtype == torch.bfloat16
        assert (after[name].float() - exact).abs().max() <= exact.abs().max() * 2**-8
        error += float((after[name].float() - exact).square().sum())
        total += float(product.square().sum())
    assert rounding == pytest.approx((error / total) ** 0.5, rel=1e-3)
    untouched = before.keys() - {f"{shape.name}.weight" for shape in source.adapter.layout.modules}
    assert untouched
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    said = json.loads((tmp_path / "merged" / MANIFEST_NAME).read_text())
    assert said["relative_rounding_error"] == rounding
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= said["files"].keys()


def test_the_base_folder_is_left_alone(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    (base / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    source = source_for(base)
    export_merged(source, base, tmp_path / "merged")
    with pytest.raises(ExportError, match="is the base model itself"):
        export_merged(source, base, base, force=True)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert not (tmp_path / "merged" / "notes.txt").exists()


def test_a_folder_that_is_there_goes_only_with_force(tmp_path: Path) -> None:
    """Fault 84."""
    base, target = save_llama(tmp_path / "base"), tmp_path / "merged"
    target.mkdir()
    (target / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="--force"):
        export_merged(source_for(base), base, target)
    assert (target / "mine").read_text() == "mine"
    export_merged(source_for(base), base, target, force=True)
    assert not (target / "mine").exists()
    assert (target / "config.json").is_file()


def test_a_failure_in_between_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 84."""
    base, target = save_llama(tmp_path / "base"), tmp_path / "merged"

    def broken(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "write_atomic", broken)
    with pytest.raises(OSError, match="no space left"):
        export_merged(source_for(base), base, target)
    assert not target.exists()
    assert nothing_beside(target)


def test_a_weight_that_was_not_written_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_llama(tmp_path / "base")
    monkeypatch.setattr(module, "_add", lambda *_: (0.0, 0.0))
    with pytest.raises(ExportError, match="is not what was written"):
        export_merged(source_for(base), base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    with pytest.raises(ExportError, match="--base-model"):
        export_merged(other_base(source_for(base)), base, tmp_path / "merged")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_quantised_base_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save_llama(tmp_path / "base")
    adapter = source_for(base).adapter
    tensors = load_file(base / "model.safetensors")
    name = f"{adapter.layout.modules[0].name}.weight"
    save_file({**tensors, name: tensors[name].to(dtype)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match="before it was quantised"):
        export_merged(exportable(base, adapter), base, tmp_path / "merged")


def test_a_module_that_the_checkpoint_lacks_or_has_otherwise_is_named(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    adapter = source_for(base).adapter
    tensors = load_file(base / "model.safetensors")
    name = f"{adapter.layout.modules[0].name}.weight"
    for others, told in (({name: tensors[name][1:].clone()}, "has shape"), ({}, f"stores no {name}")):
        kept = {key: value for key, value in tensors.items() if key != name}
        save_file({**kept, **others}, base / "model.safetensors", {"format": "pt"})
        with pytest.raises(ExportError, match=told):
            export_merged(exportable(base, adapter), base, tmp_path / "merged")


def test_a_sum_that_float16_cannot_hold_is_an_error(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", torch.float16)
    with pytest.raises(ExportError, match="does not fit into F16"):
        export_merged(source_for(base, spread=1e4), base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
