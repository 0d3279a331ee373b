"""`fedmoe gateway export` and `evaluate` on a federation of the tiny model: what is written, printed and refused."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import Outcome
from live import LiveServer, listening, open_house
from safetensors.numpy import save_file
from structlog.testing import capture_logs
from support import make_body, make_push

from fedmoe.coordinator import Aggregation
from fedmoe.lora.adapter import Adapter, initial_adapter
from fedmoe.lora.codec import encode
from fedmoe.lora.formats import read_npz
from fedmoe.lora.manifest import Manifest
from fedmoe.lora.prompt_statistics import PromptStatistics
from fedmoe.models.tiny import save_tiny
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.messages import DataStatisticsHeader

Run = Callable[..., Outcome]

MANIFEST = "fedmoe_export.json"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manifest]:
    """Rank 2 on all linear layers of the tiny model, with a cache folder of the tests' own."""
    from fedmoe.models.base import load_base
    from fedmoe.models.lora_layers import ALL_LINEAR, attach

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        base = load_base("tiny", "cpu", "fp32")
        yield Manifest(base.identity, attach(base.model, ALL_LINEAR, 2, 4.0).layout, 4.0)


@pytest.fixture
def tiny_server(tmp_path: Path, manifest: Manifest) -> Iterator[LiveServer]:
    """Two experts on the tiny model, `sql_expert` with one update and `docs` as it began."""
    (tmp_path / "house").mkdir()
    with capture_logs(), open_house(tmp_path / "house") as house:
        house.register("sql_expert", "docs", manifest=manifest)
        delta = np.random.default_rng(0).normal(0, 0.05, manifest.layout.size).astype(np.float32)
        asyncio.run(house.service.intake.push(*make_push(encode(manifest.layout, delta), 0, 0, expert="sql_expert")))
        with listening(house.app) as running:
            yield running


def test_info_says_where_the_gateway_is_not_the_one_asked_for(tmp_path: Path, fedmoe: Run) -> None:
    (tmp_path / "house").mkdir()
    with capture_logs(), open_house(tmp_path / "house", Aggregation(strategy="regmean")) as house:
        house.register("docs", "sql")
        asyncio.run(house.service.intake.push(*make_push(make_body(1), 0, 0, expert="docs")))
        with listening(house.app) as running:
            said = fedmoe("gateway", "info", "--coordinator-url", running.url).out
    assert "gateway version 3, scaled of docs v1" in said
    assert "left out: sql (no update has landed on it yet)" in said
    assert "note: regmean was asked for; without input moments of docs it became scaled" in said


def test_info_tells_the_merges_of_a_gateway_that_lives(tmp_path: Path, fedmoe: Run) -> None:
    (tmp_path / "house").mkdir()
    with capture_logs(), open_house(tmp_path / "house", Aggregation(merge_after=2)) as house:
        house.register("docs", "sql")
        with listening(house.app) as running:
            before = fedmoe("gateway", "info", "--coordinator-url", running.url).out
            asyncio.run(house.service.intake.push(*make_push(make_body(1), 0, 0, expert="docs", steps=3)))
            deadline = time.monotonic() + 20
            while " 1 merges" not in (said := fedmoe("gateway", "info", "--coordinator-url", running.url).out):
                assert time.monotonic() < deadline, said
    assert "gateway version 2, living of no expert yet" in before
    assert "  0 merges\n" in before
    assert "gateway version 4, living of docs v1 (weight 1)" in said
    assert "1 merges, the last of docs (staleness 0) in 0." in said
    assert "docs branched after merge 1 as v2, 0 steps since" in said
    assert "sql branched after merge 0 as v0, 0 steps since" in said
    assert "note: without input moments of docs the deltas were added as they are, scaled" in said


@pytest.fixture
def held_out(tmp_path: Path) -> list[str]:
    """`--domain` options for two files of a few blocks each."""
    options = []
    for name, line in (("sql", "select {0} from numbers where n > {0};"), ("docs", "Chapter {0} is about {0}.")):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": line.format(number)}) + "\n" for number in range(40)))
        options += ["--domain", f"{name}={file}"]
    return options


