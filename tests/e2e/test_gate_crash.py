"""A coordinator with an evaluation gate is killed around publishing: the old gateway or the new one, never a mix."""

from __future__ import annotations

import contextlib
import hashlib
import time
import urllib.request
from collections.abc import Callable

import pytest
from support import MANIFEST, CoordinatorProcess, make_body

from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError
from fedmoe.wire.contract.experts import CandidateSetInfo, CandidatesRequest, GatewayScores
from fedmoe.wire.contract.messages import SAFETENSORS, UpdateHeader

Make = Callable[..., CoordinatorProcess]
EXPERTS = ("python", "sql")


def served(url: str) -> bytes:
    request = urllib.request.Request(f"{url}/get_gateway_weights", headers={"Accept": SAFETENSORS})
    with urllib.request.urlopen(request, timeout=10) as response:
        return bytes(response.read())


def train(client: CoordinatorClient, sequence: int) -> None:
    for place, expert in enumerate(EXPERTS):
        client.register(expert, f"w-{expert}", MANIFEST)
        header = UpdateHeader(expert=expert, worker=f"w-{expert}", epoch="e1", sequence=sequence, base_version=sequence)
        client.push(header, make_body(2 * sequence + place))


def offered(client: CoordinatorClient, expert: str) -> CandidateSetInfo:
    deadline = time.monotonic() + 20
    while True:
        found = client.gateway_candidates(CandidatesRequest(evaluator=f"e-{expert}", expert=expert)).open
        if found is not None:
            return found
        assert time.monotonic() < deadline, "no set of candidates came"
        time.sleep(0.02)


def score(client: CoordinatorClient, best: str, kept: float) -> None:
    """Both evaluators send scores in which `best` keeps this share of the gain, the others and the old one 0.2."""
    for expert in EXPERTS:
        client.gateway_candidates(CandidatesRequest(evaluator=f"e-{expert}", expert=expert))
    for expert in EXPERTS:
        offer = offered(client, expert)
        losses = {one.name: 3.0 - (kept if one.name == best else 0.2) for one in offer.candidates}
        client.push_gateway_scores(
            GatewayScores(
                set=offer.id,
                evaluator=f"e-{expert}",
                expert=expert,
                tokens=10,
                base=3.0,
                own=2.0,
                published=2.8 if offer.published else None,
                candidates=losses,
            )
        )


def published(client: CoordinatorClient, count: int) -> bytes:
    deadline = time.monotonic() + 20
    while len(client.gateway_verdicts()) < count:
        assert time.monotonic() < deadline, f"there are fewer than {count} verdicts"
        time.sleep(0.02)
    return served(client.url)


def test_what_was_published_is_served_bit_for_bit_after_a_kill(coordinator_process: Make) -> None:
    running = coordinator_process(["--evaluation-gate"])
    running.start()
    with CoordinatorClient(running.url) as client:
        train(client, 0)
        score(client, "scaled x0.6", 0.9)
        before = published(client, 1)
        train(client, 1)
        running.kill()
        running.start()
        assert hashlib.sha256(served(running.url)).digest() == hashlib.sha256(before).digest()
        assert client.gateway_info().sources == {"python": 1, "sql": 1}
        assert client.list_experts().experts[0].version == 2


@pytest.mark.parametrize(("place", "comes_out"), [("gateway.stored", False), ("gateway.journalled", True)])
def test_a_kill_while_publishing_leaves_the_old_gateway_or_the_new_one(
    coordinator_process: Make, place: str, comes_out: bool
) -> None:
    running = coordinator_process(["--evaluation-gate"])
    running.start(f"{place}=2")
    with CoordinatorClient(running.url, attempts=1) as client:
        train(client, 0)
        score(client, "scaled x0.6", 0.9)
        before = published(client, 1)
        train(client, 1)
        with contextlib.suppress(CoordinatorUnavailableError):  # killed before the last answer was out
            score(client, "scaled x0.9", 0.95)
        assert running.wait() == -9
        running.start()
        after = client.gateway_info()
        assert (after.sources, after.scale) == (
            ({"python": 2, "sql": 2}, 0.9) if comes_out else ({"python": 1, "sql": 1}, 0.6)
        )
        assert (served(running.url) == before) == (not comes_out)
        blobs = {file.name for file in (running.state_dir / "blobs").iterdir() if file.is_file()}
        # Four updates and the one gateway that is served; bytes that no verdict names wait for a day.
        assert len(blobs) == (5 if comes_out else 6)
        if not comes_out:  # the lost set is offered anew
            score(client, "scaled x0.9", 0.95)
            published(client, 2)
            assert client.gateway_info().scale == 0.9
