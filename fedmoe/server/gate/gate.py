"""The evaluation gate: a new gateway is published only if evaluators' held-out losses allow it.

One thread makes the sets of candidates, judges them and publishes; requests only read what it has made, or leave their
scores. So no request waits for a merge, for a disk or for another request. Scores live in memory until their set is
judged: after a crash the set is gone and evaluators score the next one.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog

from fedmoe.coordinator import CentralCoordinator, GatewayModel
from fedmoe.lora.adapter import Adapter
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.gate.candidates import (
    Candidate,
    CandidateSet,
    Evaluator,
    decide,
    make_candidates,
    outcome,
    waiting_for,
)
from fedmoe.server.gate.evaluators import Evaluators
from fedmoe.server.gate.publication import Publications, taken_back
from fedmoe.server.gate.verdict import GateDecision
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.journal import Journal
from fedmoe.wire.contract.experts import CandidatesRequest, GateInfo, GatewayScores

_log = structlog.get_logger("fedmoe.gate")

# A deadline is noticed so late at most.
_TICK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class GatePolicy:
    """By how much the worst domain may fall (a share of its gain), and for how many seconds a set stays open."""

    tolerance: float = 0.01
    seconds: float = 300.0


class EvaluationGate:
    """Offers candidates, takes scores, publishes; `fail` is called when storage can no longer be trusted."""

    def __init__(
        self,
        coordinator: CentralCoordinator,
        journal: Journal,
        publications: Publications,
        policy: GatePolicy,
        clock: Callable[[], float],
        fail: Callable[[str], None],
    ) -> None:
        self._coordinator = coordinator
        self._journal = journal
        self._publications = publications
        self._policy = policy
        self._clock = clock
        self._fail = fail
        self._lock = threading.Lock()
        self._open: CandidateSet | None = None
        self._scores: dict[Evaluator, GatewayScores] = {}
        self._evaluators = Evaluators()
        newest = next(iter(journal.verdicts(1)), None)
        self._reason = str(newest.payload["reason"]) if newest else ""
        self._at = newest.at if newest else None
        self._undecided = bool(newest and newest.payload.get("undecided"))
        #: Expert -> share of its gain that the served gateway kept at the newest verdict that was reached.
        self.kept: Mapping[str, float] = _kept(newest.payload) if newest else {}
        # The state that the newest verdict was about: nothing new to score until the gateway's version has risen.
        self._judged = int(str(newest.payload["version"])) if newest and not self._undecided else 0
        self._given_up = ""
        # A set is made when somebody asks and none is open, so that it is of the newest state.
        self._asked = False
        if coordinator.manifest is not None:
            publications.recover(coordinator.manifest.layout)
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="fedmoe-gate", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Finish what is being judged and stop; safe to call before `start` and more than once."""
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def has_published(self) -> bool:
        """Whether a gateway is out."""
        return self._publications.current is not None

    def published(self) -> GatewayModel:
        """The gateway that is out; refuses with the reason where none is."""
        current = self._publications.current
        if current is None:
            info = self.info()
            reason = f"{info.reason}; {info.status}" if info.reason else info.status
            raise RefusedError(
                "gateway_not_published",
                f"this coordinator publishes what evaluators let through, and nothing is out yet: {reason}.",
                "Start 'fedmoe evaluator' for each domain, or the coordinator with --no-evaluation-gate.",
            )
        return current

    def info(self) -> GateInfo:
        """What the gate decided last, and what it waits for."""
        now = self._clock()
        with self._lock:
            return GateInfo(
                reason=self._reason,
                at=self._at,
                undecided=self._undecided,
                status=self._status(now),
                evaluators=_named(self._evaluators.active(now, self._policy.seconds)),
            )

    def announce(self, request: CandidatesRequest, token: str = "") -> None:
        """Register an evaluator; sets wait for its scores from now on. `token` is the hash of the one shown."""
        self._coordinator.expert(request.expert)
        with self._lock:
            self._evaluators.hear((request.evaluator, request.expert), token, self._clock(), self._policy.seconds)

    def ask(self, request: CandidatesRequest) -> tuple[CandidateSet | None, float, str]:
        """The open set if this evaluator has not scored it yet, the seconds left for it, and the state in words."""
        self._coordinator.expert(request.expert)
        now, asker = self._clock(), (request.evaluator, request.expert)
        with self._lock:
            offer = self._open if asker not in self._scores else None
            if offer is not None and request.expert not in offer.experts:
                offer = None  # an expert that came later; the next set has it
            seconds_left = offer.opened_at + self._policy.seconds - now if offer is not None else 0.0
            status = self._status(now)
            self._asked = self._asked or self._open is None
        self._wake.set()
        return offer, seconds_left, status

    def adapter(self, set_id: str, digest: str) -> tuple[CandidateSet, Adapter, str | None]:
        """The adapter of this digest in the open set, and the name of the expert if it is one."""
        with self._lock:
            offer = self._the_open(set_id)
        for model in (*(candidate.model for candidate in offer.candidates), offer.published):
            if model is not None and model.digest == digest:
                return offer, model.adapter, None
        for name, expert in offer.experts.items():
            if expert.digest == digest:
                return offer, expert.adapter, name
        raise RefusedError(
            "unknown_candidate", f"set {set_id} has no adapter with digest {digest}.", "Ask for the open set again."
        )

    def take(self, scores: GatewayScores, token: str = "") -> list[str]:
        """Keep an evaluator's scores for the open set, in place of earlier ones; who is still waited for."""
        now, sender = self._clock(), (scores.evaluator, scores.expert)
        with self._lock:
            offer = self._the_open(scores.set)
            _check_complete(offer, scores)
            self._evaluators.score(sender, token, now, self._policy.seconds)
            self._scores[sender] = scores
            missing = self._missing(offer)
        self._wake.set()
        _log.info("scores", evaluator=scores.evaluator, expert=scores.expert, set=scores.set, tokens=scores.tokens)
        return _named(missing)

    def step(self) -> None:
        """Do what is due now: judge the open set, leave it undecided, or make the next. For one thread at a time."""
        now, seconds = self._clock(), self._policy.seconds
        with self._lock:
            offer, scores = self._open, self._scores
            if offer is None:
                requested, self._asked = self._asked, False
            else:
                missing = self._missing(offer)
                state = outcome(offer.opened_at, now, seconds, scores, self._evaluators.awaited(offer.experts))
                if state == "wait":
                    self._asked = False
                    return
                self._evaluators.miss(missing)
                self._open, self._scores = None, {}
        if offer is None:
            # Made when somebody asks and experts have changed, so that it is of the newest state.
            if requested and self._coordinator.gateway_version > self._judged:
                self._make()
        elif state == "judge":
            self._judge(offer, list(scores.values()))
        else:
            self._leave_undecided(offer, list(scores.values()), missing)

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(_TICK_SECONDS)
            self._wake.clear()
            try:
                self.step()
            except StorageFailedError as error:
                self._fail(str(error))
                return
            except Exception as error:
                # A merge that fails or a full disk: the old gateway stays, and the next change is tried again.
                with self._lock:
                    self._given_up = f"the last try failed: {error}"
                    self._judged = self._coordinator.gateway_version
                _log.error("gate_failed", error=repr(error))

    def _missing(self, offer: CandidateSet) -> list[Evaluator]:
        """Who is waited for and has not scored; an expert that came later is not in the set."""
        awaited = self._evaluators.awaited(offer.experts)
        return waiting_for(offer.opened_at, self._policy.seconds, self._scores, awaited)

    def _the_open(self, set_id: str) -> CandidateSet:
        if self._open is None or self._open.id != set_id:
            raise RefusedError(
                "candidates_closed", f"the set {set_id} is not open (any more).", "Ask for the open set and score that."
            )
        return self._open

    def _make(self) -> None:
        view = self._coordinator.transaction()  # experts, version and moments of one moment
        experts = {name: expert for name, expert in view.experts.items() if not expert.retired}
        if not experts:
            return
        candidates = make_candidates(view.gateway_version, experts, view.aggregation, view.moments, view.online_gateway)
        out = self._publications.current
        if out is not None and {candidate.model.digest for candidate in candidates} == {out.digest}:
            with self._lock:
                self._judged = view.gateway_version  # experts learned, but nothing was merged since
            return
        offer = CandidateSet(secrets.token_hex(8), self._clock(), view.gateway_version, experts, candidates, out)
        for expert in offer.experts.values():
            _ = expert.digest  # made here once, not in a request
        with self._lock:
            self._open, self._scores, self._given_up = offer, {}, ""
        names = [candidate.name for candidate in candidates]
        _log.info("candidates", set=offer.id, version=offer.version, experts=offer.sources, candidates=names)

    def _judge(self, offer: CandidateSet, scores: list[GatewayScores]) -> None:
        retired = self._coordinator.experts.keys() - self._coordinator.active.keys()
        stale = [n for n, version in offer.sources.items() if n in retired or taken_back(self._journal, n, version)]
        if stale:
            # What was taken back must not go out: the next set is made without it.
            names = ", ".join(stale)
            with self._lock:
                self._given_up = f"the last set was made before {names} was retired, rolled back or retracted from"
            return
        out = self._publications.current
        withdrawn = {*self._publications.taken_back(), *(retired & out.sources.keys() if out is not None else ())}
        verdict = decide(offer, scores, self._policy.tolerance, withdrawn)
        chosen = next((candidate for candidate in offer.candidates if candidate.name == verdict.serve), None)
        self._record(offer, scores, verdict, chosen, undecided=False)
        event, name = ("gateway_published", chosen.name) if chosen is not None else ("gateway_kept", None)
        _log.info(event, version=offer.version, candidate=name, reason=verdict.reason)

    def _leave_undecided(self, offer: CandidateSet, scores: list[GatewayScores], missing: list[Evaluator]) -> None:
        """Journal that the set timed out: the published gateway stays, and the state is offered again on request."""
        who = f"{', '.join(_named(missing))} had scored" if missing else "anybody had scored"
        advice = "raise --gate-seconds of the coordinator or lower --held-out-blocks of the evaluators"
        reason = f"undecided: --gate-seconds ({self._policy.seconds:g}) were over before {who}; {advice}"
        self._record(offer, scores, GateDecision(None, reason), None, undecided=True)
        _log.warning("gateway_undecided", set=offer.id, version=offer.version, reason=reason)

    def _record(
        self,
        offer: CandidateSet,
        scores: list[GatewayScores],
        verdict: GateDecision,
        chosen: Candidate | None,
        *,
        undecided: bool,
    ) -> None:
        """Journal a verdict and publish what it lets out; then say so to whoever asks."""
        at = self._clock()
        payload = {
            "version": offer.version,
            "candidate": chosen.name if chosen is not None else None,
            "undecided": undecided,
            "reason": verdict.reason,
            "kept": {name: dict(shares) for name, shares in verdict.retained.items()},
            "scores": [score.model_dump() for score in scores],
        }
        self._publications.decide(chosen.gateway() if chosen is not None else None, payload, at)
        with self._lock:
            self._reason, self._at, self._undecided = verdict.reason, at, undecided
            if undecided:
                self._given_up = "the next set is made as soon as an evaluator asks"
            else:
                self._judged, self.kept = offer.version, dict(verdict.retained.get(verdict.serve or "", {}))

    def _status(self, now: float) -> str:
        seconds = self._policy.seconds
        if self._open is not None:
            missing = self._missing(self._open)
            seconds_left = max(0.0, self._open.opened_at + seconds - now)
            if missing:
                return f"waiting up to {seconds_left:.0f} s for scores from {', '.join(_named(missing))}"
            if not self._scores:
                return f"a set is open for {seconds_left:.0f} s more and no evaluator is active"
        if self._given_up:
            return self._given_up
        if not self._evaluators.active(now, seconds):
            return f"no evaluator has asked in the last {seconds:g} s; start one with 'fedmoe evaluator'"
        if self._coordinator.gateway_version <= self._judged:
            return "nothing has changed since the last verdict"
        return "candidates are being made or judged"


