"""The lock files: everything by its hash, at the versions of constraints.txt, and nothing about where it came from."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCKS = sorted(ROOT.glob("requirements*.lock"))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(path: Path) -> dict[str, str]:
    """Package -> version, of a lock file or of the constraints."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", path.read_text(), re.MULTILINE)
    return {canonical(name): version for name, version in found}


def test_there_is_a_lock_for_all_one_for_coordinators_and_one_for_each_build_of_torch() -> None:
    parts = ("requirements-coordinator", "requirements-torch-cpu", "requirements-torch-cuda", "requirements")
    assert [path.stem for path in LOCKS] == list(parts)
    coordinator, cpu, cuda, rest = map(pinned, LOCKS)
    assert coordinator.items() <= rest.items()
    assert not coordinator.keys() & {"torch", "transformers", "pyarrow"}
    assert cpu == {"torch": f"{cuda['torch']}+cpu"}
    assert "torch" not in rest
    assert {name for name in cuda if not name.startswith(("nvidia-", "cuda-"))} == {"torch", "triton"}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_every_package_of_a_lock_has_hashes_and_no_place(lock: Path) -> None:
    for block in re.split(r"\n(?=\S)", lock.read_text().strip()):
        assert block.startswith("#") or re.search(r"--hash=sha256:[0-9a-f]{64}", block), block
    assert not re.search(r"://|^-|@", lock.read_text(), re.MULTILINE)


def test_the_lock_has_the_versions_of_the_constraints() -> None:
    wanted = pinned(ROOT / "constraints.txt")
    locked = pinned(ROOT / "requirements.lock")
    assert {name: version for name, version in locked.items() if wanted.get(name, version) != version} == {}


def test_everything_the_project_asks_for_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    asked = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    # What metrics are sent to is its users' choice, and wants much of its own.
    left_out = ("dev", "docs", "mlflow", "trackio", "wandb")
    asked += [one for name, some in extras.items() if name not in left_out for one in some]
    names = {canonical(re.split(r"[<>=!~;\[ ]", one)[0]) for one in asked} - {"fedmoe"}
    assert names - pinned(ROOT / "requirements.lock").keys() - {"torch"} == set()


@pytest.mark.parametrize("script", ["lock", "install_locked", "sbom", "fuzz"])
def test_a_script_answers_help_and_refuses_what_it_does_not_know(script: str, tmp_path: Path) -> None:
    path = str(ROOT / "scripts" / f"{script}.sh")
    environment = os.environ | {"FEDMOE_TOOLS": str(tmp_path), "PYTHON": sys.executable}
    helped = subprocess.run(["bash", path, "--help"], capture_output=True, text=True, check=False, env=environment)
    assert (helped.returncode, "Usage:" in helped.stdout) == (0, True)
    wrong = subprocess.run(
        ["bash", path, "nonsense", "more", "words"], capture_output=True, text=True, check=False, env=environment
    )
    assert (wrong.returncode, "error: " in wrong.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_installation_from_the_locks_works_and_can_be_listed(tmp_path: Path) -> None:
    """Gets everything anew; needs a registry that has the CPU build of torch."""
    environment = os.environ | {"FEDMOE_TOOLS": str(tmp_path / "tools"), "PYTHON": sys.executable}
    environment.pop("PYTHONPATH", None)
    for command in (
        ["install_locked.sh", "cpu", str(tmp_path / "env")],
        ["sbom.sh", str(tmp_path / "env"), str(tmp_path)],
    ):
        done = subprocess.run(["bash", f"scripts/{command[0]}", *command[1:]], cwd=ROOT, env=environment, check=False)
        assert done.returncode == 0
    assert '"bomFormat": "CycloneDX"' in (tmp_path / "sbom.cdx.json").read_text()
    assert "| fedmoe " in (tmp_path / "licences.md").read_text()
