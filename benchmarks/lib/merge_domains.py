"""The domains that `bench_merge_quality.py` trains experts on, each as `<folder>/<name>/{train,test}.jsonl`.

`DEMO` are the demonstration's three, with which the merge was developed. `FURTHER` are cut from packages that are
installed for the tests; with `DEMO` they make ten. `UNSEEN`, from three more packages of the index, are for the report
only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fedmoe.datasets.demo.chunks import prose_chunks
from fedmoe.datasets.demo.domains import DOMAINS, TEST, TRAIN, Recipe, build_domains, split_chunks
from fedmoe.datasets.demo.sources import Package
from fedmoe.runtime.files import write_atomic
from lib.prompt_domains import INSTALLED, installed_documents

DEMO = DOMAINS
FURTHER = ("cpp", "stubs", "readmes", "cython", "tests", "cmake", "cuda")


def _files(package: Package) -> Recipe:
    return Recipe(package, prose_chunks)


_UNSEEN = {
    "playbooks": _files(
        Package(
            name="ansible-core",
            version="2.19.14",
            archive="ansible_core-2.19.14.tar.gz",
            sha256="1e7612788eaa6b3c87a3670ce86c64b830eba0ae2b3fcb25a772f276704163b4",
            licence="GPL-3.0-or-later",
            accepts=lambda path: path.suffix == ".yml",
        )
    ),
    "typescript": _files(
        Package(
            name="bokeh",
            version="2.4.3",
            archive="bokeh-2.4.3.tar.gz",
            sha256="ef33801161af379665ab7a34684f2209861e3aefd5c803a21fbbb99d94874b03",
            licence="BSD-3-Clause",
            accepts=lambda path: path.suffix == ".ts",
        )
    ),
    "protos": _files(
        Package(
            name="googleapis-common-protos",
            version="1.76.0",
            archive="googleapis_common_protos-1.76.0.tar.gz",
            sha256="71db0e44a1d4c2dd024ebad44ca67129cc1e2892e4861df466764749d5ef8642",
            licence="Apache-2.0",
            accepts=lambda path: path.suffix == ".proto",
        )
    ),
}
UNSEEN = tuple(_UNSEEN)


def build(folder: Path, names: Sequence[str]) -> None:
    """Write whichever of these domains are not there yet."""
    demo = [name for name in names if name in DEMO]
    unseen = [name for name in names if name in UNSEEN]
    if demo:
        build_domains(folder, demo, progress=_say)
    if unseen:
        build_domains(folder, unseen, progress=_say, recipes=_UNSEEN)
    for name in names:
        if name in INSTALLED and not (folder / name / TEST).exists():
            _build_installed(folder / name)


def _build_installed(folder: Path) -> None:
    train, test, _ = split_chunks(installed_documents(folder.name), prose_chunks)
    folder.mkdir(parents=True, exist_ok=True)
    for name, chunks in ((TRAIN, train), (TEST, test)):
        lines = "".join(json.dumps(asdict(chunk), ensure_ascii=False) + "\n" for chunk in chunks)
        write_atomic(folder / name, lines.encode(), 0o644)
    _say(f"{folder.name}: {len(train):,} train and {len(test):,} test rows")


def _say(line: str) -> None:
    print(line, flush=True)
