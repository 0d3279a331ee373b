"""A whole state folder copied back by hand: what is noticed of the future that is lost, and what is not.

Journal, count file and blobs fit each other, so the start goes on, in the same incarnation. `state restore` begins
another one.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from live import push_headers, push_parameters
from starlette.testclient import TestClient
from support import MANIFEST, make_body

from fedmoe.config import CoordinatorConfig
from fedmoe.distributed_coordinator import DistributedCoordinator
from fedmoe.server.history.verification import verify_state
from fedmoe.server.storage.backup import make_backup
from fedmoe.server.storage.restore import restore
from fedmoe.wire.contract.messages import ManifestMessage, RegisterRequest


@contextmanager
def started(folder: Path) -> Iterator[TestClient]:
    running = DistributedCoordinator(CoordinatorConfig(state_dir=str(folder)))
    running.service.start()
    request = RegisterRequest(expert="python", worker="w1", manifest=ManifestMessage.of(MANIFEST))
    asyncio.run(running.service.register(request))
    try:
        yield TestClient(running.app, base_url="http://127.0.0.1", raise_server_exceptions=False)
    finally:
        running.close()


def push(client: TestClient, seed: int, base: int, **told: str) -> httpx2.Response:
    body = make_body(seed)
    parameters = push_parameters(seed, base, **told)
    return client.post("/push_expert_update", params=parameters, content=body, headers=push_headers(body))


@dataclass(frozen=True)
class Lost:
    """The folder after a copy of its version 2 was put back, and what a worker knows of versions 2 and 4."""

    folder: Path
    incarnation: str
    digests: dict[int, str]

    def told(self, version: int) -> dict[str, str]:
        """What a worker tells with an update made from a version."""
        return {"incarnation": self.incarnation, "base_digest": self.digests[version]}


def newest(client: TestClient) -> tuple[int, str, str]:
    (expert,) = client.get("/list_experts").json()["experts"]
    return expert["version"], expert["digest"], client.get("/federation").json()["incarnation"]


@pytest.fixture
def lost(tmp_path: Path) -> Lost:
    folder, digests = tmp_path / "state", {}
    for seeds, copy in (((1, 2), True), ((3, 4), False)):
        with started(folder) as client:
            for seed in seeds:
                assert push(client, seed, seed - 1).status_code == 200
            version, digest, incarnation = newest(client)
            digests[version] = digest
        if copy:
            make_backup(folder, tmp_path / "backup", 0.0)
            shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "copy", folder)
    return Lost(folder, incarnation, digests)


def test_the_start_goes_on_in_the_same_incarnation_and_nothing_is_found(lost: Lost) -> None:
    assert verify_state(lost.folder).findings == []
    with started(lost.folder) as client:
        assert newest(client) == (2, lost.digests[2], lost.incarnation)


def test_an_update_made_from_a_version_that_is_not_there_any_more_is_refused(lost: Lost) -> None:
    with started(lost.folder) as client:
        refused = push(client, 9, 4, **lost.told(4))
        assert (refused.status_code, refused.json()["code"]) == (409, "unknown_version")
        assert newest(client)[0] == 2


def test_an_update_made_from_a_version_that_is_another_one_by_now_is_refused_by_its_digest(lost: Lost) -> None:
    with started(lost.folder) as client:
        for seed in (13, 14):
            assert push(client, seed, 2).status_code == 200
        before = newest(client)
        assert before[0] == 4
        refused = push(client, 9, 4, **lost.told(4))
        assert (refused.status_code, refused.json()["code"]) == (409, "other_history")
        assert newest(client) == before
        assert push(client, 10, 2, **lost.told(2)).status_code == 200  # what there was in both is known


def test_one_that_tells_no_digest_is_not_noticed_where_the_folder_was_copied_and_is_after_a_restore(
    lost: Lost, tmp_path: Path
) -> None:
    """What `docs/operations.md` says: the incarnation alone does not tell a copy from what it is a copy of."""
    only_name = {"incarnation": lost.incarnation}
    with started(lost.folder) as client:
        for seed in (13, 14):
            push(client, seed, 2)
        assert push(client, 9, 4, **only_name).status_code == 200
    restore(tmp_path / "backup", tmp_path / "again")
    with started(tmp_path / "again") as client:
        for seed in (13, 14):
            push(client, seed, 2)
        assert push(client, 9, 4, **only_name).json()["code"] == "other_history"


def test_an_update_that_was_acknowledged_and_is_lost_lands_once_more_if_it_is_sent_again(lost: Lost) -> None:
    with started(lost.folder) as client:
        again = push(client, 3, 2, **lost.told(2))
        assert (again.status_code, again.json()["version"], again.json()["duplicate"]) == (200, 3, False)


@pytest.mark.parametrize("kept", ["acknowledged", "journal.sqlite"])
def test_a_part_of_the_folder_alone_is_noticed(lost: Lost, tmp_path: Path, kept: str) -> None:
    """Only the journal, or all but the count file, was put back; the other is of the future."""
    with started(lost.folder) as client:
        push(client, 13, 2)
    shutil.copy(lost.folder / kept, tmp_path / "newer")
    shutil.rmtree(lost.folder)
    shutil.copytree(tmp_path / "copy", lost.folder)
    shutil.copy(tmp_path / "newer", lost.folder / kept)
    found = verify_state(lost.folder).findings
    expected = "not the newest" if kept == "acknowledged" else "cannot be rebuilt"
    assert any(expected in finding for finding in found), found
