"""What programs read: JSON documents with keys that stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command import Outcome, commands
from live import ADMIN, JOIN, House, LiveServer
from rich.console import Console
from support import LAYOUT, make_flat

from fedmoe.cli.demo_run.plan import DemoPlan
from fedmoe.lora.codec import encode
from fedmoe.lora.formats import read_npz
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.messages import UpdateHeader

Run = Callable[..., Outcome]

GATEWAY = {
    *("version", "strategy", "rank", "parameters", "modules", "lora_A_shape", "lora_B_shape", "sources", "weights"),
    *("truncation_error", "digest", "statistics", "statistics_tokens", "notes", "scale", "gate", "living", "left_out"),
    *("incarnation", "source_digests"),
}
EXPERT = {"name", "version", "rank", "alpha", "parameters", "base", "digest", "workers", "prompts"}
WORKER = {"worker", "updates", "staleness", "loss", "steps", "tokens", "seconds_ago"}
CHANGE = {"expert", "version", "gateway_version", "removed", "digest", "note", "incarnation"}


def test_gateway_info(server: LiveServer, fedmoe: Run) -> None:
    """A3, D3: two registrations and three updates made the gateway's version 5."""
    said = json.loads(fedmoe("gateway", "info", "--json", "--coordinator-url", server.url).out)
    assert said.keys() == GATEWAY
    assert (said["version"], said["sources"], said["weights"]) == (5, {"python": 3}, {"python": 1.0})
    assert said["left_out"] == {"sql": "no update has landed on it yet"}


def test_experts_list(server: LiveServer, fedmoe: Run) -> None:
    """A5."""
    said = json.loads(fedmoe("experts", "list", "--json", "--coordinator-url", server.url).out)
    assert said.keys() == {"experts", "gateway", "enable_gateway"}
    assert said["gateway"].keys() == GATEWAY
    python, sql = said["experts"]
    assert python.keys() == sql.keys() == EXPERT
    assert [(w["worker"], w["updates"]) for w in python["workers"]] == [("w1", 2), ("w2", 1)]
    assert python["workers"][0].keys() == WORKER
    assert sql["workers"] == []


def test_experts_alone_lists_them_too(server: LiveServer, fedmoe: Run) -> None:
    said = json.loads(fedmoe("experts", "--json", "--coordinator-url", server.url).out)
    assert [expert["name"] for expert in said["experts"]] == ["python", "sql"]


def test_experts_create(server: LiveServer, fedmoe: Run) -> None:
    said = json.loads(fedmoe("experts", "create", "docs", "sql", "--json", "--coordinator-url", server.url).out)
    assert [(expert["name"], expert["version"]) for expert in said] == [("docs", 0), ("sql", 0)]
    assert said[0].keys() == EXPERT | {"incarnation"}


def test_rollback_and_retract(server: LiveServer, house: House, fedmoe: Run) -> None:
    url = ("--coordinator-url", server.url)
    second = json.loads(fedmoe("retract", "python", "w2", "--reason", "bad data", "--json", *url).out)
    assert second.keys() == CHANGE
    assert (second["version"], second["removed"]) == (4, 1)
    back = json.loads(fedmoe("rollback", "python", "0", "--json", *url).out)
    assert back.keys() == CHANGE
    assert (back["version"], back["removed"]) == (5, 2)
    assert house.service.coordinator.expert("python").digest == back["digest"]