def test_every_format_is_written_with_its_manifest(tiny_server: LiveServer, fedmoe: Run, tmp_path: Path) -> None:
    formats = {"peft": f"a/{MANIFEST}", "merged": f"b/{MANIFEST}", "npz": f"c.{MANIFEST}", "gguf-lora": f"d.{MANIFEST}"}
    for (kind, place), target in zip(formats.items(), "abcd", strict=True):
        options = ("--format", kind, "--coordinator-url", tiny_server.url)
        outcome = fedmoe("gateway", "export", str(tmp_path / target), *options)
        assert outcome.status == 0, outcome.err
        assert f"exported gateway version 3 to {tmp_path / target}" in outcome.out
        assert ("the federation's base model is tiny; " in outcome.err) == (kind in ("merged", "gguf-lora"))
        said = json.loads((tmp_path / place).read_text())
        assert (said["format"], said["model"], said["base"]["name"]) == (kind, "gateway", "tiny")
        assert {name: source["version"] for name, source in said["sources"].items()} == {"sql_expert": 1}
        assert all(len(source["digest"]) == 64 for source in said["sources"].values())
    assert (
        "rounding"
        in fedmoe(
            *("gateway", "export", str(tmp_path / "b"), "--force", "--format", "merged", "--base-model", "tiny"),
            *("--coordinator-url", tiny_server.url),
        ).out
    )


def test_a_merged_export_is_a_base_model_that_answers(
    tiny_server: LiveServer, fedmoe: Run, tmp_path: Path, manifest: Manifest
) -> None:
    from fedmoe.models.base import load_base

    options = ("--format", "merged", "--base-model", "tiny", "--expert", "sql_expert")
    target = tmp_path / "merged"
    assert fedmoe("gateway", "export", str(target), *options, "--coordinator-url", tiny_server.url).status == 0
    merged = load_base(str(target), "cpu", "fp32").model.state_dict()
    base = load_base("tiny", "cpu", "fp32").model.state_dict()
    changed = {name for name in base if not base[name].equal(merged[name])}
    assert changed == {f"{module.name}.weight" for module in manifest.layout.modules}


def test_a_peft_folder_names_the_base_that_it_is_told(tiny_server: LiveServer, fedmoe: Run, tmp_path: Path) -> None:
    base, other = tmp_path / "own-base", tmp_path / "other"
    save_tiny(base)
    shutil.copytree(base, other)
    save_file({"x": np.zeros(3, np.float32)}, other / "model.safetensors")
    options = ("gateway", "export", str(tmp_path / "out"), "--coordinator-url", tiny_server.url, "--base-model")
    refused = fedmoe(*options, str(other))
    assert (refused.status, "was trained on" in refused.err, (tmp_path / "out").exists()) == (1, True, False)
    assert fedmoe(*options, str(base)).status == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(base), None)


def test_an_experts_npz_is_the_expert(tiny_server: LiveServer, fedmoe: Run, tmp_path: Path, manifest: Manifest) -> None:
    options = ("--format", "npz", "--expert", "docs", "--coordinator-url", tiny_server.url)
    assert fedmoe("gateway", "export", str(tmp_path / "docs.npz"), *options).status == 0
    found = read_npz((tmp_path / "docs.npz").read_bytes())
    from fedmoe.coordinator import seed_of

    start: Adapter = initial_adapter(manifest.layout, manifest.alpha, seed_of("docs"))
    name = manifest.layout.modules[0].name
    np.testing.assert_array_equal(found.module(name)[0], start.module(name)[0])


def test_another_base_model_is_refused_without_a_traceback(
    tiny_server: LiveServer, fedmoe: Run, tmp_path: Path, held_out: list[str]
) -> None:
    from fedmoe.models.tiny import save_tiny, tiny_model

    other = tmp_path / "other"
    save_tiny(other)
    model = tiny_model()
    model.get_input_embeddings().weight.data += 1
    model.save_pretrained(other)
    url = ("--coordinator-url", tiny_server.url)
    export = ("gateway", "export", str(tmp_path / "out"), "--format", "merged", "--base-model", str(other))
    for command in (export, ("gateway", "evaluate", "--base-model", str(other), "--device", "cpu", *held_out)):
        outcome = fedmoe(*command, *url)
        assert outcome.status == 1
        assert "trained on tiny" in outcome.err
        assert "--base-model" in outcome.err
        assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


