"""Evaluators on the tiny model: they score what a coordinator offers, send numbers only, and decide what goes out."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2
import numpy as np
import pytest
from builders import wait_until
from workers import Federation, federation, tiny_base

from fedmoe.coordinator import seed_of
from fedmoe.datasets.tokens.packing import Block, collate, pack
from fedmoe.datasets.tokens.tokenized_sample import TokenizedSample
from fedmoe.gateway.evaluate import evaluate
from fedmoe.gateway.evaluator import BaseMismatchError, GatewayEvaluator, HeldOutScorer
from fedmoe.lora.adapter import Adapter, FloatVector
from fedmoe.lora.codec import encode
from fedmoe.qwen_finetune import LoraConfig, QwenLoRAExpert, TrainingConfig
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.gate.gate import GatePolicy
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.experts import CandidatesRequest, VerdictInfo
from fedmoe.wire.contract.messages import UpdateHeader

DOMAINS = {"up": 1, "down": -1}


def counting(step: int, seed: int, count: int) -> list[Block]:
    """Sequences that count up or down byte by byte."""
    starts = np.random.default_rng(seed).integers(20, 230, count)
    return pack([TokenizedSample(ids, ids) for ids in (np.arange(20) * step + s for s in starts)], 32, 0)


class Listening(httpx2.BaseTransport):
    """The way to the coordinator, with every body that went along it."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes]] = []
        self._inner = httpx2.HTTPTransport(verify=False)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.sent.append((str(request.url), request.read()))
        return self._inner.handle_request(request)

    def close(self) -> None:
        self._inner.close()


class Trainer:
    """Trains an expert of one domain and pushes what it learned."""

    def __init__(self, client: CoordinatorClient, name: str) -> None:
        self.client, self.name, self.sequence = client, name, 0
        training = TrainingConfig(learning_rate=1e-2, warmup_steps=2)
        self.expert = QwenLoRAExpert(tiny_base(), LoraConfig(4, 8, seed=seed_of(name) % 2**63), training)
        client.register(name, f"w-{name}", self.expert.manifest)
        self.known = self.expert.weights()

    def learn(self, steps: int) -> FloatVector:
        for step in range(steps):
            self.expert.train_step([collate(counting(DOMAINS[self.name], 100 + step, 8))])
        return self.push(self.expert.weights() - self.known)

    def push(self, delta: FloatVector) -> FloatVector:
        header = UpdateHeader(
            expert=self.name, worker=f"w-{self.name}", epoch="e1", sequence=self.sequence, base_version=self.sequence
        )
        self.client.push(header, encode(self.expert.manifest.layout, delta.astype(np.float32)))
        self.sequence, self.known = self.sequence + 1, self.known + delta
        return delta


def scorer(domain: str) -> HeldOutScorer:
    return HeldOutScorer(tiny_base(), counting(DOMAINS[domain], 1, 6))


@contextmanager
def running(url: str, domain: str) -> Iterator[GatewayEvaluator]:
    """An evaluator of a domain, in a thread."""
    with CoordinatorClient(url) as client:
        evaluator = GatewayEvaluator(client, scorer(domain), f"e-{domain}", domain, poll_seconds=0.05)
        thread = threading.Thread(target=evaluator.run)
        thread.start()
        try:
            yield evaluator
        finally:
            evaluator.stop()
            thread.join(20)
            assert not thread.is_alive(), "the evaluator did not stop"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Federation]:
    with federation(tmp_path / "state", evaluation_gate=True, strategy="sum") as started:
        yield started


@pytest.fixture
def client(house: Federation) -> Iterator[CoordinatorClient]:
    with CoordinatorClient(house.url) as opened:
        yield opened


def verdicts(client: CoordinatorClient, count: int) -> list[VerdictInfo]:
    deadline = time.monotonic() + 60
    while len(found := client.gateway_verdicts()) < count:
        assert time.monotonic() < deadline, f"{len(found)} verdicts came, expected {count}"
        time.sleep(0.02)
    return found


def worst_kept(adapters: Mapping[str, Adapter], own: Mapping[str, Adapter]) -> dict[str, float]:
    """What each adapter keeps of the own expert's gain on its worst domain, measured by `gateway evaluate`'s code."""
    held_out = {name: counting(step, 1, 6) for name, step in DOMAINS.items()}
    matrix = evaluate(tiny_base(), {**own, **adapters}, held_out)
    losses = matrix.losses
    return {
        name: min((losses["base"][d] - losses[name][d]) / (losses["base"][d] - losses[d][d]) for d in DOMAINS)
        for name in adapters
    }


