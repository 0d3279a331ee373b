"""The ground floor stands alone: numpy and nothing of ours above it."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import fedmoe.lora

MODULES = sorted(found.name for found in pkgutil.iter_modules(fedmoe.lora.__path__))
ALLOWED = {"ml_dtypes", "numpy"}
FORBIDDEN_STANDARD = {"asyncio", "http", "os", "pathlib", "pickle", "random", "socket", "tempfile", "time", "urllib"}


def test_importing_the_ground_floor_loads_no_torch_and_no_network() -> None:
    lines = [f"import fedmoe.lora.{name}" for name in MODULES]
    lines.append("import sys; print(sorted(sys.modules.keys() & {'torch', 'transformers', 'safetensors', 'httpx2'}))")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "safetensors_bytes" in MODULES


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_numbers_and_its_own_floor_only(name: str) -> None:
    tree = ast.parse((Path(fedmoe.lora.__path__[0]) / f"{name}.py").read_text())
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for found in imported:
        root = found.split(".")[0]
        if root == "fedmoe":
            assert found.startswith("fedmoe.lora")
        else:
            assert root in ALLOWED | sys.stdlib_module_names - FORBIDDEN_STANDARD


@pytest.mark.parametrize("name", MODULES)
def test_a_module_opens_nothing(name: str) -> None:
    tree = ast.parse((Path(fedmoe.lora.__path__[0]) / f"{name}.py").read_text())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"open", "eval", "exec", "__import__", "print", "input"}
