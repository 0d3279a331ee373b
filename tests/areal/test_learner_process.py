"""The learner of another process (E7), without AReaL: how it fails."""

import sys
from pathlib import Path

import pytest

from fedmoe.areal.config import ArealConfig, ArealError
from fedmoe.areal.learner import ArealLearner, ArealProcessError


def _python(tmp_path: Path, script: str) -> Path:
    """An interpreter that runs `script` whatever it is asked to run."""
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\nimport sys\n{script}\n")
    program.chmod(0o755)
    return program


def test_an_interpreter_that_is_not_there_is_named(config: ArealConfig, tmp_path: Path) -> None:
    with pytest.raises(ArealError, match=r"no-such-python cannot be started.*AReaL's environment"):
        ArealLearner(config, tmp_path, python=tmp_path / "no-such-python")


def test_an_environment_without_areal_says_how_to_make_one(config: ArealConfig, tmp_path: Path) -> None:
    script = """
sys.modules["areal"] = None
from fedmoe.areal.process import main
sys.argv = ["process", *sys.argv[3:]]
main()"""
    with pytest.raises(ArealError, match=r"no usable AReaL.*scripts/setup_areal\.sh"):
        ArealLearner(config, tmp_path, python=_python(tmp_path, script))


def test_a_process_that_ends_at_once_shows_its_status_and_log(config: ArealConfig, tmp_path: Path) -> None:
    script = "print('something went wrong', flush=True); sys.exit(3)"
    with pytest.raises(ArealProcessError, match=r"(?s)exit status 3.*something went wrong"):
        ArealLearner(config, tmp_path, python=_python(tmp_path, script))


def test_a_process_that_does_not_answer_is_ended(config: ArealConfig, tmp_path: Path) -> None:
    script = "import time; time.sleep(60)"
    with pytest.raises(ArealProcessError, match=r"did not answer 'start' within 0\.5 s"):
        ArealLearner(config, tmp_path, python=_python(tmp_path, script), timeout=0.5)


def test_a_process_of_another_version_is_refused(config: ArealConfig, tmp_path: Path) -> None:
    # It listens until we hang up: one that left at once would be gone while the request is still being sent.
    script = """
import socket
channel = socket.socket(fileno=int(sys.argv[-1]))
channel.sendall(b'HTTP/1.1 200 OK and so on')
while channel.recv(1 << 16):
    pass"""
    with pytest.raises(ArealError, match="both sides must have one version"):
        ArealLearner(config, tmp_path, python=_python(tmp_path, script))


def test_a_base_folder_that_cannot_be_used_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    with pytest.raises(ArealError, match="missing"):
        ArealLearner(ArealConfig(str(tmp_path)), tmp_path / "work")
    assert not (tmp_path / "work").exists()
