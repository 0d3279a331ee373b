"""The programs and the notebook in examples/, run as their readers would."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import forks
import notebooks
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
#: Program -> what it says in the end, in this order.
SAID = {
    "two_workers": ["python_expert v", "sql_expert v", "gateway v", "at version", "expert rolled back"],
    "own_strategy": ["merged by by_norm:", "python: 0.", "sql: 0."],
    "arena_run": ["iteration 0: ", "iteration 3: ", "the run has ended", "policy_4: rewards [", "finished"],
    "serve_and_ask": ["models: base, gateway, python_expert", "answer: ", "events: "],
}


def run(script: str, folder: Path, *paths: Path) -> str:
    """What a program of examples/ prints, run with its own folder in front, as Python does."""
    code = f"import runpy, sys; sys.path[:0] = {[str(EXAMPLES), *map(str, paths)]}; "
    code += f"runpy.run_path({script!r}, run_name='__main__')"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FEDMOE_")}
    done = forks.run("-c", code, environment=kept | {"OMP_NUM_THREADS": "1"}, folder=folder, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout


def installed(folder: Path, package: Path) -> Path:
    """A folder that holds a package of one module as its installation would, entry points included."""
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    module = package.name
    (folder / f"{module}.py").write_bytes((package / f"{module}.py").read_bytes())
    information = folder / f"{module}-{project['version']}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (information / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_every_program_is_run_and_listed() -> None:
    programs = {path.stem for path in EXAMPLES.glob("*.py")} - {"local_federation"}
    assert programs == SAID.keys()
    listed = set(re.findall(r"\[([\w.]+)\]\(\1\)", (EXAMPLES / "README.md").read_text()))
    assert listed == {path.name for path in EXAMPLES.iterdir()} - {"README.md", "__pycache__"}


@pytest.mark.parametrize("name", SAID)
def test_a_program_says_what_it_did(name: str, tmp_path: Path) -> None:
    said = run(str(EXAMPLES / f"{name}.py"), tmp_path, installed(tmp_path, EXAMPLES / "norm_strategy"))
    places = [said.find(words) for words in SAID[name]]
    assert -1 not in places, said
    assert places == sorted(places)


def test_the_strategy_is_refused_where_its_package_is_not_installed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="unknown value 'by_norm'; choose one of weighted_average"):
        run(str(EXAMPLES / "own_strategy.py"), tmp_path)


def test_the_outputs_in_the_notebook_are_what_its_cells_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for numbers, which depend on how often workers pushed; and for what the threads of workers print at once."""
    monkeypatch.syspath_prepend(EXAMPLES)
    notebook = notebooks.read(EXAMPLES / "federation.ipynb")
    made = notebooks.run(notebook)
    cells = notebooks.code_cells(notebook)
    assert len(cells) > 6
    for cell, outputs in zip(cells, made, strict=True):
        if "start_worker(" not in "".join(cell["source"]):
            written, now = (re.sub(r"\d+(\.\d+)?", "N", notebooks.text_of(text)) for text in (cell["outputs"], outputs))
            assert written == now
    assert any(cell["outputs"] for cell in cells)