def _named(evaluators: list[Evaluator]) -> list[str]:
    return [f"{name}/{expert}" for name, expert in evaluators]


def _kept(payload: Mapping[str, object]) -> Mapping[str, float]:
    """What a journalled verdict says of the gateway that was served from then on."""
    shares = payload.get("kept")
    if not isinstance(shares, dict):
        return {}
    # Where no candidate went out, the published gateway stayed, which stands there by its version.
    served = payload.get("candidate") or next((name for name in shares if name.startswith("version ")), None)
    return dict(shares.get(served, {}))


def _check_complete(offer: CandidateSet, scores: GatewayScores) -> None:
    """Scores must be of exactly what is offered: others cannot be compared."""
    expected = {candidate.name for candidate in offer.candidates}
    odd = sorted(expected ^ scores.candidates.keys())
    if odd or (scores.published is None) != (offer.published is None) or scores.expert not in offer.experts:
        raise RefusedError(
            "scores_mismatch",
            f"the set holds {', '.join(sorted(expected))}, {'a' if offer.published else 'no'} published gateway and "
            f"the experts {', '.join(sorted(offer.experts))}; got {', '.join(sorted(scores.candidates))} of "
            f"{scores.expert}, {'no' if scores.published is None else 'a'} published gateway.",
            "Score everything that the set names.",
        )
