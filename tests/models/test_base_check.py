"""A base model whose parts do not fit together is refused at load, with both values; what works is only noted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from base_folders import CHATML, byte_tokenizer, change, change_weights, tiny_folder

from fedmoe.models.base import BaseModelError, ChatTemplate, LoadedBase, context_length, load_base
from fedmoe.models.base_check import LoadedWeights, check_loaded
from fedmoe.models.tiny import tiny_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("saved") / "base")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "base"))


def load(folder: Path, chat: ChatTemplate | None = None) -> LoadedBase:
    return load_base(str(folder), "cpu", "fp32", chat)


def refusal(folder: Path) -> str:
    with pytest.raises(BaseModelError) as caught:
        load(folder)
    return str(caught.value)


def test_a_base_that_fits_has_no_notes(folder: Path) -> None:
    assert load(folder).notes == ()
    assert load_base("tiny", "cpu", "fp32").notes == ()


def test_a_token_beyond_the_embedding_is_refused_by_name(folder: Path) -> None:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra|>")
    byte_tokenizer(special, CHATML, "<|im_end|>").save_pretrained(folder)
    said = refusal(folder)
    assert "'<|extra|>' (259)" in said
    assert "259 rows" in said


def test_an_end_token_that_only_the_settings_know_is_refused(folder: Path) -> None:
    change(folder / "tokenizer_config.json", eos_token="<|eot|>")
    assert "'<|eot|>' (259)" in refusal(folder)


def test_a_picture_token_beyond_the_embedding_is_a_note(folder: Path) -> None:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<picture>")
    tokenizer = byte_tokenizer(special, CHATML, "<|im_end|>")
    tokenizer.save_pretrained(folder)
    change(folder / "tokenizer_config.json", extra_special_tokens={"image_token": "<picture>"})
    (note,) = load(folder).notes
    assert "<picture>" in note


def test_an_embedding_longer_than_the_tokenizer_is_fine(folder: Path) -> None:
    change_weights(folder, model__embed_tokens__weight=torch.zeros(320, 64))
    change(folder / "config.json", vocab_size=320)
    assert load(folder).notes == ()


@pytest.mark.parametrize("vocabulary", [200, 300])
def test_another_vocabulary_than_the_weights_have_is_refused_with_both(folder: Path, vocabulary: int) -> None:
    change(folder / "config.json", vocab_size=vocabulary, eos_token_id=1, pad_token_id=None)
    change(folder / "generation_config.json", eos_token_id=1, pad_token_id=None)
    said = refusal(folder)
    assert "model.embed_tokens.weight is stored as [259, 64]" in said
    assert f"vocab_size {vocabulary}" in said


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("name", ["eos_token_id", "bos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [999, -7, "258", True, 2.5])
def test_an_id_that_is_none_is_refused_with_file_and_value(folder: Path, file: str, name: str, value: object) -> None:
    change(folder / file, **{name: value})
    said = refusal(folder)
    assert str(folder / file) in said
    assert f"{name} is {value!r}" in said


def test_one_wrong_end_token_in_a_list_is_enough(folder: Path) -> None:
    change(folder / "generation_config.json", eos_token_id=[258, 4000])
    assert "eos_token_id is 4000, but vocab_size of config.json is 259" in refusal(folder)


@pytest.mark.parametrize("ids", [256, [258, 256], [256]])
def test_other_end_tokens_than_the_tokenizer_has_are_fine(folder: Path, ids: object) -> None:
    change(folder / "generation_config.json", eos_token_id=ids)
    assert load(folder).notes == ()


def test_an_end_token_that_is_ordinary_text_is_refused_with_both(folder: Path) -> None:
    change(folder / "generation_config.json", eos_token_id=66)
    said = refusal(folder)
    assert "eos_token_id 66" in said
    assert "ordinary text" in said
    assert "'<|im_end|>' (258)" in said


def test_where_nothing_ends_an_answer_that_is_said() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer(("<|x|>",), None, None)
    model.generation_config.eos_token_id = None
    with pytest.raises(BaseModelError, match=r"nothing ends an answer(.|\n)*set eos_token"):
        check_loaded("here", model, tokenizer, LoadedWeights())
    tokenizer.eos_token = "<|x|>"
    assert check_loaded("here", model, tokenizer, LoadedWeights()) == ()


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -0.5), ("top_p", 7), ("repetition_penalty", 0), ("max_new_tokens", -3)]
)
def test_generation_settings_without_sense_are_refused(folder: Path, name: str, value: float) -> None:
    change(folder / "generation_config.json", **{name: value})
    assert f"generation_config.json: {name} is {value!r}, it must be" in refusal(folder)


def test_usual_generation_settings_are_fine(folder: Path) -> None:
    change(folder / "generation_config.json", do_sample=True, temperature=0.7, top_p=0.8, top_k=20)
    assert load(folder).notes == ()


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"]
)
@pytest.mark.parametrize("content", ["{broken", "[]", ""])
def test_a_file_with_other_content_is_no_traceback(folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content)
    assert str(folder) in refusal(folder)


def test_weights_that_are_missing_are_named(folder: Path) -> None:
    change_weights(folder, ("model.layers.1.mlp.up_proj.weight",))
    said = refusal(folder)
    assert "model.layers.1.mlp.up_proj.weight" in said
    assert "random" in said


def test_an_output_head_that_is_not_stored_is_named(folder: Path) -> None:
    change(folder / "config.json", tie_word_embeddings=False)
    assert "lm_head.weight" in refusal(folder)


def test_tied_embeddings_that_differ_are_refused(folder: Path) -> None:
    change_weights(folder, lm_head__weight=torch.ones(259, 64))
    assert "tie_word_embeddings true" in refusal(folder)
    change(folder / "config.json", tie_word_embeddings=False)
    load(folder)


def test_more_layers_than_the_settings_say_are_refused(folder: Path) -> None:
    change(folder / "config.json", num_hidden_layers=1, layer_types=["full_attention"])
    assert "model.layers.1.input_layernorm.weight" in refusal(folder)


def test_a_bias_that_the_settings_have_no_place_for_is_refused(folder: Path) -> None:
    change_weights(folder, model__layers__0__self_attn__o_proj__bias=torch.ones(64))
    assert "model.layers.0.self_attn.o_proj.bias" in refusal(folder)


def test_a_head_for_another_task_is_a_note(folder: Path) -> None:
    change_weights(folder, v_head__summary__weight=torch.ones(1, 64))
    (note,) = load(folder).notes
    assert "v_head.summary.weight" in note


def test_two_sets_of_weights_in_one_folder_are_refused(folder: Path) -> None:
    (folder / "part.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index = {"weight_map": {"model.norm.weight": "part.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "two sets of weights" in refusal(folder)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"x": 3}}'])
def test_an_index_that_is_none_is_named(folder: Path, index: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refusal(folder)


def write_template(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text)


def test_a_template_that_does_not_compile_is_refused_and_the_advice_works(folder: Path, tmp_path: Path) -> None:
    write_template(folder, "{% for m in messages %}\n{{ m.content }}")
    said = refusal(folder)
    assert "no Jinja template" in said
    assert "--chat-template FILE" in said
    good = tmp_path / "good.jinja"
    good.write_text(CHATML)
    assert load(folder, ChatTemplate.from_options(good, None)).tokenizer.chat_template == CHATML


def test_a_template_that_shows_nothing_of_what_was_said_is_refused(folder: Path) -> None:
    write_template(folder, "{% for m in messages %}{{ m.text }}<|im_end|>{% endfor %}")
    assert "does not show what was said" in refusal(folder)


def test_an_end_mark_that_the_tokenizer_splits_is_refused(folder: Path) -> None:
    write_template(folder, CHATML.replace("<|im_end|>", "<|eot_id|>"))
    said = refusal(folder)
    assert "'<|eot_id|>'" in said
    assert "10 tokens" in said


def test_a_header_that_the_tokenizer_splits_is_a_note(folder: Path) -> None:
    write_template(folder, CHATML.replace("<|im_start|>", "<|user|>"))
    (note,) = load(folder).notes
    assert "<|user|>" in note


def test_a_template_without_an_end_mark_is_a_note(folder: Path) -> None:
    write_template(folder, CHATML.replace("<|im_end|>", ""))
    (note,) = load(folder).notes
    assert "no end mark" in note


def test_a_template_that_refuses_a_conversation_is_a_note(folder: Path) -> None:
    write_template(folder, "{{ raise_exception('tools first') }}" + CHATML)
    (note,) = load(folder).notes
    assert "tools first" in note


def test_two_templates_that_differ_are_refused_with_both(folder: Path) -> None:
    other = CHATML.replace("<|im_start|>", "<|endoftext|>")
    change(folder / "tokenizer_config.json", chat_template=other)
    said = refusal(folder)
    assert "<|im_start|>user" in said
    assert "<|endoftext|>user" in said
    assert str(folder / "chat_template.jinja") in said
    load(folder, ChatTemplate.from_options(folder / "chat_template.jinja", None))


def test_two_templates_that_read_alike_are_fine(folder: Path) -> None:
    own = (folder / "chat_template.jinja").read_text()
    change(folder / "tokenizer_config.json", chat_template=own + "\n")
    assert load(folder).notes == ()
    change(folder / "tokenizer_config.json", chat_template="{# older #}" + own)
    (note,) = load(folder).notes
    assert "differ" in note


def test_templates_none_of_which_is_the_default_are_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    change(folder / "tokenizer_config.json", chat_template=[{"name": "tool_use", "template": CHATML}])
    assert "default" in refusal(folder)


def config_change(**values: object) -> Callable[[Path], None]:
    return lambda folder: change(folder / "config.json", **values)


def tokenizer_change(**values: object) -> Callable[[Path], None]:
    return lambda folder: change(folder / "tokenizer_config.json", **values)


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("prepare", "length"),
    [
        ([], 2048),
        ([tokenizer_change(model_max_length=10**30)], 2048),
        ([tokenizer_change(model_max_length=512)], 512),
        ([tokenizer_change(model_max_length=131072)], 2048),
        ([config_change(use_sliding_window=True, sliding_window=64, max_window_layers=0)], 2048),
        ([tokenizer_change(model_max_length=...), config_change(rope_parameters=YARN)], 4096),
    ],
)
def test_the_context_is_the_least_that_a_part_names(
    folder: Path, prepare: list[Callable[[Path], None]], length: int
) -> None:
    for step in prepare:
        step(folder)
    base = load(folder)
    assert context_length(base) == length
    assert base.report["context"].startswith(f"{length} (")


def test_a_context_without_room_is_refused(folder: Path) -> None:
    change(folder / "config.json", max_position_embeddings=0)
    assert "max_position_embeddings of config.json is 0" in refusal(folder)


def test_all_problems_are_told_at_once(folder: Path) -> None:
    change(folder / "config.json", max_position_embeddings=0)
    change(folder / "generation_config.json", eos_token_id=66)
    said = refusal(folder)
    assert "ordinary text" in said
    assert "max_position_embeddings" in said
