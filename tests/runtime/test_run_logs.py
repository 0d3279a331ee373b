"""The log files of a run (E14)."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

import fedmoe
from fedmoe.runtime import logs
from fedmoe.runtime.logs import line_of, log_files, run_logs

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z"


def lines(run_folder: Path, name: str) -> list[str]:
    return (run_folder / "logs" / name).read_text("utf-8").splitlines()


def without_time(line: str) -> str:
    stamp, _, rest = line.partition(" ")
    assert re.fullmatch(STAMP, stamp)
    return rest


def test_the_life_of_the_process_and_the_training_have_a_file_each_e14(tmp_path: Path) -> None:
    with run_logs(tmp_path) as logs:
        logs.runner.info("run_started", task="reasoning:chain_sum", seed=7)
        logs.training.info("iteration", number=3, reward=0.123456789, mode="mixed")
        logs.training.info("decision", what="mode", reason="no gain for 5 iterations")
    assert list(map(without_time, lines(tmp_path, "training_runner.log"))) == [
        "info run_started task=reasoning:chain_sum seed=7"
    ]
    assert list(map(without_time, lines(tmp_path, "training.log"))) == [
        "info iteration number=3 reward=0.123457 mode=mixed",
        'info decision what=mode reason="no gain for 5 iterations"',
    ]


def test_what_any_part_logs_is_in_the_runners_file_also_from_loggers_used_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used_before = structlog.get_logger("fedmoe.arena").bind(part="memory")
    used_before.info("before")
    with run_logs(tmp_path):
        used_before.warning("memory_batch_reduced", before=8, after=4)
        structlog.get_logger().info("checkpoint_saved", name="checkpoint_20260131_120000")
    used_before.info("after")
    assert list(map(without_time, lines(tmp_path, "training_runner.log"))) == [
        "warning memory_batch_reduced part=memory before=8 after=4",
        "info checkpoint_saved name=checkpoint_20260131_120000",
    ]
    shown = "".join(capsys.readouterr())  # standard error in a command, standard output where nothing was set up
    assert all(event in shown for event in ("before", "memory_batch_reduced", "checkpoint_saved", "after"))


@pytest.mark.parametrize("propagates", [True, False])
@pytest.mark.parametrize("name", ["transformers", "peft"])
def test_warnings_of_other_libraries_are_in_the_runners_file_once_and_their_chatter_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, propagates: bool
) -> None:
    # transformers stops handing its records on when it is first used; the others never do.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", propagates)
    with run_logs(tmp_path):
        logging.getLogger(name).warning("a token is %s", "missing")
        logging.getLogger(name).info("chatter")
    logging.getLogger(name).warning("later")
    assert [without_time(line) for line in lines(tmp_path, "training_runner.log")] == [
        f'warning {name} message="a token is missing"'
    ]


def test_the_error_that_ends_a_run_is_one_line_with_its_traceback(tmp_path: Path) -> None:
    def run() -> None:
        with run_logs(tmp_path):
            raise ValueError("two\nlines")

    with pytest.raises(ValueError, match="two"):
        run()
    (line,) = lines(tmp_path, "training_runner.log")
    assert without_time(line).startswith("error run_ended_by_error error=")
    assert r"\nValueError: two\nlines" in line


def test_an_interrupt_is_told_apart_from_an_error(tmp_path: Path) -> None:
    def run() -> None:
        with run_logs(tmp_path):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert [without_time(line) for line in lines(tmp_path, "training_runner.log")] == ["warning run_interrupted"]


def test_a_logged_exception_comes_with_its_traceback(tmp_path: Path) -> None:
    with run_logs(tmp_path) as logs:
        try:
            raise LookupError("lost")
        except LookupError:
            logs.runner.exception("evaluation_failed")
    (line,) = lines(tmp_path, "training_runner.log")
    assert "evaluation_failed" in line
    assert "LookupError: lost" in line


def test_a_second_start_appends_e14(tmp_path: Path) -> None:
    for start in range(2):
        with run_logs(tmp_path) as logs:
            logs.training.info("start", number=start)
    assert [without_time(line) for line in lines(tmp_path, "training.log")] == [
        "info start number=0",
        "info start number=1",
    ]


def test_files_are_rotated_by_size_and_no_line_is_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_ROTATE_BYTES", 2000)
    monkeypatch.setattr(logs, "_OLDER_FILES", 2)
    with run_logs(tmp_path) as loggers:
        for number in range(100):
            loggers.training.info("iteration", number=number)
    folder = tmp_path / "logs"
    names = sorted(file.name for file in folder.glob("training.log*"))
    assert names == ["training.log", "training.log.1", "training.log.2"]
    assert all((folder / name).stat().st_size <= 2000 for name in names)
    numbers = [int(line.rpartition("=")[2]) for name in reversed(names) for line in lines(tmp_path, name)]
    assert numbers == list(range(numbers[0], 100))
    assert all((folder / name).stat().st_mode & 0o077 == 0 for name in names)


def test_threads_never_mix_their_lines(tmp_path: Path) -> None:
    with run_logs(tmp_path) as logs:

        def write(name: str) -> None:
            for number in range(100):
                logs.training.info("iteration", policy=name * 20, number=number)

        threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    written = lines(tmp_path, "training.log")
    assert len(written) == 300
    assert all(re.fullmatch(r"info iteration policy=(\w)\1{19} number=\d+", without_time(line)) for line in written)


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=12) | st.integers() | st.floats() | st.none(), max_size=4))
def test_an_event_is_always_one_line(values: dict[str, object]) -> None:
    line = line_of({"timestamp": "now", "level": "info", "event": "e", **values})
    assert len(line.splitlines()) == 1


def test_text_in_other_scripts_stays_readable_and_quotes_can_be_read_back(tmp_path: Path) -> None:
    with run_logs(tmp_path) as logs:
        logs.training.info("decision", reason='切换到 "竞争" 模式 100%s')
    (line,) = lines(tmp_path, "training.log")
    assert "切换到" in line
    assert json.loads(line.partition("reason=")[2]) == '切换到 "竞争" 模式 100%s'


def test_the_log_files_that_are_there_are_listed_for_the_checkpoint(tmp_path: Path) -> None:
    assert log_files(tmp_path) == {}
    with run_logs(tmp_path):
        pass
    assert log_files(tmp_path) == {
        "logs/training_runner.log": tmp_path / "logs" / "training_runner.log",
        "logs/training.log": tmp_path / "logs" / "training.log",
    }


AFTER_CONFIGURE = """
import logging
import sys
from pathlib import Path
import structlog
from fedmoe.runtime.logs import configure, run_logs
configure()
early = structlog.get_logger("fedmoe.arena")
early.info("early")
with run_logs(Path(sys.argv[1])):
    early.info("inside", number=1)
    logging.getLogger("peft").warning("a token is missing")
