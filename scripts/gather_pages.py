"""Gathers the documents of the repository into dist/pages, with the reference, for `make docs` to build a site of."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import reference

ROOT = Path(__file__).resolve().parent.parent
#: At the same places as in the repository, so that links between pages stay as they are.
PARTS = (
    "*.md",
    "docs/**/*.md",
    "docs/images/*.png",
    "benchmarks/README.md",
    "benchmarks/results/*.png",
    "examples/README.md",
)
LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(([^)\s]+)\)")


def gather(target: Path) -> list[str]:
    """Write all pages into an emptied folder; returns their places in it."""
    shutil.rmtree(target, ignore_errors=True)
    sources = {path for part in PARTS for path in ROOT.glob(part)}
    for source in sources:
        place = target / source.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)
    reference.write(target / "docs" / "reference")
    pages = sorted(target.rglob("*.md"))
    for page in pages:
        page.write_text(LINK.sub(lambda found, page=page: _link(found, page), page.read_text()))
    names = [str(page.relative_to(target)) for page in pages]
    (target / "llms.txt").write_text(index(target, names))
    return names


def index(target: Path, names: list[str]) -> str:
    """The pages by title and address, in the form that programs look for as llms.txt."""
    lines = [f"- [{_title(target / name)}]({name.removesuffix('.md')}.html)" for name in names]
    lines[names.index("README.md")] = "- [FedMoE](index.html)"
    return (
        "# FedMoE\n\n> LoRA experts trained where the data lives, and one gateway model made of all of them.\n\n"
        + "\n".join(
            [
                "Every command that ends takes `--json`; `fedmoe config schema` prints the schema of `fedmoe.toml`.",
                "",
                "## Pages",
                "",
                *lines,
                "",
            ]
        )
    )


def _title(page: Path) -> str:
    return page.read_text().partition("\n")[0].removeprefix("# ")


def _link(found: re.Match[str], page: Path) -> str:
    """A link as it stands if it leads to a page or out of the repository; else its text: code is no page."""
    path = found[2].partition("#")[0]
    outside = path.startswith(("http://", "https://", "mailto:"))
    return found[0] if outside or not path or (page.parent / path).is_file() else found[1]


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist" / "pages"
    print(f"{len(gather(folder))} pages in {folder}")
