"""`fedmoe.Client` and `fedmoe.AsyncClient` against a real coordinator, as scripts and notebooks use them."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from live import ADMIN, JOIN, House, LiveServer, listening, open_house
from pydantic import ValidationError
from structlog.testing import capture_logs
from support import LAYOUT, CoordinatorProcess, make_body, make_flat, make_push

import fedmoe
from fedmoe.lora.codec import encode
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.messages import UpdateHeader
from fedmoe.wire.contract.status import Heartbeat


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A coordinator with tokens and three updates of `python`, of w1, w2 and w1."""
    with capture_logs(), open_house(tmp_path, tokens=True) as opened:
        opened.register("python", "sql")
        for sequence, worker in enumerate(["w1", "w2", "w1"]):
            asyncio.run(opened.service.intake.push(*make_push(make_body(sequence), sequence, sequence, worker)))
        yield opened


@pytest.fixture
def server(house: House) -> Iterator[LiveServer]:
    with listening(house.app) as running:
        yield running


@pytest.fixture
def admin(server: LiveServer) -> Iterator[fedmoe.Client]:
    with fedmoe.Client(server.url, ADMIN) as client:
        yield client


def test_importing_the_package_loads_no_client() -> None:
    """Only the name that is asked for brings what it needs."""
    code = """
import sys, fedmoe
assert "Client" in dir(fedmoe)
print(sorted(sys.modules.keys() & {"httpx2", "numpy", "pydantic", "fedmoe.wire.python_client"}))
fedmoe.Client
print(sorted(sys.modules.keys() & {"torch", "fastapi", "sqlalchemy", "fedmoe.wire.python_client"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == ["[]", "['fedmoe.wire.python_client']"]
    with pytest.raises(AttributeError, match="no attribute 'Nobody'"):
        fedmoe.Nobody  # type: ignore[attr-defined]  # noqa: B018


def test_what_there_is_is_read(admin: fedmoe.Client, house: House) -> None:
    status = admin.status()
    assert [(expert.name, expert.version) for expert in status.experts] == [("python", 3), ("sql", 0)]
    experts = admin.experts()
    assert [(info.worker, info.updates) for info in experts[0].workers] == [("w1", 2), ("w2", 1)]
    pulled = admin.expert_weights("python")
    expert = house.service.coordinator.expert("python")
    assert (pulled.version, pulled.digest) == (3, expert.digest)
    np.testing.assert_array_equal(pulled.adapter.flat, expert.adapter.flat)
    gateway = admin.gateway()
    assert gateway.sources == {"python": 3}
    assert admin.gateway_weights().digest == gateway.digest
    manifest = admin.federation().manifest
    assert manifest is not None
    assert manifest.base.name == "tiny/base"
    assert (admin.replicas().owners, admin.quarantine()) == ([], [])
    with pytest.raises(fedmoe.RefusedError) as refused:
        admin.verdicts()
    assert refused.value.code == "gate_disabled"


def test_events_are_followed_from_the_last_one(admin: fedmoe.Client) -> None:
    events = admin.events()
    assert [event.kind for event in events].count("landed") == 3
    assert [event.id for event in events] == sorted(event.id for event in events)
    assert admin.events(events[-1].id) == []
    admin.roll_back("python", 1, "a test")
    (newer,) = admin.events(events[-1].id)
    assert (newer.kind, newer.expert) == ("expert rolled back", "python")
    for version in (2, 1) * 50:
        admin.roll_back("python", version, "another test")
    assert len(admin.events()) == 100
    assert admin.events()[0].id > newer.id


def test_experts_are_made_renamed_retired_and_undone(admin: fedmoe.Client) -> None:
    digests = {info.name: info.digest for info in admin.experts()}
    assert admin.create_expert("docs").version == 0
    assert admin.rename_expert("docs", "texts").formerly == ["docs"]
    assert admin.retire_expert("texts", "a test").retired
    assert [info.name for info in admin.experts()] == ["python", "sql"]
    assert [info.name for info in admin.experts(retired=True)] == ["python", "sql", "texts"]
    assert not admin.unretire_expert("texts").retired
    assert admin.retract("python", "w2").removed == 1
    assert admin.roll_back("python", 3).digest == digests["python"]
    with pytest.raises(fedmoe.RefusedError) as refused:
        admin.roll_back("python", 77)
    assert refused.value.code == "unknown_version"


def test_held_updates_are_released_and_rejected(server: LiveServer, admin: fedmoe.Client) -> None:
    with CoordinatorClient(server.url, JOIN) as worker:
        for number in range(20, 27):
            body = encode(LAYOUT, np.float32(1.0 if number < 25 else 1e6) * make_flat(number))
            worker.push(UpdateHeader(expert="python", worker="w3", epoch="e1", sequence=number, base_version=3), body)
    first, second = admin.quarantine()
    assert admin.release(first.number).status == "landed"
    admin.reject(second.number, "too large")
    assert admin.quarantine() == []


def test_a_workers_log_is_read_on(server: LiveServer, admin: fedmoe.Client) -> None:
    with CoordinatorClient(server.url, JOIN) as worker:
        worker.heartbeat(Heartbeat(expert="python", worker="w1", state="training", interval=10, lines=["one", "two"]))
    log = admin.worker_log("w1")
    assert (log.lines, log.state) == (["one", "two"], "training")
    assert admin.worker_log("w1", "python", log.next).lines == []


def test_tokens_are_issued_and_revoked_and_a_join_line_is_made(server: LiveServer, admin: fedmoe.Client) -> None:
    made = admin.issue_token(worker="w7", experts=["python"], label="site A")
    with fedmoe.Client(server.url, made.token) as narrow:
        assert [info.name for info in narrow.experts()] == ["python"]
        with pytest.raises(fedmoe.RefusedError) as refused:
            narrow.tokens()
        assert refused.value.code == "forbidden"
        admin.revoke_token(made.hash[:10])
        with pytest.raises(fedmoe.RefusedError) as refused:
            narrow.experts()
        assert refused.value.code == "unauthorised"
    (info,) = [info for info in admin.tokens() if info.label == "site A"]
    assert info.revoked
    token, _, address = admin.join_line("w8", label="site B").partition("@")
    assert token.startswith("fmj_")
    assert address == server.url
    with pytest.raises(fedmoe.RefusedError) as refused:
        admin.revoke_token("")
    assert refused.value.code == "unknown_token"
    with pytest.raises(ValidationError, match="role"):
        admin.issue_token("emperor")


def test_url_and_token_come_from_the_environment(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMOE_COORDINATOR_URL", server.url)
    monkeypatch.delenv("FEDMOE_TOKEN", raising=False)
    with fedmoe.Client() as nobody, pytest.raises(fedmoe.RefusedError) as refused:
        nobody.status()
    assert refused.value.code == "unauthorised"
    monkeypatch.setenv("FEDMOE_TOKEN", ADMIN)
    with fedmoe.Client() as client:
        assert (client.url, client.status().role) == (server.url, "admin")


def test_errors_of_addresses_are_typed() -> None:
    with pytest.raises(fedmoe.ConnectionSettingError, match="is not a usable URL"):
        fedmoe.Client("nonsense")
    with fedmoe.Client("http://127.0.0.1:9", attempts=1) as client, pytest.raises(fedmoe.CoordinatorUnavailableError):
        client.status()


def test_every_method_has_an_awaited_twin(server: LiveServer) -> None:
    names = {name for name, _ in inspect.getmembers(fedmoe.Client, inspect.isfunction) if not name.startswith("_")}
    for name in names - {"close"}:
        twin = getattr(fedmoe.AsyncClient, name)
        assert inspect.iscoroutinefunction(twin)
        assert twin.__doc__ == getattr(fedmoe.Client, name).__doc__

    async def ask() -> tuple[list[str], int, int, str]:
        async with fedmoe.AsyncClient(server.url, ADMIN) as client:
            # More at once than there are threads.
            answers = await asyncio.gather(*(client.experts() for _ in range(20)))
            pulled, changed = await client.expert_weights("python"), await client.roll_back("python", 1)
            try:
                await client.roll_back("nobody", to_version=1)
            except fedmoe.RefusedError as error:
                return [info.name for info in answers[-1]], pulled.version, changed.version, error.code
        raise AssertionError("an expert that is not there was rolled back")

    assert asyncio.run(ask()) == (["python", "sql"], 3, 4, "unknown_expert")


def test_a_pinned_key_is_the_only_one_that_is_asked(
    coordinator_process: Callable[..., CoordinatorProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real process with --tls auto: the join line has its fingerprint, another fingerprint is refused."""
    monkeypatch.setenv("FEDMOE_ADMIN_TOKEN", ADMIN)
    running = coordinator_process(["--tls", "auto"])
    running.start()
    fingerprint = running.log.read_text().partition(f"{running.url}#")[2][:64]
    with fedmoe.Client(f"{running.url}#{fingerprint}", ADMIN) as client:
        assert client.status().experts == []
        assert client.join_line().endswith(f"@127.0.0.1:{running.port}#{fingerprint}")
        with pytest.raises(fedmoe.RefusedError, match="no experts yet"):
            client.create_expert("python")
    with (
        fedmoe.Client(f"{running.url}#{'0' * 64}", ADMIN, attempts=1) as other,
        pytest.raises(fedmoe.CoordinatorUnavailableError, match="another one than the pinned"),
    ):
        other.status()