"""


def test_with_the_logs_of_the_command_line_nothing_changes_on_standard_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AFTER_CONFIGURE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    events = [json.loads(line)["event"] for line in done.stderr.splitlines()]
    assert events == ["early", "inside", "a token is missing"]
    assert [without_time(line) for line in lines(tmp_path, "training_runner.log")] == [
        "info inside number=1",
        'warning peft message="a token is missing"',
    ]


def test_every_event_the_guide_names_is_one_that_is_logged_e24() -> None:
    root = Path(fedmoe.__file__).parents[1]
    guide = (root / "docs" / "arena-troubleshooting.md").read_text()
    table = guide.partition("| event | meaning |")[2].partition("\n\n")[0]
    named = re.findall(r"`(\w+)`", "\n".join(row.split("|")[1] for row in table.strip().splitlines()[1:]))
    source = "".join(file.read_text() for file in (root / "fedmoe").rglob("*.py"))
    assert len(named) > 10
    assert [name for name in named if f'"{name}"' not in source] == []


def test_the_guide_covers_memory_gpu_disk_logs_resources_and_configuration_e24() -> None:
    guide = (Path(fedmoe.__file__).parents[1] / "docs" / "arena-troubleshooting.md").read_text()
    headings = re.findall(r"^## (.+)$", guide, re.MULTILINE)
    wanted = ("Reading the logs", "Checking the resources", "Out of memory", "No GPU", "No disk space")
    assert set(wanted) <= set(headings)
    for command in ("fedmoe doctor", "fedmoe arena check", "free -h", "nvidia-smi", "df -h", "tail -f"):
        assert command in guide
