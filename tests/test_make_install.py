"""`make install` takes the build of torch for the machine, and says where it cannot be had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VERSION = next(line[7:] for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
CPU = "https://download.pytorch.org/whl/cpu"

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("make") is None, reason="needs Linux and make")


def program(folder: Path, name: str, script: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """With the programs in `folder` first on the PATH."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TORCH", "MAKEFLAGS", "MAKELEVEL")}
    path = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        command, cwd=ROOT, env=kept | path | environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("script", "variables", "build"),
    [
        ("echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'", [], "cuda"),
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the driver'; exit 9", [], "cpu"),
        ("exit 127", [], "cpu"),
        ("echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'", ["TORCH=cpu"], "cpu"),
    ],
)
def test_the_build_is_that_of_the_machine(script: str, variables: list[str], build: str, tmp_path: Path) -> None:
    program(tmp_path, "nvidia-smi", script)
    done = run(tmp_path, "make", "--dry-run", "--always-make", "install", *variables)
    assert done.returncode == 0, done.stderr
    assert f"scripts/install_torch.sh {build}\n" in done.stdout


@pytest.mark.parametrize(
    ("build", "asked"),
    [
        ("cpu", [f"torch=={VERSION}+cpu", f"torch=={VERSION}+cpu --index-url {CPU}"]),
        ("cuda", [f"torch==={VERSION}", f"torch=={VERSION}+cu130 --index-url {CPU.replace('/cpu', '/cu130')}"]),
    ],
)
def test_the_index_in_use_is_asked_first_and_pytorchs_own_then(build: str, asked: list[str], tmp_path: Path) -> None:
    log = tmp_path / "asked"
    program(tmp_path, "python", f'echo "$@" >>{log}; [ -e {tmp_path}/there ] || exit 1')
    failed = run(tmp_path, "scripts/install_torch.sh", build, PYTHON=str(tmp_path / "python"))
    assert failed.returncode == 1
    assert "make TORCH=cpu|cuda" in failed.stderr
    assert [line.partition("--no-deps ")[2] for line in log.read_text().splitlines()] == asked
    log.unlink()
    (tmp_path / "there").touch()
    assert run(tmp_path, "scripts/install_torch.sh", build, PYTHON=str(tmp_path / "python")).returncode == 0
    assert len(log.read_text().splitlines()) == 1


def test_another_build_is_refused() -> None:
    done = subprocess.run(
        ["scripts/install_torch.sh", "rocm"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "say cpu or cuda, got 'rocm'" in done.stderr
