"""The shell scripts: start, stop and show background processes, and never touch anybody else's (A6, A7)."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import free_port

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
COMMANDS = ("start_coordinator", "stop_coordinator", "start_worker", "stop_worker", "status", "stop_all")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts need bash")


@dataclass(frozen=True)
class Machine:
    """A place of its own for pid files, logs and state; scripts are run from a folder that is not the repository."""

    folder: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def script(self, name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FEDMOE_")}
        own = {"FEDMOE_RUN_DIR": str(self.run_dir), "FEDMOE_LOG_DIR": str(self.logs), "OMP_NUM_THREADS": "1"}
        # Without a .venv in the repository the scripts take python3: the one that runs the tests.
        own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", str(SCRIPTS / f"{name}.sh"), *arguments],
            cwd=self.folder,
            env=kept | own | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def start_coordinator(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        state = str(self.folder / "state")
        return self.script("start_coordinator", "--port", str(free_port()), "--state-dir", state, *arguments)

    def pid(self, name: str = "coordinator") -> int:
        return int((self.run_dir / f"{name}.pid").read_text())

    def url(self) -> str:
        return (self.run_dir / "coordinator.info").read_text().splitlines()[4]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """Whatever a test leaves running is ended by the process id in its own pid files."""
    made = Machine(tmp_path)
    yield made
    for file in made.run_dir.glob("*.pid"):
        pid = int(file.read_text())
        if str(ROOT) in command_line(pid):
            os.kill(pid, signal.SIGKILL)


def command_line(pid: int) -> str:
    """The arguments of a process; empty if there is none or it is a zombie."""
    done = subprocess.run(["ps", "-ww", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return "" if "<defunct>" in done.stdout else done.stdout.strip()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_script_is_executable_and_answers_help(name: str, machine: Machine) -> None:
    """A6, A7."""
    assert os.access(SCRIPTS / f"{name}.sh", os.X_OK)
    done = machine.script(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Usage: {name}.sh" in done.stdout


@pytest.mark.parametrize("name", [*COMMANDS, "common"])
def test_a_script_is_well_formed(name: str) -> None:
    file = SCRIPTS / f"{name}.sh"
    subprocess.run(["bash", "-n", str(file)], check=True)
    checker = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if checker is not None:
        subprocess.run([checker, "-x", str(file)], cwd=ROOT, check=True)


def test_the_coordinator_starts_answers_and_stops(machine: Machine) -> None:
    """A6: with a pid file and a log; A7: what runs is shown with pid, time, log and experts."""
    started = machine.start_coordinator()
    assert started.returncode == 0, started.stderr
    pid = machine.pid()
    assert "run_coordinator.py" in command_line(pid)
    assert f"process id {pid}" in started.stdout
    assert '"listening"' in (machine.logs / "coordinator.log").read_text()

    shown = machine.script("status")
    assert shown.returncode == 0, shown.stderr
    for word in (f"process id {pid}", str(machine.logs / "coordinator.log"), machine.url(), "Experts", " s, log"):
        assert word in shown.stdout

    again = machine.start_coordinator()
    assert again.returncode == 1
    assert f"running already with process id {pid}" in again.stderr
    assert machine.pid() == pid

    stopped = machine.script("stop_coordinator")
    assert (stopped.returncode, stopped.stdout) == (0, f"coordinator stopped (process id {pid})\n")
    assert command_line(pid) == ""
    assert list(machine.run_dir.iterdir()) == []
    assert '"stopped"' in (machine.logs / "coordinator.log").read_text()
    assert machine.script("stop_coordinator").stdout == "coordinator is not running\n"
    assert machine.script("status").returncode == 3


def test_a_start_that_fails_shows_the_reason(machine: Machine) -> None:
    done = machine.start_coordinator("--strategy", "median")
    assert done.returncode == 1
    assert "weighted_average, sum" in done.stderr
    assert list(machine.run_dir.iterdir()) == []


def test_tokens_are_shown_and_not_logged(machine: Machine) -> None:
    """They are printed once; a log is kept and copied around."""
    done = machine.start_coordinator("--host", "0.0.0.0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fmt_") == 3  # join, admin, and the worker's command
    assert "fmt_" not in (machine.logs / "coordinator.log").read_text()
    assert sorted(file.name for file in machine.run_dir.iterdir()) == ["coordinator.info", "coordinator.pid"]
    shown = machine.script("status")
    assert shown.returncode == 0
    assert "FEDMOE_TOKEN" in shown.stderr
    token = done.stdout.partition("FEDMOE_TOKEN=")[2].split()[0]
    assert "Experts" in machine.script("status", FEDMOE_TOKEN=token).stdout


def test_a_crash_leaves_a_pid_file_that_is_recognised_as_stale(machine: Machine) -> None:
    machine.start_coordinator()
    pid = machine.pid()
    os.kill(pid, signal.SIGKILL)
    while command_line(pid):
        time.sleep(0.02)
    assert "stale" in machine.script("status").stdout
    again = machine.start_coordinator()
    assert again.returncode == 0, again.stderr
    assert "stale pid file" in again.stdout
    assert machine.pid() != pid


def test_a_process_id_that_went_to_somebody_else_is_left_alone(machine: Machine) -> None:
    """A7: nothing else is stopped, whatever the pid file says."""
    machine.start_coordinator()
    mine = machine.pid()
    # A process that even bears the coordinator's name, but is not the one that was started.
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(ROOT / "run_coordinator.py")])
    try:
        (machine.run_dir / "coordinator.pid").write_text(f"{stranger.pid}\n")
        assert "stale" in machine.script("stop_coordinator").stdout
        (machine.run_dir / "coordinator.pid").write_text(f"{stranger.pid}\n")
        assert machine.script("stop_all").returncode == 0
        assert stranger.poll() is None
        assert command_line(mine)
    finally:
        stranger.kill()
        stranger.wait()
        os.kill(mine, signal.SIGTERM)


@pytest.mark.parametrize("content", ["", "not a number\n", "-1\n", "0\n", "1\n"])
def test_a_damaged_pid_file_stops_nothing(content: str, machine: Machine) -> None:
    machine.run_dir.mkdir()
    (machine.run_dir / "coordinator.pid").write_text(content)
    assert machine.script("stop_all").returncode == 0
    assert list(machine.run_dir.iterdir()) == []


def test_a_worker_needs_an_id_that_can_be_a_file_name(machine: Machine) -> None:
    assert machine.script("start_worker", "--dataset", "d.jsonl").returncode == 2
    refused = machine.script("start_worker", "--worker-id", "../../etc/passwd")
    assert refused.returncode == 2
    assert "--worker-id" in refused.stderr
    assert machine.script("stop_worker", "../coordinator").returncode == 2


def test_a_worker_starts_trains_and_stops_before_the_coordinator(machine: Machine) -> None:
    """A6, A7, D6: a coordinator's machine also runs a worker; stop_all ends both, the worker first."""
    machine.start_coordinator()
    data = machine.folder / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"line {number} of some text"}) + "\n" for number in range(50)))
    specified = ["--coordinator-url", machine.url(), "--worker-id", "Worker-1", "--specialty", "docs_expert"]
    specified += ["--dataset", "data.jsonl", "--sync-interval=1.0"]
    small = ["--base-model", "tiny", "--max-length", "32", "--lora-r", "2"]
    started = machine.script("start_worker", *specified, *small, "--state-dir", "worker-state")
    assert started.returncode == 0, started.stderr
    pid = machine.pid("worker-Worker-1")
    assert machine.script("start_worker", *specified, *small).returncode == 1
    # Relative paths mean what they mean to the caller.
    assert (machine.folder / "worker-state").is_dir()
    shown = machine.script("status").stdout
    assert f"worker-Worker-1: running, process id {pid}" in shown
    assert "docs_expert" in shown

    coordinator = machine.pid()
    stopped = machine.script("stop_all")
    assert stopped.returncode == 0, stopped.stderr
    assert [line.split()[0] for line in stopped.stdout.splitlines()] == ["worker-Worker-1", "coordinator"]
    assert command_line(pid) == command_line(coordinator) == ""
    assert list(machine.run_dir.iterdir()) == []
    assert "pushed" in (machine.logs / "worker-Worker-1.log").read_text()


def _imports_at_load(modules: list[str]) -> set[str]:
    """The packages other than ours that are loaded with these modules of ours, those of the standard library apart."""
    seen: set[str] = set()
    packages: set[str] = set()
    while modules:
        name = modules.pop()
        file = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        file = file if file.exists() else file.with_suffix("") / "__init__.py"
        if name in seen or not file.exists():
            continue
        seen.add(name)
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                packages.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Import):
                modules += [alias.name for alias in node.names]
                packages |= {alias.name.partition(".")[0] for alias in node.names}
    return packages - set(sys.stdlib_module_names) - {"fedmoe"}


def test_areals_environment_has_what_our_modules_load_there() -> None:
    there = [f"fedmoe.areal.{name}" for name in ("actor", "process", "workflow", "stock_vllm")]
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints-areal.txt").read_text("utf-8").split()}
    assert {"torch", "transformers", "numpy"} <= _imports_at_load(there) <= pinned | {"areal"}
