"""The laws of the house, read from the source itself: who may import whom, and what nobody may import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import fedmoe
from fedmoe.cli.commands import PLACES

ROOT = Path(fedmoe.__file__).parents[1]
PACKAGE = ROOT / "fedmoe"

#: Folder or root module -> those it may import, from the ground floor up. A row names rows above it only, so there is
#: no way back down. A folder's row covers the modules that lie in it, not its folders, which have rows of their own.
LAYERS: dict[str, set[str]] = {
    "runtime": set(),
    "lora": set(),
    "datasets.readers": set(),
    "datasets.demo": {"datasets.readers"},
    "datasets.formats": {"datasets.readers"},
    "datasets": {"datasets.formats", "datasets.readers"},
    "datasets.tokens": {"datasets.formats", "datasets.readers"},
    "monitor": {"lora", "runtime"},
    "monitor.charts": {"lora", "monitor", "runtime"},
    "monitor.interactive": {"lora", "monitor"},
    "experts": {"lora", "runtime"},
    "wire.contract": {"lora", "runtime"},
    "wire": {"lora", "runtime", "wire.contract"},
    "wire.http": {"runtime", "wire.contract"},
    "monitor.web": {"monitor", "monitor.interactive", "runtime", "wire.http"},
    "models": {"datasets", "datasets.readers", "datasets.tokens", "lora", "runtime"},
    "federation": {"experts", "lora", "runtime"},
    "config": {"federation", "lora", "runtime", "wire.contract"},
    "qwen_finetune": {"datasets.tokens", "lora", "models", "runtime"},
    "inference": {"lora", "models", "runtime"},
    "inference.batching": {"inference", "lora", "models"},
    "inference.vllm": {"inference", "lora", "runtime"},
    "coordinator": {"experts", "federation", "lora", "runtime"},
    "qwen_worker": {"datasets.readers", "datasets.tokens", "lora", "models", "qwen_finetune"},
    "gateway": {
        "config",
        "datasets",
        "datasets.tokens",
        "lora",
        "models",
        "qwen_finetune",
        "runtime",
        "wire",
        "wire.contract",
    },
    "gateway.serve": {
        "gateway",
        "inference",
        "inference.batching",
        "inference.vllm",
        "lora",
        "models",
        "runtime",
        "wire",
        "wire.contract",
        "wire.http",
    },
    "arena.tasks": {"runtime"},
    "arena.rollout": {"arena.tasks", "inference", "lora", "models", "runtime"},
    "arena.population": {"arena.rollout", "inference", "lora", "runtime"},
    "arena.learning": {"arena.population", "arena.rollout", "inference", "lora", "models", "runtime"},
    "arena.modes": {"arena.population", "arena.rollout", "arena.tasks", "runtime"},
    "arena": {
        "arena.learning",
        "arena.modes",
        "arena.rollout",
        "arena.tasks",
        "inference",
        "lora",
        "runtime",
        "wire.contract",
    },
    "arena.league": {
        "arena",
        "arena.learning",
        "arena.modes",
        "inference",
        "lora",
        "models",
        "runtime",
        "wire",
        "wire.contract",
    },
    "arena.run": {
        "arena",
        "arena.league",
        "arena.learning",
        "arena.modes",
        "arena.rollout",
        "arena.tasks",
        "inference",
        "inference.vllm",
        "lora",
        "models",
        "runtime",
        "wire",
    },
    "areal": {"arena", "arena.learning", "arena.rollout", "arena.tasks", "inference", "lora", "models", "runtime"},
    "server.storage": {"federation", "lora", "runtime"},
    "server.storage.revisions": set(),
    "server.access": {"lora", "runtime", "server.storage", "wire.contract", "wire.http"},
    "server.gate": {"coordinator", "experts", "federation", "lora", "runtime", "server.storage", "wire.contract"},
    "server.statistics": {
        "coordinator",
        "federation",
        "lora",
        "runtime",
        "server.access",
        "server.storage",
        "wire.contract",
    },
    "server.status": {"federation", "wire.contract"},
    "server.history": {
        "coordinator",
        "experts",
        "federation",
        "lora",
        "runtime",
        "server.gate",
        "server.statistics",
        "server.storage",
        "wire.contract",
    },
    "server.updates": {
        "coordinator",
        "federation",
        "lora",
        "runtime",
        "server.access",
        "server.history",
        "server.statistics",
        "server.storage",
        "wire.contract",
    },
    "server.upkeep": {
        "coordinator",
        "experts",
        "federation",
        "lora",
        "runtime",
        "server.history",
        "server.statistics",
        "server.storage",
        "server.updates",
        "wire.contract",
    },
    "server": {
        "coordinator",
        "experts",
        "federation",
        "lora",
        "runtime",
        "server.access",
        "server.gate",
        "server.history",
        "server.statistics",
        "server.status",
        "server.storage",
        "server.updates",
        "server.upkeep",
        "wire.contract",
    },
    "server.page": {"runtime", "server.access", "wire.contract", "wire.http"},
    "server.routes": {
        "coordinator",
        "experts",
        "federation",
        "lora",
        "runtime",
        "server",
        "server.access",
        "server.gate",
        "server.history",
        "server.page",
        "server.statistics",
        "server.storage",
        "server.updates",
        "wire.contract",
        "wire.http",
    },
    "server.replicas": {
        "lora",
        "runtime",
        "server.access",
        "server.storage",
        "server.updates",
        "wire",
        "wire.contract",
        "wire.http",
    },
    "worker": {
        "config",
        "datasets",
        "datasets.readers",
        "datasets.tokens",
        "lora",
        "models",
        "qwen_worker",
        "runtime",
        "wire",
        "wire.contract",
    },
    "simulation": {
        "coordinator",
        "datasets.tokens",
        "experts",
        "federation",
        "lora",
        "models",
        "qwen_finetune",
        "qwen_worker",
        "runtime",
        "server.history",
    },
    "distributed_worker": {"lora", "qwen_finetune", "qwen_worker", "runtime", "wire", "wire.contract", "worker"},
    "server.app": {
        "config",
        "coordinator",
        "runtime",
        "server",
        "server.access",
        "server.gate",
        "server.history",
        "server.page",
        "server.replicas",
        "server.routes",
        "server.storage",
        "server.updates",
        "server.upkeep",
        "wire.contract",
        "wire.http",
    },
    "distributed_coordinator": {
        "config",
        "runtime",
        "server",
        "server.access",
        "server.app",
        "server.storage",
        "wire.http",
    },
    "cli.demo_run": {
        "datasets.demo",
        "datasets.tokens",
        "gateway",
        "lora",
        "models",
        "monitor.charts",
        "runtime",
        "wire",
    },
    "cli": {
        "areal",
        "arena",
        "arena.modes",
        "arena.rollout",
        "arena.run",
        "arena.tasks",
        "cli.demo_run",
        "config",
        "coordinator",
        "datasets",
        "datasets.demo",
        "datasets.readers",
        "datasets.tokens",
        "distributed_coordinator",
        "distributed_worker",
        "server.app",
        "gateway",
        "gateway.serve",
        "inference",
        "lora",
        "models",
        "monitor",
        "monitor.charts",
        "monitor.interactive",
        "monitor.web",
        "qwen_finetune",
        "qwen_worker",
        "runtime",
        "server.history",
        "server.storage",
        "simulation",
        "wire",
        "wire.contract",
        "wire.http",
        "worker",
    },
    "__main__": {"cli"},
}

#: Parts that decide and do nothing else: time, randomness and bytes come in as arguments.
PURE = (
    *("coordinator", "experts", "federation", "lora"),
    *("gateway.losses", "gateway.retained_gain", "gateway.routers", "server.gate.verdict"),
    *("simulation.clock", "simulation.fleet", "simulation.presence", "simulation.tally", "simulation.texts"),
    *("simulation.asynchronous", "simulation.rounds", "simulation.simulated_coordinator", "simulation.report"),
)
INPUT_AND_OUTPUT = {
    *("asyncio", "datetime", "fastapi", "http", "httpx2", "logging", "multiprocessing", "os", "pathlib", "random"),
    *("requests", "safetensors", "secrets", "shutil", "signal", "socket", "sqlalchemy", "sqlite3", "ssl", "starlette"),
    *("structlog", "subprocess", "tempfile", "time", "torch", "transformers", "urllib", "uvicorn"),
}

#: Heavy library -> the parts that may import it, at all.
HEAVY: dict[str, set[str]] = {
    "torch": {
        *("areal", "arena.learning", "arena.run", "gateway", "inference", "inference.batching", "models"),
        *("qwen_finetune", "runtime"),
    },
    "transformers": {"areal", "arena.rollout", "gateway.serve", "inference.batching", "models", "qwen_finetune"},
    "huggingface_hub": {"models"},
    "tokenizers": {"models"},
    "pyarrow": {"datasets.readers"},
    "datasets": {"datasets.readers"},
    "matplotlib": {"monitor", "monitor.charts"},
    "fastapi": {"gateway.serve", "server.access", "server.routes", "wire.http"},
    "starlette": {
        *("gateway.serve", "monitor.web", "server.access", "server.page", "server.replicas"),
        *("server.app", "server.routes", "server.updates", "wire.http"),
    },
    "uvicorn": {"distributed_coordinator", "gateway.serve", "server.app", "wire.http"},
    "sqlalchemy": {"server.replicas", "server.storage", "server.storage.revisions"},
    "ray": {"arena.run"},
}

#: What runs code that comes with data.
UNSAFE_MODULES = {"cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "pickle", "shelve"}
UNSAFE_CALLS = {("torch", "load"), ("torch", "save"), ("yaml", "load")}

SERVER_SIDE = ("lora", "experts", "federation", "coordinator", "wire", "server", "config")
WORKER_SIDE = ("distributed_worker", "models", "qwen_finetune", "qwen_worker", "worker")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported_names(tree: ast.AST, package: str = "") -> Iterator[str]:
    """Everything imported anywhere in a file, at its top or in a function; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{package}: relative imports are not used"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def imports_of(name: str) -> frozenset[str]:
    """Our own modules that a module imports, by their full names."""
    found = set()
    for imported in imported_names(tree_of(MODULES[name]), name):
        if imported.split(".")[0] == "fedmoe":
            target = imported if imported in MODULES else imported.rpartition(".")[0]
            assert target in MODULES, f"{name} imports {imported}, which is not there"
            found.add(target)
    return frozenset(found - {"fedmoe"})


