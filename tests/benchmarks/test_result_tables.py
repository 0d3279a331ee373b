"""The tables of the documents are those of the results, and every benchmark can be run by name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
README = (BENCHMARKS / "README.md").read_text()
DOCUMENTS = README + "".join((ROOT / "docs" / name).read_text() for name in ("scale.md", "hardware.md"))


@pytest.fixture(autouse=True)
def programs_import_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_the_tables_of_the_readme_are_those_of_the_results() -> None:
    import tables

    assert tables.outdated(DOCUMENTS) == [], "write them anew with: python benchmarks/tables.py"


def test_a_figure_changed_by_hand_is_seen_and_written_anew() -> None:
    import tables

    changed = README.replace("| fp32 | 1 | 18.0", "| fp32 | 1 | 19.0", 1)
    assert tables.outdated(changed) == ["coordinator"]
    assert tables.written(changed) == README


def test_a_mark_that_names_no_table_is_refused() -> None:
    import tables

    with pytest.raises(SystemExit, match="marks a table nonsense"):
        tables.written("<!-- table: nonsense -->\n| a |\n<!-- end of table -->\n")


def test_every_table_whose_result_is_there_is_shown() -> None:
    import tables

    shown = set(re.findall(r"<!-- table: (\w+) -->", DOCUMENTS))
    missing = set(tables.TABLES) - shown
    assert not shown - set(tables.TABLES)
    for name in missing:
        with pytest.raises(FileNotFoundError):
            tables.TABLES[name]()


def test_every_table_without_a_result_is_said_to_be_so() -> None:
    """Of a table written by hand the text right before it, or the paragraph, names that."""
    plain = re.sub(r"<!-- table: .*?<!-- end of table -->", "", README, flags=re.DOTALL)
    for section in re.split(r"^## ", plain, flags=re.MULTILINE):
        assert "| --- |" not in section or "ot in a result file" in section, section.partition("\n")[0]


def test_every_benchmark_is_listed_with_what_it_needs() -> None:
    import run

    assert {f"bench_{name}.py" for name in run.BENCHMARKS} == {path.name for path in BENCHMARKS.glob("bench_*.py")}
    listing = run.listing()
    assert all(run.title(name) and run.title(name) in listing for name in run.BENCHMARKS)


def test_what_make_bench_runs_accepts_its_usual_options() -> None:
    import run

    for name, benchmark in run.BENCHMARKS.items():
        source = run.program(name).read_text()
        for option in re.findall(r"--[a-z-]+", benchmark.options):
            assert f'"{option}"' in source, (name, option)


@pytest.mark.parametrize(
    ("words", "advice"),
    [(["nonsense"], "no benchmark is called nonsense"), (["--seeds", "1"], "options go to one benchmark")],
)
def test_a_wrong_call_says_what_to_do(words: list[str], advice: str) -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / "run.py", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert advice in done.stderr


def test_threads_are_pinned_before_anything_that_computes_is_imported() -> None:
    """`pin_threads` refuses to start a program that has loaded numpy already."""
    programs = [path for path in BENCHMARKS.glob("bench_*.py") if "\npin_threads(" in path.read_text()]
    assert len(programs) > 10
    for path in programs:
        before = path.read_text().partition("\npin_threads(")[0]
        imported = re.findall(r"^(?:from|import) (\w+)", before, re.MULTILINE)
        ours = [name for name in imported if name not in sys.stdlib_module_names and name != "lib"]
        assert ours == [], f"{path.name} imports {ours} before pin_threads"
