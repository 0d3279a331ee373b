"""The laws of the house, read from the source itself: who may import whom, and what nobody may import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import fedmoe

ROOT = Path(fedmoe.__file__).parents[1]
PACKAGE = ROOT / "fedmoe"

#: Part of the house -> the parts it may import, from the ground floor up. A row names rows above it only, so there is
#: no way back down. A row covers a module or a whole folder; the most exact row counts.
LAYERS: dict[str, set[str]] = {
    # Algebra, and words everybody uses.
    "lora": set(),
    "errors": set(),
    "failpoints": set(),
    "files": set(),
    "record": set(),
    "inert": set(),
    "logs": {"inert"},
    # The process and its machine.
    "machine": set(),
    "mounts": set(),
    "threads": {"machine"},
    "streams": set(),
    "allocator": set(),
    "cache": {"files", "logs"},
    "gateway.prompt_statistics": {"lora"},
    "gateway.route": {"gateway.prompt_statistics", "lora"},
    "gateway.rerank": {"lora"},
    "gateway.gate": set(),
    # Decisions: no I/O.
    "manifest": {"errors", "lora"},
    "events": {"manifest"},
    "experts": {"errors", "lora", "manifest"},
    "living": {"events", "experts", "lora"},
    "quarantine": {"errors", "events"},
    "leases": {"errors"},
    "aggregation": {"errors", "experts", "living", "lora", "manifest"},
    "roll": {"errors", "events", "experts", "manifest"},
    "draft": {"aggregation", "errors", "events", "experts", "living", "lora", "manifest", "quarantine", "roll"},
    "gateway_members": {"experts", "living"},
    "coordinator": {
        *("aggregation", "draft", "errors", "events", "experts", "gateway_members", "living", "lora", "manifest"),
        "quarantine",
    },
    # What survives a crash, and what travels.
    "storage": {"errors", "events", "failpoints", "files", "manifest", "mounts"},
    "wire": {"errors", "inert", "logs", "lora", "manifest"},
    "config": {"lora", "wire"},
    # The server side: no torch.
    "server": {
        *("coordinator", "draft", "errors", "events", "experts", "failpoints", "gateway_members", "living"),
        *("leases", "quarantine"),
        *("gateway.gate", "gateway.prompt_statistics", "lora", "manifest", "roll", "storage", "wire"),
    },
    "distributed_coordinator": {"allocator", "config", "coordinator", "errors", "server", "storage"},
    # The worker side: never the server.
    "datasets": {"files"},
    "models": {"cache", "datasets", "files", "lora", "machine", "manifest"},
    "qwen_finetune": {"datasets", "lora", "manifest", "models"},
    "qwen_worker": {"datasets", "lora", "manifest", "models", "qwen_finetune"},
    "worker.options": {"config", "datasets", "lora", "manifest", "models", "wire"},
    "worker.outbox": {"failpoints", "files", "wire"},
    "worker.delivery": {"errors", "manifest", "wire", "worker.outbox"},
    "worker.disclosure": {"errors", "wire", "worker.delivery"},
    "worker.group": {"models"},
    "worker.device_failure": {"models", "worker.group"},
    "worker.pull": {"manifest", "wire"},
    "worker.progress": {"lora", "qwen_worker"},
    "worker.report": {"qwen_worker", "record", "wire", "worker.delivery", "worker.outbox", "worker.progress"},
    "worker.restart": {"datasets", "models", "qwen_worker", "worker.group", "worker.progress"},
    "worker.signals": set(),
    "worker.phases": set(),
    "distributed_worker": {
        *("failpoints", "lora", "qwen_finetune", "qwen_worker", "wire", "worker.device_failure"),
        *("worker.delivery", "worker.group", "worker.outbox", "worker.progress", "worker.pull", "worker.report"),
        "worker.restart",
    },
    "worker.statistics": {"datasets", "gateway.prompt_statistics", "lora", "models"},
    "worker.kept_statistics": {"datasets", "files", "models", "wire"},
    "worker.training_data": {"cache", "config", "datasets", "lora", "models", "worker.options", "worker.phases"},
    "worker.setup": {
        *("config", "coordinator", "datasets", "distributed_worker", "lora", "models", "qwen_finetune", "qwen_worker"),
        *("wire", "worker.disclosure", "worker.group", "worker.kept_statistics", "worker.options", "worker.outbox"),
        *("worker.phases", "worker.restart", "worker.signals", "worker.statistics", "worker.training_data"),
    },
    "worker.inference": {"lora", "models", "qwen_finetune"},
    "worker": set(),
    # The arena: values and decisions first.
    "arena.task": set(),
    "arena.control": set(),
    "arena.environment": {"machine"},
    "arena.baselines": set(),
    "arena.budget": set(),
    "arena.strategy": {"arena.task"},
    "arena.teams": set(),
    "arena.switching": set(),
    "arena.admission": set(),
    "arena.loss": set(),
    "arena.credit": {"arena.task"},
    "arena.rating": set(),
    "arena.packed_array": set(),
    "arena.memory_pressure": set(),
    "arena.engines.protocol": {"lora"},
    "arena.engines.verify": {"arena.engines.protocol"},
    "arena.trajectory": {"arena.engines.protocol", "arena.task"},
    "arena.metrics": {"arena.trajectory"},
    "arena.survival": {"lora", "arena.engines.protocol", "arena.rating"},
    "arena.opponents": {"arena.engines.protocol", "arena.trajectory"},
    "arena.adapt": {"lora", "arena.loss"},
    "arena.society": {
        *("arena.baselines", "arena.budget", "arena.opponents", "arena.rating", "arena.strategy", "arena.survival"),
    },
    "arena.modes": {
        *("arena.baselines", "arena.budget", "arena.credit", "arena.society", "arena.strategy", "arena.survival"),
        *("arena.switching", "arena.task", "arena.teams", "arena.trajectory"),
    },
    "arena.tasks": {"arena.task"},
    "arena.chat": {"arena.task", "models"},
    # What it computes, keeps and says.
    "arena.rollout": {"arena.chat", "arena.engines.protocol", "arena.task", "arena.trajectory"},
    "arena.learner": {"lora", "models", "arena.loss", "arena.trajectory"},
    "arena.policies": {
        *("lora", "arena.adapt", "arena.admission", "arena.engines.protocol", "arena.learner", "arena.survival"),
        "arena.trajectory",
    },
    "arena.interval": set(),
    "arena.evaluate": {
        *("arena.chat", "arena.engines.protocol", "arena.interval", "arena.rollout", "arena.task", "arena.trajectory"),
    },
    "arena.tournament": {
        *("arena.chat", "arena.engines.protocol", "arena.interval", "arena.rollout", "arena.task", "arena.trajectory"),
    },
    "arena.memory": {"machine", "models", "arena.control", "arena.memory_pressure"},
    "arena.placement": {"models", "mounts"},
    "arena.records": {"record"},
    "arena.checkpoint_parts": {"lora", "arena.packed_array"},
    "arena.checkpoint": {
        *("failpoints", "files", "lora", "arena.checkpoint_parts", "arena.packed_array", "arena.placement"),
    },
    "arena.run_records": {"record"},
    "arena.results": {
        *("files", "record", "arena.checkpoint", "arena.checkpoint_parts", "arena.interval", "arena.run_records"),
    },
    "arena.run_logs": set(),
    "arena.config": {"wire", "arena.loss"},
    "arena.entrants": {
        *("lora", "arena.checkpoint", "arena.config", "arena.engines.protocol"),
    },
    "arena.reporting": {
        *("record", "arena.evaluate", "arena.learner", "arena.modes", "arena.policies", "arena.society"),
        "arena.trajectory",
    },
    "arena.episodes": {"files", "arena.reporting", "arena.trajectory"},
    "arena.trainer": {
        "lora",
        *("models", "arena.chat", "arena.config", "arena.engines.protocol", "arena.evaluate", "arena.learner"),
        *(
            "arena.loss",
            "arena.metrics",
            "arena.modes",
            "arena.policies",
            "arena.reporting",
            "arena.rollout",
            "arena.society",
        ),
        *("arena.task", "arena.trajectory"),
    },
    "arena.engines": {"files", "lora", "models", "arena.config", "arena.engines.protocol"},
    "arena.areal": {
        *("files", "lora", "models", "arena.chat", "arena.engines.protocol", "arena.learner", "arena.loss"),
        *("arena.task", "arena.tasks", "arena.trajectory"),
    },
    "arena.federation_link": {
        *("errors", "failpoints", "files", "lora", "manifest", "wire", "worker.delivery", "worker.outbox"),
        "arena.config",
    },
    "arena.federation": {
        *("errors", "files", "lora", "manifest", "models", "wire", "arena.adapt", "arena.config"),
        *("arena.engines.protocol", "arena.federation_link", "arena.policies", "arena.society", "arena.trainer"),
    },
    "arena.sync_check": {
        *("arena.chat", "arena.engines.protocol", "arena.engines.verify", "arena.learner", "arena.task"),
    },
    "arena.run_engines": {"models", "arena.config", "arena.engines", "arena.engines.protocol"},
    "arena.run_options": {
        *("files", "models", "record", "arena.checkpoint", "arena.credit", "arena.engines.protocol"),
        *(
            "arena.federation",
            "arena.memory",
            "arena.metrics",
            "arena.modes",
            "arena.placement",
            "arena.records",
            "arena.rollout",
            "arena.task",
        ),
    },
    "arena.resuming": {"arena.checkpoint_parts", "arena.config", "arena.run_options"},
    "arena.run": {
        *("files", "lora", "machine", "models", "record", "arena.adapt", "arena.chat", "arena.checkpoint"),
        *("arena.config", "arena.control", "arena.engines.protocol", "arena.environment", "arena.episodes"),
        "arena.federation",
        *(
            "arena.interval",
            "arena.learner",
            "arena.loss",
            "arena.memory",
            "arena.modes",
            "arena.placement",
            "arena.policies",
            "arena.records",
            "arena.reporting",
        ),
        *(
            "arena.results",
            "arena.resuming",
            "arena.rollout",
            "arena.run_engines",
            "arena.run_logs",
            "arena.run_options",
            "arena.run_records",
        ),
        *("arena.sync_check", "arena.task", "arena.tasks", "arena.trainer"),
    },
    "arena": set(),
    # What is done with the result.
    "gateway": {
        "datasets",
        "files",
        "gateway.prompt_statistics",
        "gateway.rerank",
        "gateway.route",
        "lora",
        "manifest",
        "models",
        "qwen_finetune",
    },
    "gateway.serve": {
        *(
            "errors",
            "files",
            "gateway",
            "gateway.prompt_statistics",
            "gateway.rerank",
            "gateway.route",
            "lora",
            "manifest",
            "models",
            "server",
            "wire",
        ),
        *("arena.engines", "arena.engines.protocol", "arena.engines.verify"),
    },
    "worker.evaluator": {
        *("config", "datasets", "errors", "gateway", "lora", "models", "qwen_finetune", "wire"),
        *("worker.delivery", "worker.signals"),
    },
    "monitor": {"logs", "machine", "record"},
    "demo": {
        *("datasets", "files", "gateway", "lora", "models", "monitor", "record", "streams", "threads", "wire"),
    },
    # The composition root.
    "cli": {
        "allocator",
        "cache",
        *(
            "config",
            "datasets",
            "demo",
            "distributed_coordinator",
            "errors",
            "files",
            "gateway",
            "gateway.prompt_statistics",
            "gateway.route",
            "inert",
            "logs",
            "lora",
            "machine",
            "models",
            "streams",
            "threads",
        ),
        *(
            "gateway.serve",
            "manifest",
            "monitor",
            "server",
            "storage",
            "wire",
            "worker.evaluator",
            "worker.inference",
            "worker.setup",
            "worker.signals",
        ),
        *(
            "arena.chat",
            "arena.config",
            "arena.engines",
            "arena.engines.protocol",
            "arena.entrants",
            "arena.episodes",
            "arena.evaluate",
            "arena.interval",
            "arena.modes",
            "arena.records",
            "arena.results",
            "arena.rollout",
            "arena.run",
            "arena.run_options",
            "arena.task",
            "arena.tournament",
            "arena.trajectory",
        ),
        "arena.tasks",
    },
    "__main__": {"cli"},
}

#: Parts that decide and do nothing else: time, randomness and bytes come in as arguments.
PURE = (
    *("lora", "errors", "manifest", "events", "experts", "coordinator"),
    *("gateway.gate", "gateway.losses", "gateway.prompt_statistics", "gateway.rerank", "gateway.retained"),
    "gateway.route",
)
INPUT_AND_OUTPUT = {
    *("asyncio", "datetime", "fastapi", "http", "httpx2", "logging", "multiprocessing", "os", "pathlib", "random"),
    *("requests", "safetensors", "secrets", "shutil", "signal", "socket", "sqlalchemy", "sqlite3", "ssl", "starlette"),
    *("structlog", "subprocess", "tempfile", "time", "torch", "transformers", "urllib", "uvicorn"),
}

#: Heavy library -> the parts that may import it, at all.
HEAVY: dict[str, set[str]] = {
    "torch": {
        *("models", "qwen_finetune", "arena.areal", "arena.engines", "arena.environment", "arena.learner"),
        *("arena.loss", "arena.memory", "arena.placement", "arena.run_engines", "gateway.serve"),
    },
    "transformers": {"models", "qwen_finetune", "arena.areal", "arena.chat", "gateway.serve"},
    "huggingface_hub": {"models"},
    "tokenizers": {"models"},
    "pyarrow": {"datasets"},
    "datasets": {"datasets"},
    "matplotlib": {"monitor"},
    "fastapi": {"gateway.serve", "server"},
    "starlette": {"gateway.serve", "server"},
    "uvicorn": {"distributed_coordinator", "gateway.serve", "server"},
    "sqlalchemy": {"storage"},
}

#: What runs code that comes with data.
UNSAFE_MODULES = {"cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "pickle", "shelve"}
UNSAFE_CALLS = {("torch", "load"), ("torch", "save"), ("yaml", "load")}

SERVER_SIDE = ("lora", "manifest", "events", "experts", "coordinator", "storage", "wire", "server", "config")
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


def part_of(module: str) -> str:
    """The most exact row of the table that covers a module."""
    inner = module.removeprefix("fedmoe.")
    while inner not in LAYERS:
        assert inner, f"{module} stands in no row of LAYERS; add one"
        inner = inner.rpartition(".")[0]
    return inner


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


@pytest.mark.parametrize("name", OURS)
def test_a_module_imports_what_its_row_allows(name: str) -> None:
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
    assert not reachable(worker) & {*server, *modules_of("storage")}


def test_only_the_command_line_and_the_demonstration_show() -> None:
    importers = {part_of(name) for name in OURS if any(part_of(target) == "monitor" for target in imports_of(name))}
    assert importers - {"monitor"} <= {"cli", "demo"}


def test_only_the_entry_points_import_the_command_line() -> None:
    importers = {part_of(name) for name in OURS if any(part_of(target) == "cli" for target in imports_of(name))}
    assert importers == {"cli", "__main__"}


@pytest.mark.parametrize("name", modules_of(*PURE))
def test_a_deciding_module_has_no_input_and_output(name: str) -> None:
    roots = {imported.split(".")[0] for imported in imported_names(tree_of(MODULES[name]))}
    assert not roots & INPUT_AND_OUTPUT


@pytest.mark.parametrize("name", OURS)
def test_a_heavy_library_stays_in_its_place(name: str) -> None:
    roots = {imported.split(".")[0] for imported in imported_names(tree_of(MODULES[name]))}
    for library in roots & HEAVY.keys():
        assert part_of(name) in HEAVY[library], f"{name} may not import {library}"


def test_only_models_load_a_base_model() -> None:
    for name in OURS:
        attributes = {node.attr for node in ast.walk(tree_of(MODULES[name])) if isinstance(node, ast.Attribute)}
        assert "from_pretrained" not in attributes or part_of(name) == "models"


def test_the_server_side_loads_no_torch() -> None:
    names = [*modules_of(*SERVER_SIDE), "fedmoe.distributed_coordinator", "fedmoe.cli.commands"]
    heavy = ["torch", "transformers", "tokenizers", "huggingface_hub", "peft", "pyarrow", "matplotlib"]
    code = "\n".join(f"import {name}" for name in names)
    code += f"\nimport sys; print(sorted(sys.modules.keys() & {set(heavy)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def sources() -> Mapping[str, Path]:
    """Every Python file of the repository but the tests."""
    others = [*ROOT.glob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "demo").rglob("*.py")]
    return MODULES | {module_name(path): path for path in others}


@pytest.mark.parametrize("name", sources())
def test_nothing_runs_code_that_comes_with_data(name: str) -> None:
    tree = tree_of(sources()[name])
    assert not {imported.split(".")[0] for imported in imported_names(tree)} & UNSAFE_MODULES
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in UNSAFE_CALLS
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
            target = node.func.value
            if isinstance(target, ast.Name) and target.id in ("np", "numpy"):
                assert any(keyword.arg == "allow_pickle" for keyword in node.keywords)
