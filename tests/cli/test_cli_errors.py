"""What goes wrong is told in one line that says what to do, with an exit status programs can rely on."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from command import Outcome, run_script
from live import JOIN, LiveServer
from support import CoordinatorProcess, free_port

Run = Callable[..., Outcome]
WORKER = ["worker", "--coordinator-url", "http://127.0.0.1:5000", "--worker-id", "w1", "--specialty", "python"]


def assert_refused(outcome: Outcome, status: int, *words: str) -> None:
    """One line on standard error, nothing on standard output."""
    assert outcome.status == status, outcome.err
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["coordinator", "--strategy", "median"], ["--strategy", "'median'", "weighted_average, sum"]),
        (["coordinator", "--staleness", "never"], ["--staleness", "polynomial"]),
        (["coordinator", "--server-optimizer", "x"], ["--server-optimizer", "sgd"]),
        (["coordinator", "--port", "99999"], ["--port", "65535", "99999"]),
        (["coordinator", "--port", "many"], ["--port", "integer"]),
        (["coordinator", "--server-learning-rate", "nan"], ["--server-learning-rate"]),
        (["coordinator", "--tls-cert", "cert.pem"], ["--tls-cert", "--tls-key"]),
        (["coordinator", "--token", "too short"], ["--token", "16 characters"]),
        (["coordinator", "--strateggy", "sum"], ["--strateggy", "--strategy", "--help"]),
        ([*WORKER, "--dataset", "d", "--sync-interval", "0"], ["--sync-interval", "5 to 30 recommended"]),
        ([*WORKER, "--dataset", "d", "--wire-dtype", "int3"], ["--wire-dtype", "int8"]),
        ([*WORKER, "--dataset", "d", "--lr-scheduler-type", "linear"], ["--max-steps"]),
        (WORKER, ["--dataset", "worker --help"]),
        (["gatewey"], ["gatewey", "--help"]),
        (["gateway", "info", "--coordinator-url", "localhost"], ["--coordinator-url", "http://10.0.0.1:5000"]),
        (["gateway", "export"], ["target"]),
        (["gateway", "export", "x", "--format", "onnx"], ["peft", "npz"]),
        (["token", "create", "--role", "king"], ["--role", "'worker', 'join', 'admin', 'viewer'"]),
        (["token", "create", "--expert", "Bad Name"], ["--expert", "Bad Name"]),
        (["token", "create", "--expires-in", "-1"], ["--expires-in"]),
        (["rollback", "python", "newest"], ["integer"]),
    ],
)
def test_a_wrong_option_is_named_with_what_would_be_right(arguments: list[str], words: list[str], fedmoe: Run) -> None:
    assert_refused(fedmoe(*arguments), 2, *words)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["coordinator", "--database-url", "fedmoe:hush-hush@127.0.0.1/db"], "--database-url"),
        (["coordinator", "--database-url", "mysql://fedmoe:hush-hush@127.0.0.1/db"], "--database-url"),
        (["coordinator", "--blobs", "s3://key:hush-hush@bucket/prefix"], "--blobs"),
        (["coordinator", "--replica", "a", "--advertise", "http://key:hush-hush@127.0.0.1:5000"], "--advertise"),
        ([*WORKER, "--dataset", "d", "--coordinator-url", "http://key:hush-hush@127.0.0.1:5000"], "--coordinator-url"),
        (["state", "migrate", "from", "to", "--to-blobs", "s3://key:hush-hush@bucket/prefix"], "--to-blobs"),
    ],
)
def test_a_url_that_may_hold_a_secret_is_not_repeated(arguments: list[str], option: str, fedmoe: Run) -> None:
    refused = fedmoe(*arguments)
    assert_refused(refused, 2, option, "expected")
    assert "hush" not in refused.err


@pytest.mark.parametrize(
    "command",
    [
        [*WORKER, "--dataset", "d"],
        ["evaluator", "--evaluator-id", "e", "--expert", "x", "--held-out", "d"],
        ["gateway", "generate", "hi", "--base-model", "tiny"],
        ["gateway", "serve", "--base-model", "tiny"],
    ],
)
def test_a_chat_template_that_is_none_is_told_before_anything_else(
    command: list[str], fedmoe: Run, tmp_path: Path
) -> None:
    file = tmp_path / "letter.jinja"
    file.write_text("Dear reader")
    url = ["--coordinator-url", f"http://127.0.0.1:{free_port()}"] if command[0] == "evaluator" else []
    given = [*command, *url, "--chat-template"]
    assert_refused(fedmoe(*given, str(file)), 1, "letter.jinja never asks for `messages`")
    assert_refused(fedmoe(*given, str(tmp_path / "none.jinja")), 1, "none.jinja cannot be read")
    assert_refused(fedmoe(*command, *url, "--chat-template-kwargs", "thinking=no"), 1, "no JSON")


def test_several_wrong_options_take_a_line_each(fedmoe: Run) -> None:
    outcome = fedmoe("coordinator", "--port", "99999", "--strategy", "median")
    assert outcome.status == 2
    assert [line.split(":")[1].strip() for line in outcome.err.splitlines()] == ["--port", "--strategy"]


def test_a_misspelt_environment_variable_is_an_error(fedmoe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMOE_COORDINATOR_PROT", "5001")
    assert_refused(fedmoe("coordinator"), 2, "FEDMOE_COORDINATOR_PROT", "FEDMOE_COORDINATOR_PORT")


def test_a_token_never_shows_in_an_error(fedmoe: Run) -> None:
    outcome = fedmoe("coordinator", "--token", "short-secret")
    assert outcome.status == 2
    assert "short-secret" not in outcome.err


@pytest.mark.parametrize(
    "arguments",
    [["gateway", "info"], ["experts", "list"], ["gateway", "save", "never.npz"], ["rollback", "python", "1"]],
)
def test_a_coordinator_that_is_down_is_status_69(arguments: list[str], fedmoe: Run, tmp_path: Path) -> None:
    outcome = fedmoe(*arguments, "--coordinator-url", f"http://127.0.0.1:{free_port()}")
    assert_refused(outcome, 69, "does not answer", "--coordinator-url")
    assert not Path("never.npz").exists()


class _Stranger(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<h1>hello</h1>")

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: what is asked of a stranger is not this test's output."""