@cache
def roots_of(name: str) -> frozenset[str]:
    """The packages that a module imports anything of."""
    return frozenset(imported.split(".")[0] for imported in imported_names(tree_of(MODULES[name])))


def part_of(module: str) -> str:
    """The row of a module: its folder, or itself at the root."""
    is_folder = MODULES[module].name == "__init__.py"
    inner = module.removeprefix("fedmoe.")
    part = inner if is_folder or "." not in inner else inner.rpartition(".")[0]
    assert part in LAYERS, f"{module} stands in no row of LAYERS; add one"
    return part


def modules_of(*parts: str) -> list[str]:
    return [name for name in MODULES if any(f"{name}.".startswith(f"fedmoe.{part}.") for part in parts)]


def reachable(starts: list[str]) -> set[str]:
    """All modules of ours that importing `starts` can load."""
    found: set[str] = set()
    waiting = list(starts)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += imports_of(name)
    return found


OURS = [name for name in MODULES if name != "fedmoe"]


def test_a_row_names_rows_above_it_only() -> None:
    above: set[str] = set()
    for part, allowed in LAYERS.items():
        assert allowed <= above, f"{part} may import {sorted(allowed - above)}, which stand below it"
        above.add(part)


def test_every_row_covers_something() -> None:
    assert {part_of(name) for name in OURS} == set(LAYERS)


