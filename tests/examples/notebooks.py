"""Runs the code cells of a notebook without Jupyter: `python tests/examples/notebooks.py FILE` writes their outputs."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

Output = dict[str, Any]


def read(file: Path) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return notebook


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: dict[str, Any]) -> list[list[Output]]:
    """The outputs of every code cell, in one namespace and in order: what was printed, and the last expression."""
    names: dict[str, object] = {"__name__": "__main__"}
    return [_outputs("".join(cell["source"]), names, number) for number, cell in enumerate(code_cells(notebook), 1)]


def _outputs(source: str, names: dict[str, object], number: int) -> list[Output]:
    tree, value, printed = ast.parse(source), None, io.StringIO()
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {number}", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
    outputs: list[Output] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())})
    if value is not None:
        data = {"text/plain": _lines(repr(value))}
        outputs.append({"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data})
    return outputs


def text_of(outputs: list[Output]) -> str:
    """All text of a cell's outputs."""
    return "\n".join("".join(output.get("text") or output["data"]["text/plain"]) for output in outputs)


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    content = read(place)
    sys.path.insert(0, str(place.parent))
    for index, (written, made) in enumerate(zip(code_cells(content), run(content), strict=True), 1):
        written |= {"outputs": made, "execution_count": index}
    place.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
