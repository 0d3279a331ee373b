"""A home that cannot be written costs a cache and one warning, not the run."""

from __future__ import annotations

import os
from pathlib import Path

import forks
import pytest
from structlog.testing import capture_logs

from fedmoe.runtime.cache import cache_folder, cache_or_temporary_root, cache_root, keep_file, kept_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home below a file, where nobody, not even root, can make a folder."""
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("FEDMOE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    return tmp_path


def test_a_folder_of_the_cache_is_made_and_keeps_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMOE_CACHE", str(tmp_path / "cache"))
    assert cache_folder("tokens") == tmp_path / "cache" / "tokens"
    assert kept_file("tokens", "a") is None
    keep_file("tokens", "a", b"1")
    found = kept_file("tokens", "a")
    assert found is not None
    assert found.read_bytes() == b"1"


def test_a_cache_that_cannot_be_written_is_said_once_with_what_to_do(closed: Path) -> None:
    with capture_logs() as logs:
        assert cache_folder("tokens") is None
        assert cache_folder("hashes") is None
        keep_file("hashes", "a", b"1")
        assert kept_file("hashes", "a") is None
        assert cache_or_temporary_root().is_dir()
    assert [line["event"] for line in logs] == ["cache_not_writable"]
    assert logs[0]["folder"] == str(closed / "file/home/.cache/fedmoe")
    assert "set FEDMOE_CACHE to a folder" in logs[0]["fix"]


def test_the_advice_works(closed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder("tokens") is None
    monkeypatch.setenv("FEDMOE_CACHE", str(closed / "elsewhere"))
    assert cache_folder("tokens") == closed / "elsewhere" / "tokens"


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FEDMOE_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert cache_root() is None
    assert cache_folder("tokens") is None
    assert kept_file("tokens", "a") is None
    assert cache_or_temporary_root().is_dir()


def test_a_full_disk_costs_a_cache_and_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("FEDMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fedmoe.runtime.cache.write_atomic", full)
    with capture_logs() as logs:
        keep_file("hashes", "a", b"1")
    assert [(line["event"], line["file"]) for line in logs] == [("not_cached", str(tmp_path / "cache/hashes/a"))]


def test_a_base_model_is_made_where_there_is_no_cache_and_leaves_nothing(closed: Path) -> None:
    code = (
        "from fedmoe.models.base import prepare_base\nfrom fedmoe.models.identity import weights_hash\n"
        "folder = prepare_base('tiny')\nassert prepare_base('tiny') == folder\n"
        "print(weights_hash(folder)); print(folder)"
    )
    temporary = closed / "temporary"
    temporary.mkdir()
    environment = os.environ | {"TMPDIR": str(temporary)}
    done = forks.run("-c", code, environment=environment, folder=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cache_not_writable") == 1
    folder = Path(done.stdout.splitlines()[-1])
    assert folder.is_relative_to(temporary)
    assert not folder.exists()


def test_a_cache_that_can_only_be_read_is_read(closed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedmoe.runtime.cache import build_once

    (closed / "cache" / "base").mkdir(parents=True)
    monkeypatch.setenv("FEDMOE_CACHE", str(closed / "cache"))
    monkeypatch.setattr("fedmoe.runtime.cache.can_be_written", lambda folder, variable="": False)
    assert build_once("base", lambda folder: pytest.fail("it was there")) == closed / "cache" / "base"
    assert build_once("other", lambda folder: None).is_dir()
    assert not (closed / "cache" / "other").exists()


def test_a_hub_model_is_loaded_into_a_folder_of_this_run(closed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    from fedmoe.models import base

    asked: list[tuple[Path, bool]] = []

    def download(repository: str, *, cache_dir: Path, local_files_only: bool, **_: object) -> str:
        asked.append((cache_dir, local_files_only))
        if local_files_only:
            raise LocalEntryNotFoundError("not there")
        return str(cache_dir / repository)

    monkeypatch.setattr(base, "snapshot_download", download)
    monkeypatch.setattr(base, "HF_HUB_CACHE", str(closed / "file" / "hub"))
    with capture_logs() as logs:
        found = base._download("owner/model", None, offline=False, weights=True)
    assert found == str(asked[1][0] / "owner/model")
    assert asked[0] == (closed / "file" / "hub", True)
    assert asked[1][0].parent.is_dir()
    assert "set HF_HOME to a folder" in logs[0]["fix"]