def evaluate(fedmoe: Run, server: LiveServer, *options: str) -> Outcome:
    small = ("--base-model", "tiny", "--device", "cpu", "--blocks", "6", "--max-length", "96")
    return fedmoe("gateway", "evaluate", *small, *options, "--coordinator-url", server.url)


def test_an_evaluation_prints_losses_and_gain_kept_and_draws_them(
    tiny_server: LiveServer, fedmoe: Run, tmp_path: Path, held_out: list[str]
) -> None:
    outcome = evaluate(fedmoe, tiny_server, *held_out, "--plot", str(tmp_path / "new" / "gateway.png"))
    assert outcome.status == 0, outcome.err
    for word in ("base", "sql_expert", "docs", "gateway", "Held-out loss", "Gain kept", "own expert"):
        assert word in outcome.out
    assert "warning: docs: the gain of docs may be none" in outcome.err
    assert (tmp_path / "new" / "gateway.png").read_bytes().startswith(b"\x89PNG")


def test_an_evaluation_as_json_has_every_block(tiny_server: LiveServer, fedmoe: Run, held_out: list[str]) -> None:
    outcome = evaluate(fedmoe, tiny_server, *held_out, "--json")
    said = json.loads(outcome.out)
    assert list(said["losses"]) == ["base", "docs", "sql_expert", "gateway"]
    assert said["retained"]["sql"]["expert"] == "sql_expert"
    assert {name: len(blocks) for name, blocks in said["block_tokens"].items()} == {"sql": 6, "docs": 6}
    # An expert without an update changes nothing.
    assert said["losses"]["docs"] == pytest.approx(said["losses"]["base"], rel=1e-6)
    assert said["losses"]["sql_expert"] != pytest.approx(said["losses"]["base"], rel=1e-6)


def test_generate_and_evaluate_speak_by_the_template_that_is_given(
    tiny_server: LiveServer, fedmoe: Run, held_out: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ lead }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    options = ("--base-model", "tiny", "--max-new-tokens", "2", "--chat-template", str(file))
    url = ("--coordinator-url", tiny_server.url)
    assert fedmoe("gateway", "generate", "hi", *options, "--chat-template-kwargs", '{"lead": "L"}', *url).status == 0
    refused = fedmoe("gateway", "generate", "hi", *options, "--chat-template-kwargs", '{"load": "L"}', *url)
    assert (refused.status, "it asks for: lead" in refused.err) == (1, True)
    refused = evaluate(fedmoe, tiny_server, *held_out, "--chat-template", str(tmp_path))
    assert (refused.status, "cannot be read" in refused.err) == (1, True)


def test_the_base_model_is_the_federations_unless_it_is_given(
    tiny_server: LiveServer, fedmoe: Run, held_out: list[str], tmp_path: Path
) -> None:
    url = ("--coordinator-url", tiny_server.url)
    answered = fedmoe("gateway", "generate", "hi", "--max-new-tokens", "2", "--device", "cpu", *url)
    assert (answered.status, "the federation's base model is tiny" in answered.err) == (0, True)
    again = fedmoe("gateway", "generate", "hi", "--max-new-tokens", "2", "--device", "cpu", "--json", *url)
    said = json.loads(again.out)
    assert said == {"model": "gateway", "version": 3, "prompt": "hi", "answer": answered.out.removesuffix("\n")}
    small = ("--device", "cpu", "--blocks", "2", "--max-length", "96", "--json")
    outcome = fedmoe("gateway", "evaluate", *small, *held_out, *url)
    assert list(json.loads(outcome.out)["losses"]) == ["base", "docs", "sql_expert", "gateway"]


