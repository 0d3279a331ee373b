"""Two folders as two machines: a coordinator with its own certificate, and workers that join by one line."""

from __future__ import annotations

import json
import re
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Outcome, run_script
from pydantic import TypeAdapter
from support import CoordinatorProcess

from fedmoe.cli.join import default_name
from fedmoe.cli.joined import JoinLine, exchange
from fedmoe.cli.output import CommandError
from fedmoe.runtime.files import lock_folder
from fedmoe.wire.contract.messages import WorkerName

TLS = ("--host", "127.0.0.1", "--tls", "auto")
LINES = [{"text": f"def number_{i}(): return {i} * {i}  # the square of {i}"} for i in range(60)]
Start = Callable[..., CoordinatorProcess]


def first_line(running: CoordinatorProcess) -> str:
    """The join line that the coordinator printed, of which there is one."""
    (line,) = re.findall(r"fedmoe join (\S+) --specialty", running.log.read_text())
    return str(line)


def admin_of(running: CoordinatorProcess) -> dict[str, str]:
    (token,) = re.findall(r"admin +(fmt_\S+)", running.log.read_text())
    return {"FEDMOE_ADMIN_TOKEN": token}


def pinned(running: CoordinatorProcess) -> str:
    return f"{running.url}#{first_line(running).partition('#')[2]}"


def join(line: str, site: Path, steps: int = 2, *more: str) -> Outcome:
    """`fedmoe join` on the machine `site`, with a little data and the tiny model."""
    site.mkdir(exist_ok=True)
    data = site / "python.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in LINES))
    small = ["--base-model", "tiny", "--max-steps", str(steps), "--max-length", "64", "--lora-r", "2"]
    small += ["--no-send-statistics", "--sync-interval", "1", "--state-dir", str(site / "worker"), *more]
    return run_script("-m", "fedmoe", "join", line, "--specialty", "python_expert", "--dataset", str(data), *small)


def events(outcome: Outcome) -> list[dict[str, object]]:
    return [json.loads(line) for line in outcome.err.splitlines() if line.startswith("{")]


def test_a_machine_joins_by_one_line_trains_and_goes_on_after_both_restarted(
    coordinator_process: Start, tmp_path: Path
) -> None:
    running = coordinator_process(TLS)
    running.start()
    line, admin, url = first_line(running), admin_of(running), pinned(running)
    first = join(line, tmp_path / "a")
    assert first.status == 0, first.err[-2000:]
    assert [event["version"] for event in events(first) if event["event"] == "pushed"] == [1]
    file = tmp_path / "a" / "worker" / "join.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    token = json.loads(file.read_text())["token"]

    running.stop()
    running.start()
    log = running.log.read_text()
    assert log.count("fmj_") == 1, "a line is printed once"
    assert token not in log + first.out + first.err
    again = join(line, tmp_path / "a", 4)
    assert again.status == 0, again.err[-2000:]
    assert "joined" not in again.out
    assert [event["version"] for event in events(again) if event["event"] == "pushed"][-1] == 2

    second = join(line, tmp_path / "b")
    assert (second.status, "[join_line_used]" in second.err) == (1, True), second.err
    assert not (tmp_path / "b" / "worker" / "join.json").exists()
    listing = run_script("-m", "fedmoe", "token", "list", "--json", "--coordinator-url", url, environment=admin)
    used = [info for info in json.loads(listing.out)["tokens"] if info["role"] == "invite"]
    assert [(info["usable"], info["used_from"]) for info in used] == [(False, "127.0.0.1")]
    kept = b"".join(path.read_bytes() for path in running.state_dir.rglob("*") if path.is_file())
    assert token.encode() not in kept
    assert line.partition("@")[0].encode() not in kept


def test_the_worker_command_goes_on_with_what_the_line_was_exchanged_for(
    coordinator_process: Start, tmp_path: Path
) -> None:
    running = coordinator_process(TLS)
    running.start()
    site = tmp_path / "a"
    assert join(first_line(running), site, 2, "--worker-id", "w1").status == 0
    options = ["--coordinator-url", running.url, "--worker-id", "w1", "--specialty", "python_expert"]
    options += ["--dataset", str(site / "python.jsonl"), "--base-model", "tiny", "--max-steps", "4", "--lora-r", "2"]
    options += ["--max-length", "64", "--no-send-statistics", "--state-dir", str(site / "worker")]
    outcome = run_script("-m", "fedmoe", "worker", *options)
    assert outcome.status == 0, outcome.err[-2000:]
    assert "pushed" in [event["event"] for event in events(outcome)]


def test_a_crash_between_use_and_answer_locks_nobody_out(coordinator_process: Start, tmp_path: Path) -> None:
    running = coordinator_process(TLS)
    running.start("join.after_use=1")
    line = first_line(running)
    lost = join(line, tmp_path / "a")
    assert lost.status == 69, lost.err
    assert running.wait() == -9
    running.start()
    stranger = join(line, tmp_path / "b")
    assert "[join_line_used]" in stranger.err
    found = join(line, tmp_path / "a")
    assert found.status == 0, found.err[-2000:]


