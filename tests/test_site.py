"""The site of the documents: all pages are in its navigation, links lead to pages, the reference is complete."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedmoe.cli.config import file_schema

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages that `make docs` builds the site of."""
    folder = tmp_path_factory.mktemp("pages")
    subprocess.run([sys.executable, "scripts/gather_pages.py", str(folder)], cwd=ROOT, check=True, timeout=120)
    return folder


def test_every_page_of_the_navigation_is_there(pages: Path) -> None:
    """That every document is in it, tests/test_docs.py says."""
    named = re.findall(r"[\w./-]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(named) == sorted(str(page.relative_to(pages)) for page in pages.rglob("*.md"))


def test_every_link_of_the_site_leads_to_a_page_of_it(pages: Path) -> None:
    followed = 0
    for page in pages.rglob("*.md"):
        for target in LINK.findall(page.read_text()):
            if not target.startswith(("http://", "https://", "mailto:")):
                assert (page.parent / target).is_file(), f"{page.relative_to(pages)}: {target}"
                followed += 1
    assert followed > 50


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_link_to_a_part_of_a_page_leads_to_a_heading(pages: Path) -> None:
    followed = 0
    for page in pages.rglob("*.md"):
        for target, anchor in re.findall(r"\]\(([^)\s#:]*)#([^)\s]+)\)", page.read_text()):
            assert anchor in anchors_of(page.parent / target if target else page), f"{page.name}: {target}#{anchor}"
            followed += 1
    assert followed > 20


def test_the_reference_has_every_command_and_option(pages: Path) -> None:
    text = (pages / "docs" / "reference" / "cli.md").read_text()
    sections = dict(re.findall(r"^## (fedmoe[^\n]*)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    lines = [line.split(": ") for line in (ROOT / "tests" / "cli" / "options.txt").read_text().splitlines()]
    for command, options in lines:
        if command.startswith("fedmoe"):
            assert all(re.search(rf"(?<![\w-]){option}(?![\w-])", sections[command]) for option in options.split()), (
                command
            )


def test_the_reference_has_every_key_of_the_configuration(pages: Path) -> None:
    text = (pages / "docs" / "reference" / "configuration.md").read_text()
    sections = file_schema()["properties"]
    assert isinstance(sections, dict)
    for name, section in sections.items():
        part = text.partition(f"## [{name}]")[2].partition("\n## ")[0]
        assert re.findall(r"^\| `(\w+)`", part, re.MULTILINE) == list(section["properties"])


def test_the_reference_has_every_route(pages: Path) -> None:
    described = re.findall(r"^\| `((?:GET|POST) /\S+)` \|", (ROOT / "docs" / "http-api.md").read_text(), re.MULTILINE)
    text = (pages / "docs" / "reference" / "http.md").read_text()
    assert set(re.findall(r"^## (.+)$", text, re.MULTILINE)) == set(described) - {"GET /openapi.json"} | {"Schemas"}
    assert "`unknown_expert`" in text


def test_programs_find_the_pages_by_llms_txt(pages: Path) -> None:
    named = re.findall(r"\]\((\S+)\.html\)", (pages / "llms.txt").read_text())
    there = {str(page.relative_to(pages).with_suffix("")) for page in pages.rglob("*.md")} - {"README"} | {"index"}
    assert sorted(named) == sorted(there)
