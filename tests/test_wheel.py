"""The wheel works alone: the package is all it needs, all of it is packed, and a command says which extra it lacks."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fedmoe"
#: Ways up from a module's own folder.
UPWARDS = re.compile(r"__file__\)[^\n]*(\.parents\[|\.parent\.parent)|__file__[^\n]*\.\.")


def packed() -> set[str]:
    """What has to be in a wheel: every file of the package."""
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_the_whole_package_is_packed_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["fedmoe"]}
    assert "exclude" not in project["tool"]["hatch"]["build"]
    assert "fedmoe/py.typed" in packed()
    entry, _, function = project["project"]["scripts"]["fedmoe"].partition(":")
    assert (entry, function) == ("fedmoe.cli", "main")


def test_no_module_reads_files_beside_the_package() -> None:
    found = [str(path) for path in PACKAGE.rglob("*.py") if UPWARDS.search(path.read_text())]
    assert found == []


def test_every_dependency_is_had_from_a_registry_by_its_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(one for some in project["optional-dependencies"].values() for one in some)]
    assert [one for one in asked if "@" in one or "file:" in one] == []


@pytest.mark.slow  # takes build tools and the core's packages from the registry
def test_a_wheel_in_a_fresh_environment_runs_and_says_which_extras_the_demonstration_needs(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)], check=True, timeout=280)
    (wheel,) = tmp_path.glob("fedmoe-*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = {name for name in content.namelist() if name.startswith("fedmoe/")}
    assert names == packed()
    venv.create(tmp_path / "environment", with_pip=True)
    program, empty = tmp_path / "environment" / "bin", tmp_path / "empty"
    empty.mkdir()
    install = [str(program / "python"), *pip[1:], "install", "-c", str(ROOT / "constraints.txt"), str(wheel)]
    subprocess.run(install, check=True, timeout=280)
    demo = subprocess.run([str(program / "fedmoe"), "demo"], cwd=empty, capture_output=True, text=True, timeout=120)
    assert (demo.returncode, "fedmoe[worker,charts]" in demo.stderr) == (1, True), demo.stderr
    doctor = subprocess.run([str(program / "fedmoe"), "doctor"], cwd=empty, capture_output=True, text=True, timeout=120)
    assert "not installed; a coordinator does not need it" in doctor.stdout, doctor.stderr
    assert list(empty.iterdir()) == []