def test_something_else_that_answers_is_status_69(fedmoe: Run) -> None:
    with HTTPServer(("127.0.0.1", 0), _Stranger) as stranger:
        serving = threading.Thread(target=stranger.serve_forever)
        serving.start()
        outcome = fedmoe("gateway", "info", "--coordinator-url", f"http://127.0.0.1:{stranger.server_port}")
        stranger.shutdown()
        serving.join()
    assert_refused(outcome, 69)


def test_a_missing_file_is_named(fedmoe: Run, tmp_path: Path) -> None:
    assert_refused(fedmoe("data", "check", str(tmp_path / "no.jsonl")), 1, "no.jsonl", "no such file")


def test_a_worker_says_that_its_data_is_missing(fedmoe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The log of a process is not set up here: it would outlive this test.
    monkeypatch.setattr("fedmoe.cli.worker.configure", lambda: None)
    assert_refused(fedmoe(*WORKER, "--dataset", str(tmp_path / "no.jsonl")), 1, "no.jsonl", "no such file")


def test_an_unknown_expert_is_refused_with_its_code(server: LiveServer, fedmoe: Run, tmp_path: Path) -> None:
    outcome = fedmoe("gateway", "export", str(tmp_path / "out"), "--expert", "cobol", "--coordinator-url", server.url)
    assert_refused(outcome, 1, "'cobol'", "python, sql", "[unknown_expert]")
    assert not (tmp_path / "out").exists()


def test_an_export_never_replaces_what_is_there_unasked(server: LiveServer, fedmoe: Run, tmp_path: Path) -> None:
    for kind in ("npz", "peft"):
        target = tmp_path / kind
        target.mkdir()
        (target / "mine").write_text("mine")
        outcome = fedmoe("gateway", "export", str(target), "--format", kind, "--coordinator-url", server.url)
        assert_refused(outcome, 1, "exists", "--force")
        assert (target / "mine").read_text() == "mine"


def test_saving_over_a_folder_is_an_error_without_a_traceback(server: LiveServer, fedmoe: Run, tmp_path: Path) -> None:
    outcome = fedmoe("gateway", "save", str(tmp_path), "--coordinator-url", server.url)
    assert_refused(outcome, 1, str(tmp_path))


def test_a_missing_token_is_told_with_both_ways_to_give_one(locked_server: LiveServer, fedmoe: Run) -> None:
    outcome = fedmoe("experts", "list", "--coordinator-url", locked_server.url)
    assert_refused(outcome, 1, "--token or FEDMOE_TOKEN", "[unauthorised]")


def test_a_join_token_may_not_roll_back(
    locked_server: LiveServer, fedmoe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMOE_TOKEN", JOIN)
    outcome = fedmoe("rollback", "python", "0", "--coordinator-url", locked_server.url)
    assert_refused(outcome, 1, "admin token", "[forbidden]")


@pytest.mark.parametrize("content", [None, "not a certificate"])
def test_unusable_tls_files_are_found_before_tokens_are_made(content: str | None, fedmoe: Run, tmp_path: Path) -> None:
    """Fault 60."""
    file = tmp_path / "cert.pem"
    if content is not None:
        file.write_text(content)
    state = tmp_path / "state"
    outcome = fedmoe(
        *("coordinator", "--host", "0.0.0.0", "--state-dir", str(state)),
        "--tls-cert",
        str(file),
        "--tls-key",
        str(file),
    )
    assert_refused(outcome, 1, str(file))
    assert not state.exists()


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        yield holder.getsockname()[1]


def test_a_port_in_use_is_status_98(taken_port: int, tmp_path: Path) -> None:
    """Fault 14."""
    outcome = run_script("run_coordinator.py", "--port", str(taken_port), "--state-dir", str(tmp_path / "state"))
    assert outcome.status == 98
    assert f"error: cannot listen on 127.0.0.1:{taken_port}" in outcome.err
    assert "--port" in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err


def test_a_state_directory_in_use_is_told_with_who_holds_it(
    coordinator_process: Callable[..., CoordinatorProcess],
) -> None:
    running = coordinator_process()
    running.start()
    assert running.process is not None
    outcome = run_script("run_coordinator.py", "--port", "0", "--state-dir", str(running.state_dir))
    assert_refused(outcome, 1, f"process id {running.process.pid}", "--state-dir")


def test_a_state_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = run_script("run_coordinator.py", "--port", "0", "--state-dir", str(tmp_path / "file" / "state"))
    assert_refused(outcome, 1, "--state-dir")


def test_a_damaged_journal_is_told_and_left_alone(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    (state / "journal.sqlite").write_bytes(b"no database at all" * 100)
    outcome = run_script("run_coordinator.py", "--port", "0", "--state-dir", str(state))
    assert outcome.status == 74
    assert "Traceback" not in outcome.err
    assert (state / "journal.sqlite").read_bytes() == b"no database at all" * 100


@pytest.mark.parametrize("kind", ["npz", "peft"])
def test_an_export_onto_a_full_disk_leaves_nothing_and_what_was_there_stays_84(
    kind: str, server: LiveServer, fedmoe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    target = tmp_path / "out" / f"adapter-{kind}"
    target.parent.mkdir()
    exporting = ("gateway", "export", str(target), "--format", kind, "--coordinator-url", server.url)
    with monkeypatch.context() as disk:
        disk.setattr("fedmoe.runtime.files.os.fsync", full)
        assert_refused(fedmoe(*exporting), 1, "No space left on device")
    assert list(target.parent.iterdir()) == []
    assert fedmoe(*exporting).status == 0
    before = _contents(target.parent)
    assert_refused(fedmoe(*exporting), 1, "exists", "--force")
    with monkeypatch.context() as disk:
        disk.setattr("fedmoe.runtime.files.os.fsync", full)
        assert_refused(fedmoe(*exporting, "--force"), 1, "No space left on device")
    assert _contents(target.parent) == before
    assert fedmoe(*exporting, "--force").status == 0


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
