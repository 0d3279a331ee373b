"""What the documents say is so: promises name tests, commands and options exist, links lead somewhere (A8)."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest.mock import MagicMock

import forks
import pytest
from fastapi.routing import APIRoute

from fedmoe.server.access.problems import STATUS
from fedmoe.server.routes.routes import create_app

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
DIAGRAMS = sorted((ROOT / "docs" / "diagrams").glob("*.dot"))
IDS = [f"{section}{n}" for section, last in zip("ABCDE", (10, 6, 7, 9, 24), strict=True) for n in range(1, last + 1)]
SCRIPTS = ("run_coordinator.py", "run_worker.py", "get_gateway_model.py")


def promises() -> list[tuple[str, str]]:
    """The rows of the specification's table: id and what stands in its last cell."""
    text = (ROOT / "docs" / "specification.md").read_text()
    return re.findall(r"^\| ([A-E]\d+) \| .+ \| (.+) \|$", text, re.MULTILINE)


NAMED = [(name, test) for name, cell in promises() for test in re.findall(r"`([^`]+)`", cell)]


@cache
def functions_of(file: Path) -> frozenset[str]:
    """The test functions of a file."""
    tree = ast.parse(file.read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def code_of(document: Path) -> str:
    """Everything in a document that is set as code."""
    text = document.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return "\n".join([*blocks, *inline])


ALL_CODE = "\n".join(map(code_of, DOCUMENTS))
#: Where names of modules, classes and functions are looked for; the change log names what was once there.
NAMING = [
    *(path for path in DOCUMENTS if path.name != "CHANGELOG.md"),
    ROOT / "benchmarks" / "README.md",
    ROOT / "findings" / "README.md",
]
NAMES_CODE = "\n".join(map(code_of, NAMING))


def test_every_promise_is_in_the_table_once() -> None:
    assert len(IDS) == 56
    assert [name for name, _ in promises()] == IDS


def test_every_promise_names_a_test() -> None:
    assert {name for name, _ in NAMED} == set(IDS)


@pytest.mark.parametrize(("name", "test"), NAMED)
def test_a_named_test_exists_and_its_file_mentions_the_promise(name: str, test: str) -> None:
    path, function = test.split("::")
    assert function in functions_of(ROOT / path)
    mention = re.compile(rf"(?<![a-z0-9]){name}(?![0-9a-z])", re.IGNORECASE)
    assert mention.search((ROOT / path).read_text())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if not target.startswith(("http://", "https://", "#", "mailto:")):
            assert (document.parent / target.partition("#")[0]).exists(), target


def test_every_document_is_in_the_navigation_of_the_site_once() -> None:
    """mkdocs.yml; the pages of the reference are written when the site is built."""
    named = [
        name for name in re.findall(r"[\w./-]+\.md", (ROOT / "mkdocs.yml").read_text()) if "/reference/" not in name
    ]
    assert sorted(named) == sorted(
        ["benchmarks/README.md", "examples/README.md", *(str(path.relative_to(ROOT)) for path in DOCUMENTS)]
    )


def test_every_file_named_in_the_architecture_exists() -> None:
    paths = re.findall(
        r"`((?:fedmoe|tests|docs|scripts|benchmarks|lora)/[\w./]*)`", (ROOT / "ARCHITECTURE.md").read_text()
    )
    assert len(paths) > 30
    missing = [path for path in paths if not ((ROOT / path).exists() or (ROOT / "fedmoe" / path).exists())]
    assert missing == []


def test_the_list_of_files_in_the_architecture_is_that_of_the_docstrings() -> None:
    done = subprocess.run([sys.executable, "scripts/file_index.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "write it anew with: python scripts/file_index.py"


@cache
def frozen_options() -> dict[str, set[str]]:
    """Command -> its options, from the frozen list (which a test of the command line compares with the real ones)."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "tests" / "cli" / "options.txt").read_text().splitlines():
        command, _, options = line.partition(": ")
        found.setdefault(command, {"--help"}).update(options.split())
    return found


def commands_in(code: str) -> Iterator[str]:
    """Commands of `fedmoe` as far as their words go."""
    for words in re.findall(r"(?<![\w./-])fedmoe((?: [a-z]+)+)", code):
        yield "fedmoe" + words


def test_every_command_named_in_a_document_exists() -> None:
    known = set(frozen_options()) | {" ".join(command.split()[:2]) for command in frozen_options()}
    named = set(commands_in(ALL_CODE))
    assert len(named) > 10
    for command in named:
        words = command.split()
        # An argument may follow: 'fedmoe experts create docs'.
        assert {" ".join(words[:count]) for count in range(2, len(words) + 1)} & known, command


def test_every_option_named_in_a_document_exists() -> None:
    known = set().union(*frozen_options().values())
    others = {"--nproc-per-node", "--logdir", "--force-reinstall", "--index-url"}  # torchrun, tensorboard, pip
    others |= {"--enable-lora", "--max-loras", "--max-lora-rank", "--logprobs-mode"}  # vLLM
    # Whole lines of other programs have options of their own.
    programs = ("dot ", "curl ", "pip ", "createdb ", "python benchmarks/")
    lines = [line for line in ALL_CODE.splitlines() if not line.lstrip().startswith(programs)]
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", "\n".join(lines)))
    assert len(named) > 20
    assert named - known - others - {"--strict"} == set()


def test_every_environment_variable_named_in_a_document_exists() -> None:
    sources = "".join(path.read_text() for path in [*(ROOT / "fedmoe").rglob("*.py"), *(ROOT / "scripts").glob("*.sh")])
    for name in set(re.findall(r"\bFEDMOE_[A-Z_]*[A-Z]", ALL_CODE)):
        process = re.fullmatch(r"FEDMOE_(COORDINATOR|WORKER)_(\w+)", name)
        option = f"--{process[2].lower().replace('_', '-')}" if process else ""
        assert name in sources or (process and option in frozen_options()[f"fedmoe {process[1].lower()}"]), name


@pytest.mark.parametrize("script", [*SCRIPTS, "scripts/status.sh"])
def test_a_script_named_in_the_documents_answers_help(script: str) -> None:
    """All other scripts are asked in tests/test_scripts.py."""
    assert script in ALL_CODE
    if script.endswith(".sh"):
        done = subprocess.run(["bash", script, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    else:
        done = forks.run(script, "--help", folder=ROOT)
    assert (done.returncode, "Usage:" in done.stdout) == (0, True)


def test_every_script_and_file_named_in_a_command_exists() -> None:
    named = set(
        re.findall(
            r"(?<![\w/.-])((?:scripts|benchmarks|tests|docs)/[\w/]+\.(?:sh|py|md|dot|txt))", ALL_CODE + NAMES_CODE
        )
    )
    assert {"scripts/start_worker.sh", "scripts/stop_all.sh"} <= named
    assert [name for name in named if not (ROOT / name).exists()] == []


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or is found in one; names that need AReaL are looked up in the source."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:count])
        if path.is_dir() or path.with_suffix(".py").is_file():
            break
    rest = parts[count:]
    if parts[:2] == ["fedmoe", "areal"] and rest:
        return len(rest) == 1 and rest[0] in defined_in(path.with_suffix(".py"))
    value: object = importlib.import_module(".".join(parts[:count]))
    for part in rest:
        value = getattr(value, part, None)
    return value is not None


def defined_in(file: Path) -> set[str]:
    """The classes and functions of a module."""
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, kinds)}


def test_every_dotted_name_in_a_document_imports() -> None:
    """Entry-point groups, under which other packages offer their own, look the same."""
    named = set(re.findall(r"(?<![\w./-])fedmoe(?:\.\w+)+", NAMES_CODE))
    groups = set(re.findall(r'"(fedmoe\.\w+)"', "".join(map(Path.read_text, (ROOT / "fedmoe").rglob("*.py")))))
    assert {"fedmoe.lora.merge.merge", "fedmoe.areal.learner.ArealLearner", "fedmoe.tasks"} <= named
    assert [name for name in sorted(named - groups) if not resolves(name)] == []


def test_a_name_that_is_not_there_does_not_resolve() -> None:
    assert not resolves("fedmoe.lora.merge.nonsense")
    assert not resolves("fedmoe.areal.learner.nonsense")


@pytest.mark.parametrize("document", NAMING, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_in_a_code_block_works(document: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in modules:
                assert not name.startswith("fedmoe") or resolves(name), name


def test_every_source_file_named_in_a_document_exists() -> None:
    named = set(re.findall(r"(?<![\w/.-])(fedmoe/[\w/]+\.py)", NAMES_CODE))
    assert "fedmoe/lora/merge.py" in named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_make_target_named_in_a_document_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", ALL_CODE + "\n`make demo`", re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_table_of_problems_is_that_of_the_server() -> None:
    text = (ROOT / "docs" / "http-api.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d{3}) \|", text, re.MULTILINE)
    assert Counter(code for code, _ in rows).most_common(1)[0][1] == 1
    assert {code: int(status) for code, status in rows} == STATUS


def test_the_table_of_routes_is_that_of_the_server() -> None:
    app = create_app(MagicMock(), MagicMock(required=False))
    served = {
        f"{method} {route.path}"
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    text = (ROOT / "docs" / "http-api.md").read_text()
    described = set(re.findall(r"^\| `((?:GET|POST) /\S+)` \|", text, re.MULTILINE))
    assert described == served | {"GET /openapi.json"}


def test_the_exit_statuses_are_those_of_the_commands() -> None:
    from fedmoe.cli import output
    from fedmoe.distributed_coordinator import EXIT_PORT_IN_USE, EXIT_STORAGE_FAILED

    assert (output.EXIT_PORT_IN_USE, output.EXIT_STORAGE) == (EXIT_PORT_IN_USE, EXIT_STORAGE_FAILED)
    text = (ROOT / "docs" / "operations.md").read_text()
    listed = {int(status) for status in re.findall(r"^\| (\d+) \| ", text, re.MULTILINE)}
    assert {value for name, value in vars(output).items() if name.startswith("EXIT_")} <= listed


@pytest.mark.parametrize("diagram", DIAGRAMS, ids=lambda path: path.name)
def test_a_diagram_is_dot_that_graphviz_renders(diagram: Path, tmp_path: Path) -> None:
    """A8: rendered where Graphviz is installed; its braces and quotes are looked at everywhere."""
    text = re.sub(r"//.*", "", diagram.read_text())
    assert re.match(r"\s*digraph \w+ \{", text)
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
    assert '"' not in bare
    assert bare.count("{") == bare.count("}")
    assert bare.count("[") == bare.count("]")
    if shutil.which("dot") is not None:
        picture = tmp_path / "picture.png"
        done = subprocess.run(
            ["dot", "-Tpng", "-o", str(picture), str(diagram)], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_specified_diagrams_are_there() -> None:
    assert {"architecture.dot", "dataflow.dot", "deployment.dot", "layers.dot"} <= {path.name for path in DIAGRAMS}


def test_both_languages_of_the_readme_show_the_same_commands_and_numbers() -> None:
    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README.zh.md"))
    tables = [
        re.findall(r"^\| (\w+) \| (\d\.\d+) \| (\d\.\d+) \| (\d\.\d+)", text, re.MULTILINE)
        for text in (english, chinese)
    ]
    assert tables[0] == tables[1]
    options = [sorted(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) for text in (english, chinese)]
    assert set(options[0]) == set(options[1])


FAULT_ROWS = [
    (int(number), cells)
    for number, cells in re.findall(r"^\| (\d+) \| (.+) \|$", (ROOT / "docs" / "faults.md").read_text(), re.MULTILINE)
]
#: Faults of parts that are not there yet, and what the document says of them instead of a test.
PARTS_TO_COME = {75: "with object storage", 79: "with the page"}


def test_all_85_faults_of_a_federation_are_listed_in_order() -> None:
    numbers = [number for number, _ in FAULT_ROWS if number < 100]
    assert sorted(set(numbers)) == list(range(1, 86))
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(("fault", "cells"), FAULT_ROWS)
def test_every_fault_names_tests_that_exist(fault: int, cells: str) -> None:
    named = re.findall(r"`(tests/[^`]+)`", cells.rpartition(" | ")[2])
    assert named or PARTS_TO_COME[fault] in cells
    for test in named:
        file, _, name = test.partition("::")
        assert (ROOT / file).exists(), test
        assert not name or name in functions_of(ROOT / file), test


EXPECTATIONS = re.findall(
    r"^\| (\d+) \| [^|]+ \| (\w+) \| ([^|]+) \| (.+) \|$",
    (ROOT / "docs" / "expectations.md").read_text(),
    re.MULTILINE,
)


def test_all_32_expectations_are_answered_in_order() -> None:
    assert [int(number) for number, *_ in EXPECTATIONS] == list(range(1, 33))
    assert {found for _, found, *_ in EXPECTATIONS} <= {"yes", "partly", "no"}


@pytest.mark.parametrize(("number", "found", "way", "held_by"), EXPECTATIONS)
def test_every_expectation_that_is_met_names_tests_that_exist(number: str, found: str, way: str, held_by: str) -> None:
    named = re.findall(r"`(tests/[^`]+)`", held_by)
    assert named or found == "no", number
    for test in named:
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file(), test
        assert not name or name in functions_of(ROOT / file), test