def test_the_best_scale_goes_out_a_worse_gateway_does_not_and_a_better_one_does_again(
    house: Federation, client: CoordinatorClient
) -> None:
    up, down = Trainer(client, "up"), Trainer(client, "down")
    up.learn(15)
    down.learn(15)
    with ExitStack() as stack:
        for domain in DOMAINS:
            stack.enter_context(running(house.url, domain))
        (first,) = verdicts(client, 1)
        info = client.gateway_info()
        assert (first.published, info.sources) == (f"scaled x{info.scale:g}", {"up": 1, "down": 1})
        kept = _all_scales(client)
        assert max(kept, key=lambda scale: kept[scale]) == info.scale

        served = client.pull_gateway()
        damage = np.random.default_rng(0).normal(0, 0.3, up.known.size).astype(np.float32)
        up.push(damage)
        second = verdicts(client, 2)[0]
        assert second.published is None
        assert "lower" in second.reason
        assert "up" in second.reason
        still = client.pull_gateway()
        assert served is not None
        assert still is not None
        assert (still.version, still.digest) == (served.version, served.digest)
        told = client.gateway_info().gate
        assert told is not None
        assert (told.reason, told.evaluators) == (second.reason, ["e-down/down", "e-up/up"])

        up.push(-damage)
        down.learn(10)
        wait_until(lambda: client.gateway_info().sources == {"up": 3, "down": 2})
        assert client.gateway_verdicts()[0].published is not None


def _all_scales(client: CoordinatorClient) -> dict[float, float]:
    """Scale -> what it keeps on the worst domain, of those that are offered."""
    own, gateway = {}, client.pull_gateway()
    assert gateway is not None
    unit = client.gateway_info().scale
    for name in DOMAINS:
        pulled = client.pull_expert(name)
        assert pulled is not None
        own[name] = pulled.adapter
    scales = (0.6, 0.9, 1.0)
    adapter = gateway.adapter
    kept = worst_kept({str(s): Adapter(adapter.layout, adapter.alpha * s / unit, adapter.flat) for s in scales}, own)
    return {float(scale): share for scale, share in kept.items()}


def test_numbers_leave_the_machine_and_nothing_else(house: Federation, client: CoordinatorClient) -> None:
    Trainer(client, "up").learn(3)
    road = Listening()
    with CoordinatorClient(house.url, transport=road) as own:
        evaluator = GatewayEvaluator(own, scorer("up"), "e1", "up", 1.0)
        wait_until(evaluator.score_once)
    posted = [json.loads(body) for url, body in road.sent if body and not url.endswith("/gateway_candidates")]
    assert len(posted) == 1
    assert posted[0].keys() == {"set", "evaluator", "expert", "tokens", "base", "own", "published", "candidates"}
    assert all(isinstance(posted[0][key], float) for key in ("base", "own"))
    assert all(isinstance(loss, float) for loss in posted[0]["candidates"].values())
    assert {url.partition("?")[0].rpartition("/")[2] for url, _ in road.sent} == {
        *("gateway_candidates", "gateway_candidate_weights", "push_gateway_scores"),
    }


def test_the_losses_are_those_of_the_evaluation_command(house: Federation, client: CoordinatorClient) -> None:
    trainer = Trainer(client, "up")
    trainer.learn(5)
    wait_until(GatewayEvaluator(client, scorer("up"), "e1", "up", 1.0).score_once)
    (found,) = verdicts(client, 1)[0].scores
    pulled = client.pull_expert("up")
    assert pulled is not None
    matrix = evaluate(tiny_base(), {"up": pulled.adapter}, {"up": counting(1, 1, 6)})
    assert found.base == pytest.approx(matrix.losses["base"]["up"], rel=1e-6)
    assert found.own == pytest.approx(matrix.losses["up"]["up"], rel=1e-6)
    assert found.candidates == {"scaled x1": pytest.approx(found.own, rel=1e-5)}
    assert found.tokens == matrix.tokens["up"]


def test_base_own_expert_and_what_went_out_are_measured_once(
    house: Federation, client: CoordinatorClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    up, down = Trainer(client, "up"), Trainer(client, "down")
    up.learn(5)
    down.learn(5)
    measured: list[Adapter] = []
    measure = HeldOutScorer._measure

    def counted(self: HeldOutScorer, adapter: Adapter) -> object:
        measured.append(adapter)
        return measure(self, adapter)

    monkeypatch.setattr(HeldOutScorer, "_measure", counted)
    evaluator = GatewayEvaluator(client, scorer("up"), "e1", "up", 1.0)
    wait_until(evaluator.score_once)
    assert len(measured) == 2 + 3  # base model, own expert, three scales
    for count, size in ((1, 1e-6), (2, 0.2)):
        before = verdicts(client, count)[0]
        assert before.published is not None or count == 2
        down.push(np.full(down.known.size, size, np.float32))
        wait_until(evaluator.score_once)
        assert len(measured) == 5 + 3 * count  # the new candidates; what went out was a candidate, so it is known


def test_a_candidate_that_went_out_has_the_very_loss_it_was_chosen_for(
    house: Federation, client: CoordinatorClient
) -> None:
    trainers = [Trainer(client, domain) for domain in DOMAINS]
    for trainer in trainers:
        trainer.learn(15)

    def scored_anew() -> None:
        """Both score the open set, and know of nothing."""
        for domain in DOMAINS:
            client.gateway_candidates(CandidatesRequest(evaluator=f"e-{domain}", expert=domain))
        for domain in DOMAINS:
            wait_until(GatewayEvaluator(client, scorer(domain), f"e-{domain}", domain, 1.0).score_once)

    scored_anew()
    chosen = verdicts(client, 1)[0]
    assert chosen.published not in (None, "scaled x1")
    trainers[0].push(np.full(trainers[0].known.size, 1e-6, np.float32))
    scored_anew()
    again = {found.expert: found.published for found in verdicts(client, 2)[0].scores}
    assert again == {found.expert: found.candidates[str(chosen.published)] for found in chosen.scores}


def test_an_evaluator_that_is_stopped_leaves_its_set_to_the_others(
    house: Federation, client: CoordinatorClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in DOMAINS:
        Trainer(client, name).learn(3)
    evaluator = GatewayEvaluator(client, scorer("up"), "e1", "up", 0.01)
    measure, measured = HeldOutScorer._measure, [0]

    def stopped_at_the_third(self: HeldOutScorer, adapter: Adapter) -> object:
        measured[0] += 1
        if measured[0] == 3:
            evaluator.stop()
        return measure(self, adapter)

    monkeypatch.setattr(HeldOutScorer, "_measure", stopped_at_the_third)
    evaluator.run()
    assert measured == [3]
    assert client.gateway_verdicts() == []


def test_a_set_that_is_closed_while_it_is_scored_is_left_and_what_was_measured_is_known(
    house: Federation, client: CoordinatorClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in DOMAINS:
        Trainer(client, name).learn(3)
    gate = house.house.service.evaluation_gate if house.house else None
    assert gate is not None
    measure, measured = HeldOutScorer._measure, [0]

    def closed_at_the_third(self: HeldOutScorer, adapter: Adapter) -> object:
        measured[0] += 1
        if measured[0] == 3:
            monkeypatch.setattr(gate, "_policy", GatePolicy(seconds=0.0))
            wait_until(client.gateway_verdicts)
            monkeypatch.setattr(gate, "_policy", GatePolicy())
        return measure(self, adapter)

    monkeypatch.setattr(HeldOutScorer, "_measure", closed_at_the_third)
    evaluator = GatewayEvaluator(client, scorer("up"), "e1", "up", 1.0)
    wait_until(lambda: client.gateway_candidates(CandidatesRequest(evaluator="e1", expert="up")).open)
    with pytest.raises(RefusedError, match="closed before it was scored"):
        evaluator.score_once()
    assert verdicts(client, 1)[0].undecided
    assert measured == [3]
    wait_until(evaluator.score_once)
    assert measured == [2 + 3]  # base, own expert and three scales, each once


def test_another_base_model_is_named_and_nothing_is_sent(
    house: Federation, client: CoordinatorClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(client, "up")
    trainer.learn(1)
    other = scorer("up")

    monkeypatch.setattr(
        other, "base", replace(other.base, identity=replace(other.base.identity, weights_hash="0" * 64))
    )
    evaluator = GatewayEvaluator(client, other, "e1", "up", 1.0)
    wait_until(lambda: client.gateway_candidates(CandidatesRequest(evaluator="e1", expert="up")).open)
    with pytest.raises(BaseMismatchError, match="--base-model"):
        evaluator.score_once()
    assert client.gateway_verdicts() == []


def test_an_evaluator_waits_for_a_coordinator_that_is_away_and_an_expert_that_is_not_there_yet(tmp_path: Path) -> None:
    with federation(tmp_path / "state", evaluation_gate=True) as house, running(house.url, "up"):
        time.sleep(0.2)  # asks for an expert that nobody has registered
        house.stop()
        time.sleep(0.2)
        house.start()
        with CoordinatorClient(house.url) as client:
            Trainer(client, "up").learn(3)
            wait_until(lambda: any(found.published == "scaled x1" for found in client.gateway_verdicts()))
