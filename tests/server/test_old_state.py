"""A state directory made by commit b5c47da opens with the weights it had, and goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from state_fixture import EXPECTED, unpacked
from support import make_body, make_push

from fedmoe.config import CoordinatorConfig
from fedmoe.distributed_coordinator import DistributedCoordinator


def opened(state_dir: Path, name: str) -> DistributedCoordinator:
    options = EXPECTED[name]["options"]
    pairs = dict(zip(options[::2], options[1::2], strict=True))
    given = {option.removeprefix("--").replace("-", "_"): value for option, value in pairs.items()}
    return DistributedCoordinator(CoordinatorConfig(state_dir=str(state_dir), **given))


def described(running: DistributedCoordinator) -> dict[str, object]:
    coordinator = running.service.coordinator
    experts = {name: [expert.version, expert.digest] for name, expert in coordinator.experts.items()}
    gateway = coordinator.gateway()
    return {"experts": experts, "gateway": gateway.digest, "gateway_version": gateway.version}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_state_directory_of_schema_1_opens_with_the_same_weights_71(tmp_path: Path, name: str) -> None:
    state_dir = unpacked(tmp_path, name)
    wanted = {key: value for key, value in EXPECTED[name].items() if key != "options"}
    for _ in range(2):
        running = opened(state_dir, name)
        found = described(running)
        running.close()
        assert found == wanted


def test_what_lands_on_an_old_state_directory_is_there_after_a_restart(tmp_path: Path) -> None:
    state_dir = unpacked(tmp_path, "initial")
    running = opened(state_dir, "initial")
    running.service.start()
    base = running.service.coordinator.expert("python").version
    result = asyncio.run(running.service.intake.push(*make_push(make_body(1000), base, 1000)))
    digest = running.service.coordinator.expert("python").digest
    assert running.service.journal.version_digest("python", result.version) == digest
    assert running.service.journal.version_digest("python", base) is None
    running.close()
    again = opened(state_dir, "initial")
    assert again.service.coordinator.expert("python").digest == digest
    again.close()