def test_another_key_is_refused_before_anything_is_sent(coordinator_process: Start, tmp_path: Path) -> None:
    running = coordinator_process(TLS)
    running.start()
    line = first_line(running)
    wrong = join(line.partition("#")[0] + "#" + "0" * 64, tmp_path / "a")
    assert wrong.status == 69
    assert "nothing was sent" in wrong.err
    assert "POST /join" not in (running.state_dir / "audit.jsonl").read_text()
    assert join(line, tmp_path / "a").status == 0, "the line was not used up"


def test_without_a_certificate_every_start_off_loopback_says_so_and_names_the_way(
    coordinator_process: Start, tmp_path: Path
) -> None:
    running = coordinator_process(("--host", "0.0.0.0"))
    for _ in range(2):
        running.start()
        assert "start with --tls auto" in running.log.read_text()
        assert "fmj_" not in running.log.read_text()
        running.stop()
        running.log.unlink()
    alone = coordinator_process(("--host", "127.0.0.1"))
    alone.state_dir = tmp_path / "alone" / "state"
    alone.state_dir.parent.mkdir()
    alone.start()
    assert "--tls auto" not in alone.log.read_text()


def test_a_line_over_plain_http_joins_on_this_machine(coordinator_process: Start, tmp_path: Path) -> None:
    running = coordinator_process(("--host", "0.0.0.0"))
    running.start()
    create = ("-m", "fedmoe", "token", "create", "--join", "--json", "--coordinator-url", running.url)
    made = json.loads(run_script(*create, environment=admin_of(running)).out)
    assert made["line"].partition("@")[2] == running.url
    outcome = join(made["line"], tmp_path / "a")
    assert outcome.status == 0, outcome.err[-2000:]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("fmj_short@127.0.0.1:1", "a join line has the form"),
        (f"fmj_{'a' * 43}@127.0.0.1:1#12", "is no fingerprint"),
        (f"fmj_{'a' * 43}@http://192.0.2.1:1", "not encrypted"),
        (f"fmj_{'a' * 43}@http://127.0.0.1:1#{'a' * 64}", "a fingerprint is of TLS"),
    ],
)
def test_a_line_that_cannot_be_meant_is_refused_without_being_repeated(line: str, told: str, tmp_path: Path) -> None:
    outcome = join(line, tmp_path / "a")
    assert outcome.status == 1
    assert told in outcome.err
    assert "fmj_a" not in outcome.err
    assert not (tmp_path / "a" / "worker").exists()


def test_a_wrong_option_is_told_before_the_line_is_used(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.setblocking(False)
        line = f"fmj_{'a' * 43}@127.0.0.1:{silent.getsockname()[1]}#{'a' * 64}"
        assert join(line, tmp_path / "a", 2, "--lora-r", "0").status == 2
        assert join(line, tmp_path / "a", 2, "--report-to", "comet").status == 2
        with pytest.raises(BlockingIOError):
            silent.accept()


def test_in_the_folder_of_a_worker_that_runs_no_line_is_used(tmp_path: Path) -> None:
    lock = lock_folder(tmp_path)
    line = JoinLine.parse(f"fmj_{'a' * 43}@127.0.0.1:1#{'a' * 64}")
    with pytest.raises(CommandError, match="the line was not used: give this worker another --worker-id"):
        exchange(line, tmp_path, "w1")
    lock.close()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("host", ["", "a.example.org", "-odd_ name-", "\N{SNOWMAN}", "x" * 200])
def test_a_worker_is_named_after_its_machine_and_specialty(host: str) -> None:
    TypeAdapter(WorkerName).validate_python(default_name(host, "python_expert"))
    assert default_name("a.example.org", "python_expert") == "a-python_expert"


def test_an_administrator_makes_further_lines_for_an_expert_and_with_an_end(
    coordinator_process: Start, tmp_path: Path
) -> None:
    running = coordinator_process(TLS)
    running.start()
    admin, url = admin_of(running), pinned(running)
    create = ("-m", "fedmoe", "token", "create", "--join", "--json", "--coordinator-url", url)
    made = json.loads(run_script(*create, "--expert", "other", environment=admin).out)
    assert made["line"].endswith(url.removeprefix("https://"))
    assert "--specialty other" in made["command"]
    outside = join(made["line"], tmp_path / "a")
    assert (outside.status, "this token may use other" in outside.err) == (1, True), outside.err
    ended = json.loads(run_script(*create, "--expires-in", "0.001", environment=admin).out)
    late = join(ended["line"], tmp_path / "b")
    assert (late.status, "this join line has expired" in late.err) == (1, True), late.err


def test_with_the_fingerprint_every_command_reaches_the_coordinator_and_doctor_shows_it(
    coordinator_process: Start,
) -> None:
    running = coordinator_process(TLS)
    running.start()
    admin, url = admin_of(running), pinned(running)
    environment = admin | {"FEDMOE_COORDINATOR_URL": url, "FEDMOE_TOKEN": admin["FEDMOE_ADMIN_TOKEN"]}
    assert run_script("-m", "fedmoe", "experts", "list", environment=environment).status == 0
    untrusted = run_script("-m", "fedmoe", "experts", "list", "--coordinator-url", running.url, environment=admin)
    assert "#FINGERPRINT" in untrusted.err
    shown = run_script("-m", "fedmoe", "doctor", "--json", environment=environment)
    tls = next(finding for finding in json.loads(shown.out) if finding["what"] == "TLS")
    assert (tls["state"], url.partition("#")[2] in tls["found"]) == ("ok", True)