def test_a_module_imports_what_its_row_allows() -> None:
    for name in OURS:
        part = part_of(name)
        imported = {part_of(target) for target in imports_of(name)} - {part}
        assert imported <= LAYERS[part], f"{name} may not import {sorted(imported - LAYERS[part])}"


def test_no_module_imports_itself_on_a_detour() -> None:
    for name in OURS:
        assert name not in reachable(list(imports_of(name))), f"{name} is part of an import cycle"


def test_server_and_workers_never_load_each_other() -> None:
    server, worker = modules_of("server", "distributed_coordinator"), modules_of(*WORKER_SIDE)
    assert server
    assert worker
    assert not reachable(server) & set(worker)
    assert not reachable(worker) & set(server)


def test_only_the_command_line_and_the_demonstration_show() -> None:
    importers = {
        part_of(name) for name in OURS if any(part_of(target).startswith("monitor") for target in imports_of(name))
    }
    assert importers - {"monitor", "monitor.charts", "monitor.interactive", "monitor.web"} <= {"cli", "cli.demo_run"}


def test_only_the_entry_points_import_the_command_line() -> None:
    importers = {part_of(name) for name in OURS if any(part_of(target) == "cli" for target in imports_of(name))}
    assert importers == {"cli", "__main__"}


def test_a_deciding_module_has_no_input_and_output() -> None:
    for name in modules_of(*PURE):
        assert not roots_of(name) & INPUT_AND_OUTPUT, f"{name} may not import {sorted(roots_of(name))}"