def test_quarantine_lists_releases_and_rejects(server: LiveServer, fedmoe: Run) -> None:
    url = ("--coordinator-url", server.url)
    with CoordinatorClient(server.url) as worker:
        for number in range(20, 27):
            size = 1.0 if number < 25 else 1e6
            body = encode(LAYOUT, np.float32(size) * make_flat(number))
            header = UpdateHeader(expert="python", worker="w3", epoch="e1", sequence=number, base_version=3)
            assert worker.push(header, body).result.status == ("landed" if number < 25 else "quarantined")
    listed = json.loads(fedmoe("quarantine", "--json", *url).out)["held"]
    assert [(u["number"], u["worker"], u["sequence"]) for u in listed] == [(1, "w3", 25), (2, "w3", 26)]
    assert "held above 50" in fedmoe("quarantine", *url).out
    released = json.loads(fedmoe("quarantine", "release", "1", "--json", *url).out)
    assert (released["expert"], released["version"]) == ("python", 9)
    rejected = json.loads(fedmoe("quarantine", "reject", "2", "--reason", "no", "--json", *url).out)
    assert rejected == {"number": 2, "status": "rejected", "reason": "no"}
    assert fedmoe("quarantine", "list", *url).out == "No update is held.\n"


def test_token_create_and_revoke(locked_server: LiveServer, fedmoe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    url = ("--coordinator-url", locked_server.url)
    # An administrator may have both set: the workers' token must not get in the way.
    monkeypatch.setenv("FEDMOE_TOKEN", JOIN)
    monkeypatch.setenv("FEDMOE_ADMIN_TOKEN", ADMIN)
    made = json.loads(fedmoe("token", "create", "--worker", "w7", "--expert", "python", "--json", *url).out)
    assert made.keys() == {"token", "hash"}
    monkeypatch.setenv("FEDMOE_TOKEN", made["token"])
    assert fedmoe("experts", "list", *url).status == 0
    revoked = fedmoe("token", "revoke", made["hash"][:12], "--json", *url)
    assert json.loads(revoked.out) == {"hash": made["hash"], "revoked": True}
    assert fedmoe("experts", "list", *url).status == 1


#: Commands that go on until they are stopped, as do `logs -f` and `status --watch`, whose JSON is a document a line;
#: a worker has JSON for its dry run.
LONG = {"coordinator", "join", "evaluator", "dashboard", "gateway serve", "arena watch"}


def test_every_command_that_ends_has_json() -> None:
    plain = set()
    for name, command in commands():
        options = {option for parameter in command.params for option in parameter.opts}
        if not getattr(command, "commands", None) and "--json" not in options:
            plain.add(name.removeprefix("fedmoe "))
    assert plain == LONG


def test_the_gateway_as_a_file(server: LiveServer, fedmoe: Run, tmp_path: Path) -> None:
    url = ("--coordinator-url", server.url)
    saved = json.loads(fedmoe("gateway", "save", str(tmp_path / "a.npz"), "--json", *url).out)
    assert saved.keys() == {"file", "version", "digest", "sources"}
    assert (saved["version"], saved["sources"]) == (5, {"python": 3})
    target = str(tmp_path / "b.npz")
    made = json.loads(fedmoe("gateway", "export", target, "--format", "npz", "--json", *url).out)
    assert made == {"model": "gateway", "version": 5, "format": "npz", "target": target, "sources": {"python": 3}}


def test_a_simulation(fedmoe: Run, tmp_path: Path) -> None:
    config = tmp_path / "simulation.toml"
    config.write_text(
        'seconds = 20.0\n[work]\nkind = "recorded"\nparameters = 256\n[fleet]\nworkers = 3\n'
        '[[schemes]]\nname = "every ten seconds"\nkind = "asynchronous"\n'
    )
    outcome = fedmoe("simulate", str(config), "--out", str(tmp_path / "out"), "--json")
    said = json.loads(outcome.out)
    assert said.keys() == {"folder", "work", "note", "schemes"}
    assert said["schemes"][0].keys() == {"name", "kind", "fleet", "updates", "bytes"}
    assert "updates accepted" in outcome.err


def test_a_demonstration(fedmoe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that has ended: what it shows meanwhile goes to standard error."""

    def ended(plan: DemoPlan, console: Console) -> None:
        console.print("4/4 report")
        (plan.folder / "report.json").write_text('{"steps_per_worker": 60}')

    monkeypatch.setattr("fedmoe.cli.demo_run.run.run_demo", ended)
    outcome = fedmoe("demo", "--out", str(tmp_path / "demo"), "--json")
    assert json.loads(outcome.out) == {"folder": str(tmp_path / "demo"), "report": {"steps_per_worker": 60}}
    assert outcome.err == "4/4 report\n"


def test_the_schema_of_the_file_with_and_without(fedmoe: Run) -> None:
    assert json.loads(fedmoe("config", "schema", "--json").out) == json.loads(fedmoe("config", "schema").out)


def test_data_check(fedmoe: Run, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\nnot json\n')
    outcome = fedmoe("data", "check", str(file), "--json")
    said = json.loads(outcome.out)
    assert {"path", "sha256", "format", "rows", "good", "bad"} <= said.keys()
    assert (said["format"], said["rows"], said["good"]) == ("text", 3, 2)
    assert outcome.status == 1  # a third of the rows is bad


def test_doctor(server: LiveServer, fedmoe: Run, tmp_path: Path) -> None:
    """D9: what is missing is told with what to do."""
    file = tmp_path / "empty.jsonl"
    file.touch()
    outcome = fedmoe("doctor", "--json", "--dataset", str(file), "--coordinator-url", server.url)
    said = json.loads(outcome.out)
    assert all(finding.keys() == {"what", "state", "found", "fix"} for finding in said)
    found = {finding["what"]: finding for finding in said}
    assert {"Python", "SQLite", "disk", "memory", "torch", "transformers", "coordinator", "dataset"} <= found.keys()
    assert found["coordinator"]["state"] == "ok"
    assert found["dataset"]["state"] == "problem"
    assert outcome.status == 1


def test_doctor_goes_on_after_a_refusal(locked_server: LiveServer, fedmoe: Run) -> None:
    outcome = fedmoe("doctor", "--json", "--coordinator-url", locked_server.url)
    coordinator = next(finding for finding in json.loads(outcome.out) if finding["what"] == "coordinator")
    assert coordinator["state"] == "problem"
    assert "FEDMOE_TOKEN" in coordinator["fix"]


def test_the_specified_tool_prints_one_document_whatever_it_saves(
    server: LiveServer,
    house: House,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A4, A5: `--save-gateway` and `--list-experts` together."""
    from fedmoe.cli import get_gateway_model

    file = tmp_path / "gateway_model.npz"
    options = ["--coordinator-url", server.url, "--save-gateway", str(file), "--list-experts", "--json"]
    monkeypatch.setattr("sys.argv", ["get_gateway_model.py", *options])
    get_gateway_model()
    said = capsys.readouterr()
    assert json.loads(said.out)["gateway"]["version"] == 5
    assert str(file) in said.err
    saved, gateway = read_npz(file.read_bytes()), house.service.coordinator.gateway().adapter
    for name in (module.name for module in gateway.layout.modules):
        (a, b), (c, d) = saved.module(name), gateway.module(name)
        np.testing.assert_allclose(b @ a * saved.scale, d @ c * gateway.scale, rtol=1e-6, atol=1e-9)


def test_an_expert_is_renamed_retired_and_brought_back(server: LiveServer, fedmoe: Run) -> None:
    url = ("--coordinator-url", server.url)
    assert "python is now code, at version 3" in fedmoe("experts", "rename", "python", "code", *url).out
    assert "code (was python)" in fedmoe("experts", *url).out
    assert "sql is retired" in fedmoe("experts", "retire", "sql", "--reason", "mistyped", *url).out
    assert "sql (retired)" in fedmoe("experts", "list", *url).out
    assert "left out: sql (it is retired)" in fedmoe("gateway", "info", *url).out
    refused = fedmoe("experts", "create", "sql", *url)
    assert refused.status == 1
    assert "fedmoe experts unretire sql" in refused.err
    assert "sql is back, at version 0" in fedmoe("experts", "unretire", "sql", *url).out
    again = json.loads(fedmoe("experts", "retire", "python", "--json", *url).out)
    assert (again["name"], again["formerly"], again["retired"]) == ("code", ["python"], True)
