"""The list of files in ARCHITECTURE.md: one line a file, from the first line of its docstring.

python scripts/file_index.py          write it anew
python scripts/file_index.py --check  exit with 1 if it is not as the docstrings say
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "ARCHITECTURE.md"
BEGIN, END = "<!-- files: begin -->\n", "<!-- files: end -->\n"


def summary(path: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n")[0]


def folders(package: Path) -> Iterator[Path]:
    """The package's folders with Python files, every folder before what lies in it."""
    yield package
    for folder in sorted(path.parent for path in package.glob("*/__init__.py")):
        yield from folders(folder)


def file_index(root: Path = ROOT) -> str:
    """The list as Markdown."""
    lines = []
    for folder in folders(root / "fedmoe"):
        lines += [f"### {folder.relative_to(root).as_posix()}/", "", summary(folder / "__init__.py"), ""]
        files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
        lines += [f"- `{path.name}`: {summary(path)}" for path in files]
        lines += [""] if files else []
    return "\n".join(lines)


def main() -> int:
    text = DOCUMENT.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    written = f"{before}{BEGIN}\n{file_index()}\n{END}{after}"
    if "--check" in sys.argv[1:]:
        return int(written != text)
    DOCUMENT.write_text(written, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