def test_a_heavy_library_stays_in_its_place() -> None:
    for name in OURS:
        for library in roots_of(name) & HEAVY.keys():
            assert part_of(name) in HEAVY[library], f"{name} may not import {library}"


def test_only_models_load_a_base_model() -> None:
    for name in OURS:
        attributes = {node.attr for node in ast.walk(tree_of(MODULES[name])) if isinstance(node, ast.Attribute)}
        assert "from_pretrained" not in attributes or part_of(name) == "models"


def test_the_server_side_loads_no_torch() -> None:
    names = [*modules_of(*SERVER_SIDE), "fedmoe.distributed_coordinator"]
    names += [place.module for place in PLACES.values()]
    heavy = ["torch", "transformers", "tokenizers", "huggingface_hub", "peft", "pyarrow", "matplotlib"]
    code = "\n".join(f"import {name}" for name in names)
    code += f"\nimport sys; print(sorted(sys.modules.keys() & {set(heavy)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def sources() -> Mapping[str, Path]:
    """Every Python file of the repository but the tests."""
    others = [*ROOT.glob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "demo").rglob("*.py")]
    others += (ROOT / "examples").rglob("*.py")
    return MODULES | {module_name(path): path for path in others}


def test_nothing_runs_code_that_comes_with_data() -> None:
    for name, path in sources().items():
        assert not list(_unsafe(tree_of(path))), name


def _unsafe(tree: ast.Module) -> Iterator[str]:
    """What a module does that would run code out of a file."""
    yield from {imported.split(".")[0] for imported in imported_names(tree)} & UNSAFE_MODULES
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=module), attr=name) if (module, name) in UNSAFE_CALLS:
                yield f"{module}.{name}"
            case ast.keyword(arg="allow_pickle", value=value) if not _is_false(value):
                yield "allow_pickle"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="np" | "numpy"), attr="load"), keywords=keywords):
                if not any(keyword.arg == "allow_pickle" for keyword in keywords):
                    yield "numpy.load without allow_pickle"


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "np.load(file)",
        "np.load(file, allow_pickle=True)",
        "torch.load(file)",
        "read(allow_pickle=yes)",
    ],
)
def test_code_that_would_is_noticed(source: str) -> None:
    assert list(_unsafe(ast.parse(source)))


def test_what_tests_share_lies_in_no_test_module() -> None:
    sources = (ROOT / "tests").rglob("*.py")
    assert not [path.name for path in sources if re.search(r"^\s*(from|import) test_", path.read_text(), re.MULTILINE)]