def test_the_base_model_is_of_the_federations_revision_not_the_hubs_newest(
    tmp_path: Path, manifest: Manifest, fedmoe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedmoe.models import base
    from fedmoe.models.tiny import tiny_model

    hub = tmp_path / "hub" / "models--owner--model"
    theirs, newest = "a" * 40, "b" * 40
    for revision in (theirs, newest):
        save_tiny(hub / "snapshots" / revision)
    model = tiny_model()
    model.get_input_embeddings().weight.data += 1
    model.save_pretrained(hub / "snapshots" / newest)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(newest)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(base, "HF_HUB_CACHE", str(hub.parent))
    identity = base.load_base(f"owner/model@{theirs}", "cpu").identity
    (tmp_path / "house").mkdir()
    with capture_logs(), open_house(tmp_path / "house") as house, listening(house.app) as server:
        house.register("sql", manifest=replace(manifest, base=identity))
        words = ("gateway", "generate", "hi", "--max-new-tokens", "2", "--device", "cpu")
        answered = fedmoe(*words, "--coordinator-url", server.url)
        other = fedmoe(*words, "--coordinator-url", server.url, "--base-model", "owner/model")
        options = ("--format", "merged", "--coordinator-url", server.url)
        exported = fedmoe("gateway", "export", str(tmp_path / "merged"), *options)
    assert answered.status == 0, answered.err
    assert f"the federation's base model is owner/model@{theirs}; " in answered.err
    assert (other.status, "but owner/model has weights" in other.err) == (1, True)
    assert exported.status == 0, exported.err


def test_a_base_model_that_is_a_folder_of_another_machine_is_asked_for(
    tmp_path: Path, manifest: Manifest, fedmoe: Run
) -> None:
    (tmp_path / "house").mkdir()
    with capture_logs(), open_house(tmp_path / "house") as house, listening(house.app) as server:
        house.register("sql", manifest=replace(manifest, base=replace(manifest.base, name="ours", revision="local")))
        refused = fedmoe("gateway", "generate", "hi", "--coordinator-url", server.url)
    assert (refused.status, "a folder called ours on another machine" in refused.err) == (1, True)
    assert "give its place here with --base-model FOLDER" in refused.err


def test_the_file_has_a_section_for_the_gateway_commands(
    tiny_server: LiveServer, fedmoe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flag, else environment, else file: the file's address is of nobody, its longest answer out of range."""
    file = tmp_path / "fedmoe.toml"
    file.write_text('[gateway]\ncoordinator_url = "http://127.0.0.1:1"\ndevice = "cpu"\nmax_new_tokens = 2\n')
    words = ("gateway", "generate", "hi", "--config", str(file), "--json")
    assert fedmoe(*words).status == 69
    assert fedmoe(*words, "--coordinator-url", tiny_server.url).status == 0
    monkeypatch.setenv("FEDMOE_GATEWAY_COORDINATOR_URL", tiny_server.url)
    assert fedmoe(*words).status == 0
    file.write_text("[gateway]\nmax_new_tokens = 5000\n")
    refused = fedmoe(*words)
    assert (refused.status, "[gateway] max_new_tokens: Input should be less than" in refused.err) == (1, True)
    assert fedmoe(*words, "--max-new-tokens", "2").status == 0
    file.write_text("[gateway]\nmax_new_token = 5\n")
    assert "did you mean max_new_tokens?" in fedmoe(*words).err


def test_an_evaluation_routes_where_two_experts_have_prompt_statistics(
    tiny_server: LiveServer, fedmoe: Run, held_out: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedmoe.models.base import load_base
    from fedmoe.models.prompt_features import prompt_features

    # By the statistics alone: one expert is noise and the other nothing, so what they explain says little.
    monkeypatch.setattr("fedmoe.gateway.routers.TRUST", 0.0)
    base = load_base("tiny", "cpu", "fp32")
    assert "not routed" in evaluate(fedmoe, tiny_server, *held_out, "--json").err
    with CoordinatorClient(tiny_server.url, attempts=1) as api:
        for expert, line in (("sql_expert", "select {0} from numbers where n > {0};"), ("docs", "Chapter {0} is.")):
            ids = [base.tokenizer(line.format(number))["input_ids"] for number in range(40)]
            body = PromptStatistics.of(prompt_features(base, ids)).to_bytes()
            api.push_data_statistics(DataStatisticsHeader(expert=expert, worker="w", kind="prompts"), body)
    said = json.loads(evaluate(fedmoe, tiny_server, *held_out, "--json").out)
    for domain, expert in (("sql", "sql_expert"), ("docs", "docs")):
        assert said["block_losses"]["routed"][domain] == said["block_losses"][expert][domain]
    assert said["retained"]["sql"]["kept"]["routed"]["value"] == pytest.approx(1)
    assert set(said["summary"]) <= {"gateway", "routed"}


def test_without_a_gateway_an_evaluation_says_that_nothing_is_routed(
    tmp_path: Path, manifest: Manifest, fedmoe: Run, held_out: list[str]
) -> None:
    (tmp_path / "apart").mkdir()
    with capture_logs(), open_house(tmp_path / "apart", Aggregation(enable_gateway=False)) as house:
        house.register("docs", "sql", manifest=manifest)
        with listening(house.app) as running:
            outcome = evaluate(fedmoe, running, *held_out, "--json")
    assert list(json.loads(outcome.out)["losses"]) == ["base", "docs", "sql"]
    assert "not routed: this federation has no gateway" in outcome.err


def test_experts_named_like_a_row_of_the_evaluation_take_nobodys_place(
    tmp_path: Path, manifest: Manifest, fedmoe: Run, held_out: list[str]
) -> None:
    (tmp_path / "named").mkdir()
    with capture_logs(), open_house(tmp_path / "named") as house:
        house.register("base", "gateway", "routed", "sql", manifest=manifest)
        delta = np.random.default_rng(0).normal(0, 0.05, manifest.layout.size).astype(np.float32)
        asyncio.run(house.service.intake.push(*make_push(encode(manifest.layout, delta), 0, 0, expert="base")))
        with listening(house.app) as running:
            outcome = evaluate(fedmoe, running, *held_out, "--json")
    losses = json.loads(outcome.out)["losses"]
    assert list(losses) == ["base", "sql", "gateway"]
    # The base model's, not those of the expert `base`, which has learned something.
    assert losses["base"] == pytest.approx(losses["sql"], rel=1e-6)
    assert all(f"the expert {name} is left out" in outcome.err for name in ("base", "gateway", "routed"))


@pytest.mark.parametrize("wrong", ["sql", "=x", "sql=", "sql=nowhere.jsonl"])
def test_a_domain_without_a_file_is_named(tiny_server: LiveServer, fedmoe: Run, wrong: str) -> None:
    outcome = evaluate(fedmoe, tiny_server, "--domain", wrong)
    assert outcome.status == 1
    assert "--domain" in outcome.err


def test_a_domain_given_twice_is_refused(tiny_server: LiveServer, fedmoe: Run, held_out: list[str]) -> None:
    outcome = evaluate(fedmoe, tiny_server, *held_out, *held_out[:2])
    assert outcome.status == 1
    assert "every name once" in outcome.err


def test_an_audit_says_how_large_the_experts_are_and_which_rank_they_need(tiny_server: LiveServer, fedmoe: Run) -> None:
    outcome = fedmoe("gateway", "audit", "--coordinator-url", tiny_server.url)
    assert outcome.status == 0, outcome.err
    assert "their sum has rank 4; rank 2 keeps 99 % of the energy" in outcome.out
    said = json.loads(fedmoe("gateway", "audit", "--json", "--coordinator-url", tiny_server.url).out)
    assert said["norms"]["docs"] == 0  # an expert begins with B = 0
    assert said["norms"]["sql_expert"] > 0
    assert [(pair["first"], pair["second"]) for pair in said["pairs"]] == [("docs", "sql_expert")]


def test_an_audit_of_nobody_says_what_to_do(tmp_path: Path, fedmoe: Run) -> None:
    (tmp_path / "house").mkdir()
    with capture_logs(), open_house(tmp_path / "house") as house, listening(house.app) as running:
        outcome = fedmoe("gateway", "audit", "--coordinator-url", running.url)
    assert outcome.status == 1
    assert "no experts yet; start a worker" in outcome.err
