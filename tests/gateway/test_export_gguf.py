"""The GGUF adapter: tensors and metadata as llama.cpp reads them, query and key rows in its order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from builders import random_adapter
from gguf_checkpoint import read_adapter, write_llama
from small_models import exportable, layout_of, load, logits, other_base, save_llama
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from fedmoe.gateway.export import MANIFEST_NAME, ExportError, ExportSource
from fedmoe.gateway.export_gguf import export_gguf_lora, gguf_lora_bytes
from fedmoe.lora.algebra import baked
from fedmoe.models.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def source(base: Path) -> ExportSource:
    return exportable(base, random_adapter(layout_of(load(base)), 1, 0.15))


def test_the_metadata_says_adapter_lora_and_scale_one(base: Path, source: ExportSource, tmp_path: Path) -> None:
    export_gguf_lora(source, base, tmp_path / "gateway.gguf")
    _, said = read_adapter(tmp_path / "gateway.gguf")
    assert said["general.type"] == "adapter"
    assert said["general.architecture"] == "llama"
    assert said["adapter.type"] == "lora"
    assert said["adapter.lora.alpha"] == source.adapter.rank
    manifest = json.loads((tmp_path / f"gateway.gguf.{MANIFEST_NAME}").read_text())
    assert manifest["format"] == "gguf-lora"
    assert manifest["libraries"].keys() == {"fedmoe", "numpy", "gguf"}


def test_qwen2_keeps_every_row_where_it_is(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    source = exportable(tmp_path / "base", random_adapter(layout_of(load(tmp_path / "base")), 1, 0.15))
    export_gguf_lora(source, tmp_path / "base", tmp_path / "out.gguf")
    tensors, said = read_adapter(tmp_path / "out.gguf")
    assert said["general.architecture"] == "qwen2"
    plain = baked(source.adapter)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for module, a, b in plain.factors():
        _, _, layer, _, last = module.name.split(".")
        stored = f"blk.{layer}.{names[last]}.weight"
        np.testing.assert_array_equal(tensors.pop(f"{stored}.lora_a"), a)
        np.testing.assert_array_equal(tensors.pop(f"{stored}.lora_b"), b)
    assert tensors == {}


def test_on_the_base_in_ggufs_order_a_llama_adapter_computes_what_we_compute(
    base: Path, source: ExportSource, tmp_path: Path
) -> None:
    """transformers turns the rows of a GGUF back, so wrong rows in the adapter would give other logits."""
    export_gguf_lora(source, base, tmp_path / "adapter.gguf")
    tensors, _ = read_adapter(tmp_path / "adapter.gguf")
    write_llama(tmp_path / "model.gguf", load(base), tensors)
    disable_progress_bar()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", attn_implementation="eager").eval()
    assert merged.config.num_key_value_heads == 2
    assert np.abs(logits(merged) - logits(load(base), source.adapter)).max() < 1e-4


def test_only_query_and_key_rows_move(base: Path, source: ExportSource, tmp_path: Path) -> None:
    export_gguf_lora(source, base, tmp_path / "adapter.gguf")
    tensors, _ = read_adapter(tmp_path / "adapter.gguf")
    _, b = baked(source.adapter).module("model.layers.0.self_attn.q_proj")
    stored = tensors["blk.0.attn_q.weight.lora_b"]
    # Heads of 8 rows: i and i + 4 of transformers become neighbours.
    np.testing.assert_array_equal(stored[:4], b[[0, 4, 1, 5]])
    _, b = baked(source.adapter).module("model.layers.0.self_attn.v_proj")
    np.testing.assert_array_equal(tensors["blk.0.attn_v.weight.lora_b"], b)


def test_an_architecture_without_a_line_is_refused_with_the_way_round(source: ExportSource) -> None:
    config = {"architectures": ["GPT2LMHeadModel"], "num_hidden_layers": 2}
    with pytest.raises(ExportError, match=r"GPT2LMHeadModel.*convert_lora_to_gguf\.py"):
        gguf_lora_bytes(source, config)
    with pytest.raises(ExportError, match="names none"):
        gguf_lora_bytes(source, {})


@pytest.mark.parametrize("layers", [None, True, 0])
def test_a_config_without_layers_is_refused(source: ExportSource, layers: object) -> None:
    with pytest.raises(ExportError, match="num_hidden_layers"):
        gguf_lora_bytes(source, {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers})


def test_a_module_beyond_the_models_layers_is_named(source: ExportSource) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(ExportError, match=r"model\.layers\.1\."):
        gguf_lora_bytes(source, config | {"num_key_value_heads": 2})


def test_heads_that_do_not_divide_the_rows_are_refused(source: ExportSource) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "num_attention_heads": 5}
    with pytest.raises(ExportError, match="5 heads"):
        gguf_lora_bytes(source, config)


def test_another_base_model_is_refused_and_nothing_is_written(base: Path, source: ExportSource, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--base-model"):
        export_gguf_lora(other_base(source), base, tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []
