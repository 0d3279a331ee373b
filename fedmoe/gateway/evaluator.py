"""Evaluator: scores candidate gateways on held-out data that stay with their owner, and sends numbers only.

It is a process of its own and not part of a worker: scoring takes the model for as long as several sync intervals, and
a worker that scored would not train meanwhile.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog

from fedmoe.config import EvaluatorConfig
from fedmoe.datasets.row_scan import RowOptions, check_file
from fedmoe.datasets.tokens.packing import Block
from fedmoe.gateway.evaluate import held_out_blocks
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.algebra import scaled
from fedmoe.lora.codec import digest
from fedmoe.models.base import ChatTemplate, LoadedBase, load_base
from fedmoe.models.prepare_data import DataOptions
from fedmoe.models.training_config import LoraConfig
from fedmoe.qwen_finetune import EvaluationResult, QwenLoRAExpert
from fedmoe.runtime.device import choose_device, pin_threads
from fedmoe.runtime.errors import RefusedError
from fedmoe.runtime.stop_signals import StopOnSignal
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError, PulledGateway
from fedmoe.wire.contract.experts import CandidateSetInfo, CandidatesRequest, CandidateWeightsRequest, GatewayScores
from fedmoe.wire.delivery import pause_seconds

_log = structlog.get_logger("fedmoe.evaluator")

# A set that was closed, or an expert that is not there yet: neither is this evaluator's fault, and both pass.
_PASSING = frozenset({"candidates_closed", "unknown_candidate", "scores_mismatch", "unknown_expert"})


class _StopRequestedError(Exception):
    """The evaluator was stopped while it scored."""


class BaseMismatchError(ValueError):
    """The federation's base model is not the one that was loaded."""


@dataclass
class HeldOutScorer:
    """Losses on one set of blocks; the base model's is measured once, an adapter's once for as long as it is in use."""

    base: LoadedBase
    blocks: Sequence[Block]
    batch_size: int = 4
    _results: dict[str, EvaluationResult] = field(default_factory=dict)
    _used: set[str] = field(default_factory=set)
    _base_loss: EvaluationResult | None = None
    _model: QwenLoRAExpert | None = None

    def loss_of_base(self, like: Adapter) -> EvaluationResult:
        """The base model through the very same code: an adapter of zeros, of the modules of `like`."""
        if self._base_loss is None:
            self._base_loss = self._measure(Adapter.zeros(like.layout, like.alpha))
        return self._base_loss

    def loss_of(self, adapter: Adapter, scale: float = 1.0) -> EvaluationResult:
        """The loss with `scale` times the adapter's product.

        The factor goes into B, as it does when a candidate is published: in low precision another place would give
        another loss, and a candidate that goes out is the very adapter that was scored.
        """
        measured = adapter if scale == 1.0 else scaled(adapter, scale)
        name = digest(measured)
        return self.cached(name) or self._results.setdefault(name, self._measure(measured))

    def cached(self, name: str) -> EvaluationResult | None:
        """The loss of the adapter with this digest, if it was measured before."""
        self._used.add(name)
        return self._results.get(name)

    def forget_unused(self) -> None:
        """Keep what was used since the last call: one of these may be the next published gateway."""
        self._results = {name: result for name, result in self._results.items() if name in self._used}
        self._used = set()

    def _measure(self, adapter: Adapter) -> EvaluationResult:
        if self._model is None:
            targets = tuple(module.name for module in adapter.layout.modules)
            self._model = QwenLoRAExpert(self.base, LoraConfig(adapter.rank, adapter.alpha, target_modules=targets))
        self._model.load_adapter(adapter)
        return self._model.evaluate(self.blocks, self.batch_size)


class GatewayEvaluator:
    """Fetches candidate gateways, scores them, sends the losses; nothing else leaves the machine."""

    def __init__(
        self, client: CoordinatorClient, scorer: HeldOutScorer, name: str, expert: str, poll_seconds: float
    ) -> None:
        self._client, self._scorer, self._poll_seconds = client, scorer, poll_seconds
        self._request = CandidatesRequest(evaluator=name, expert=expert)
        self._stopped = threading.Event()
        self._status = ""

    def stop(self) -> None:
        """Stop after the adapter that is being scored; its set is left to the others."""
        self._stopped.set()

    def run(self) -> None:
        """Score until stopped; a coordinator that is away is asked again and again."""
        tries = 0
        while not self._stopped.is_set():
            pause = self._poll_seconds
            try:
                pause = 0.0 if self.score_once() else pause
                tries = 0
            except _StopRequestedError:
                return
            except CoordinatorUnavailableError as error:
                tries += 1
                pause = pause_seconds(tries, error.retry_after, random.random())  # noqa: S311
                _log.warning("coordinator_away", reason=str(error), seconds=round(pause, 1))
            except RefusedError as error:
                if error.code not in _PASSING:
                    raise
                self._say("not_scored", str(error))
            self._stopped.wait(pause)

    def score_once(self) -> bool:
        """Score the open set, if one waits for this evaluator; returns whether one did.

        Raises what the client raises, and `BaseMismatchError`.
        """
        answer = self._client.gateway_candidates(self._request)
        if answer.open is None:
            self._say("nothing_to_score", answer.status)
            return False
        scores = self._scores(answer.open)
        result = self._client.push_gateway_scores(scores)
        best = min(scores.candidates, key=lambda name: scores.candidates[name])
        _log.info(
            "scored",
            set=scores.set,
            tokens=scores.tokens,
            base=round(scores.base, 4),
            own=round(scores.own, 4),
            best={best: round(scores.candidates[best], 4)},
            waiting_for=result.waiting_for,
        )
        return True

    def _say(self, event: str, reason: str) -> None:
        """Log why nothing was scored, once: the same answer comes again with every question."""
        if reason != self._status:
            _log.info(event, reason=reason)
        self._status = reason

    def _scores(self, offer: CandidateSetInfo) -> GatewayScores:
        # Own expert first: of all adapters it is the smallest, and the base model is measured in its shape.
        own = self._pull(offer, offer.own)
        base = self._scorer.loss_of_base(own.adapter)
        own_loss = self._loss(offer, own.adapter).loss
        published = None
        if offer.published is not None:
            cached = self._scorer.cached(offer.published)
            published = (cached or self._loss(offer, self._pull(offer, offer.published).adapter)).loss
        losses = {}
        # An adapter that several candidates share is downloaded once and held only meanwhile.
        for shared in dict.fromkeys(candidate.digest for candidate in offer.candidates):
            adapter = self._pull(offer, shared).adapter
            for candidate in offer.candidates:
                if candidate.digest == shared:
                    losses[candidate.name] = self._loss(offer, adapter, candidate.scale).loss
        self._scorer.forget_unused()
        return GatewayScores(
            set=offer.id,
            evaluator=self._request.evaluator,
            expert=self._request.expert,
            tokens=base.tokens,
            base=base.loss,
            own=own_loss,
            published=published,
            candidates=losses,
        )

    def _loss(self, offer: CandidateSetInfo, adapter: Adapter, scale: float = 1.0) -> EvaluationResult:
        """The loss, after a request that shows the coordinator this evaluator at work; refused if the set is closed."""
        if self._stopped.is_set():
            raise _StopRequestedError
        still = self._client.gateway_candidates(self._request).open
        if still is None or still.id != offer.id:
            raise RefusedError(
                "candidates_closed",
                f"the set {offer.id} was closed before it was scored.",
                "Lower --held-out-blocks, or raise the coordinator's --gate-seconds.",
            )
        return self._scorer.loss_of(adapter, scale)

    def _pull(self, offer: CandidateSetInfo, name: str) -> PulledGateway:
        pulled = self._client.pull_candidate(CandidateWeightsRequest(set=offer.id, digest=name))
        expected, loaded = pulled.base["weights_hash"], self._scorer.base.identity
        if loaded.weights_hash != expected:
            raise BaseMismatchError(
                f"the experts were trained on {pulled.base['name']} (weights {expected[:12]}), but {loaded.name} has "
                f"weights {loaded.weights_hash[:12]}; name the federation's base model with --base-model"
            )
        return pulled


def run_evaluator(config: EvaluatorConfig) -> None:
    """Run an evaluator until SIGTERM or SIGINT."""
    pin_threads()
    chat = ChatTemplate.from_options(config.chat_template, config.chat_template_kwargs)
    rows = RowOptions.mapping(config.map)
    check_file(config.held_out, rows).raise_problem()  # before a base model is loaded
    token = config.token.get_secret_value() if config.token else None
    with CoordinatorClient(config.coordinator_url, token) as client:
        # So is a wrong URL or token, and a coordinator without a gate.
        client.gateway_verdicts(1)
        base = load_base(config.base_model, choose_device(config.device), config.dtype, chat)
        for note in base.notes:
            _log.warning("base_model_note", note=note)
        blocks = held_out_blocks(
            config.held_out,
            base,
            config.max_length,
            config.held_out_blocks,
            DataOptions(rows),
            report=lambda report: _log.info("dataset", **report.summary),
        )
        _log.info("held_out", file=config.held_out, blocks=len(blocks))
        scorer = HeldOutScorer(base, blocks, config.batch_size)
        evaluator = GatewayEvaluator(client, scorer, config.evaluator_id, config.expert, config.poll_interval)
        StopOnSignal(evaluator.stop).install()
        evaluator.run()
