"""A run's membership in a federation: policies are experts of a coordinator, other sites' experts are opponents.

    site A                               coordinator                             site B
    policy solver   -- its updates -->   expert solver, version rises   -->      opponent solver@7, frozen
    opponent critic@4, frozen      <--   expert critic, version rises   <-- its updates --   policy critic

Two sites may also train the same expert: each pushes what it learned and is rebased onto what both have learned. The
coordinator being away never stops the training: what has to travel waits on disk (see `link`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import structlog

from fedmoe.arena.config import FederationSection, PolicySection
from fedmoe.arena.league.link import ExpertLink, FederationError
from fedmoe.arena.learning.adapt import AdaptRules
from fedmoe.arena.learning.policies import Policies
from fedmoe.arena.modes.memory import ModeMemory
from fedmoe.inference.engine import AdapterKey, EngineError
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.codec import digest
from fedmoe.lora.manifest import Manifest
from fedmoe.models.base import LoadedBase
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError, ExpectedWeights

#: Experts of other sites that are held as opponents at once; each takes the memory of an adapter.
MOST_OPPONENTS = 8
#: How long an exchange waits for the answers to its updates, in seconds; after that they are delivered meanwhile.
PATIENCE = 20.0
# So many tries in a row without an answer, and the exchange is left for later.
_BEARABLE_FAILURES = 3
_TICK_SECONDS = 0.05
_log = structlog.get_logger("fedmoe.arena")


class League:
    """The exchange of a run with its coordinator; used by one thread, the one that learns.

    While `exchange` runs nothing may be sampled: it gives policies other weights and lets opponents go.
    """

    def __init__(
        self,
        section: FederationSection,
        iterations: int,
        client: CoordinatorClient,
        manifest: Manifest,
        policies: Policies,
        links: Mapping[str, ExpertLink],
        patience: float,
    ) -> None:
        self._section, self._iterations = section, iterations
        self._client, self._manifest = client, manifest
        self._policies, self._links = policies, links
        self._patience = patience
        self._least_seconds = 0.0
        self._exchanged_at = float("-inf")
        self._failures = 0
        self._away = False
        self._telling = threading.Lock()
        self._leaving = False
        self._left_out: set[str] = set()
        self._digests: dict[AdapterKey, str] = {}

    def due(self, iteration: int) -> bool:
        """Whether updates go and come once `iteration` iterations are done: every so many, and at the end."""
        return iteration % self._section.every == 0 or iteration >= self._iterations

    def start(self, name: str) -> Adapter:
        """The weights a new policy begins with: its expert's, made now if nobody trains it yet.

        Raises CoordinatorUnavailableError, RefusedError or FederationError: there is no beginning without them.
        """
        link = self._links[name]
        if not link.begun:
            link.register(self._client)
        return link.adapter(link.begin(self._client))

    def state(self) -> dict[str, object]:
        """What a checkpoint has to remember, as JSON; see `rejoin`."""
        return {name: link.mark for name, link in self._links.items()}

    def rejoin(self, saved: Mapping[str, object]) -> bool:
        """After a checkpoint was restored, and before anything is sampled: whether it was behind the coordinator.

        What was handed over or taken in after the checkpoint must be neither learned nor sent again, so such policies
        go on from the weights they had then. Needs no coordinator. Raises FederationError if the state folder is not
        the one that the checkpoint was made with.
        """
        behind = [name for name, link in self._links.items() if _behind(link, saved.get(name))]
        for name in behind:
            link = self._links[name]
            self._policies.adopt(name, link.adapter(link.newest_local()))
            _log.info("policy_newer_than_checkpoint", policy=name)
        return bool(behind)

    def exchange(self, memory: ModeMemory, iteration: int) -> None:
        """Push what the policies have learned, take over what others have, and meet their newest experts.

        A coordinator that is away is logged once and tried again the next time.
        """
        early = time.monotonic() - self._exchanged_at < self._least_seconds
        if early and iteration < self._iterations:
            return
        try:
            self._exchange(memory)
        except CoordinatorUnavailableError as error:
            self._trouble(error)
            return
        finally:
            self._policies.let_go([opponent.key for opponent in memory.opponents.opponents if opponent.key])
        self._exchanged_at = time.monotonic()
        if not any(link.under_way for link in self._links.values()):
            with self._telling:
                was_away, self._away = self._away, False
            if was_away:
                _log.info("coordinator_back", url=self._client.url)

    def _exchange(self, memory: ModeMemory) -> None:
        # Also the cheapest way to learn that nobody is there.
        self._least_seconds = self._client.federation().min_sync_interval
        self._failures = 0
        idle = [name for name in self._links if not self._send(name)]
        self._await_answers()
        for name, link in self._links.items():
            local = self._policies.adapter(name).flat
            with _refusals_logged(name):
                newest = link.refresh(self._client, local) if name in idle else link.take_in(local)
                if newest is not None:
                    self._policies.adopt(name, link.adapter(newest))
        self._meet(memory)

    def _send(self, name: str) -> bool:
        link = self._links[name]
        with _refusals_logged(name):
            link.register(self._client)
            local = self._policies.adapter(name).flat
            return link.send(self._client, local, self._policies.updates(name), self._trouble)
        return True

    def _await_answers(self) -> None:
        deadline = time.monotonic() + self._patience
        for link in self._links.values():
            while not link.wait(_TICK_SECONDS):
                if time.monotonic() > deadline or self._failures >= _BEARABLE_FAILURES:
                    return

    def meet(self, memory: ModeMemory) -> None:
        """Take in the newest experts of other sites as opponents; a coordinator that is away is logged once."""
        try:
            self._meet(memory)
        except CoordinatorUnavailableError as error:
            self._trouble(error)

    def _meet(self, memory: ModeMemory) -> None:
        if not self._section.opponents:
            return
        pool = memory.opponents.opponents
        held = {each.key.name: each.key for each in pool if each.key and each.kind == "foreign"}
        # Version 0 is the base model, which is an opponent anyway.
        foreign = [
            each for each in self._client.list_experts().experts if each.name not in self._links and each.version
        ]
        foreign.sort(key=lambda expert: (expert.name not in held, expert.name))
        for expert in foreign[:MOST_OPPONENTS]:
            key = held.get(expert.name)
            # By content: a coordinator that was restored gives numbers it gave before to other weights.
            if key is None or self._digest(key) != expert.digest:
                with _refusals_logged(expert.name):
                    self._take_opponent(memory, expert.name, key)
        left_out = {expert.name for expert in foreign[MOST_OPPONENTS:]}
        if left_out - self._left_out:
            _log.warning("opponents_left_out", most=MOST_OPPONENTS, names=", ".join(sorted(left_out)))
        self._left_out |= left_out

    def _digest(self, key: AdapterKey) -> str | None:
        """The content hash of an opponent's weights; None where they are not held."""
        adapter = self._policies.adapters().get(key)
        if adapter is None:
            return None
        if key not in self._digests:
            self._digests[key] = digest(adapter)
        return self._digests[key]

    def _take_opponent(self, memory: ModeMemory, name: str, held: AdapterKey | None) -> None:
        pulled = self._client.pull_expert(name, expected=ExpectedWeights(self._manifest))
        assert pulled is not None, "without an ETag there is always an answer"
        # A key is never used for other weights, so its number rises even where the coordinator's went back.
        key = AdapterKey(name, max(pulled.version, held.version + 1 if held else 0))
        if held is not None:
            self._digests.pop(held, None)
        self._policies.hold(key, pulled.adapter)
        for earlier in memory.opponents.add_foreign(key):
            # A little stronger or weaker than before, so its games still say something; `let_go` unloads it.
            if str(earlier) in memory.ratings:
                memory.ratings.copy_of(str(key), str(earlier))
                memory.ratings.remove(str(earlier))
        _log.info("opponent_pulled", expert=name, version=pulled.version, digest=pulled.digest[:12])

    def _trouble(self, error: CoordinatorUnavailableError) -> None:
        """Also called by deliveries, from their threads."""
        with self._telling:
            self._failures += 1
            was_away, self._away = self._away, True
        if not was_away:
            _log.warning("coordinator_away", reason=str(error), then="training goes on; updates go later")

    def leave(self) -> None:
        """Hand over what has still to travel; call it before the last checkpoint, and `close` waits for the answers."""
        self._leaving = True
        self._failures = 0
        for name, link in self._links.items():
            if link.begun:
                with _refusals_logged(name):
                    local = self._policies.adapter(name).flat
                    link.send(self._client, local, self._policies.updates(name), self._trouble)

    def close(self) -> None:
        """Give folders and connections back; an update that was not answered goes at the next start."""
        if self._leaving:
            self._await_answers()
        pending = [name for name, link in self._links.items() if link.close()]
        if pending:
            _log.warning("left_with_updates", policies=", ".join(pending), then="resume the run to deliver them")
        self._client.close()


@contextmanager
def _refusals_logged(expert: str) -> Iterator[None]:
    """Log a refusal that concerns one expert, and let the others go on."""
    try:
        yield
    except (RefusedError, FederationError, EngineError) as error:
        code = error.code if isinstance(error, RefusedError) else type(error).__name__
        _log.warning("federation_refused", expert=expert, code=code, reason=str(error))


def _behind(link: ExpertLink, saved: object) -> bool:
    """Whether something was handed over or taken in after the mark `saved`; refuses a folder that is not its own."""
    if not isinstance(saved, list) or not link.begun or saved[0] != link.mark[0] or saved[1:] > link.mark[1:]:
        raise FederationError(
            f"the state folder of {link.expert} is not the one this checkpoint was made with, so what the coordinator "
            "knows of it is not known here; restore RUN/federation, or begin anew with --fresh"
        )
    return saved != link.mark


def learning_rate_only(rules: AdaptRules, shape: PolicySection) -> AdaptRules:
    """The same rules, but rank and scale stay what they are: they are part of what all sites have agreed on."""
    scale = shape.scaled_alpha / shape.rank
    return replace(rules, min_scale=scale, max_scale=scale, max_rank=shape.rank)


def join_league(
    client: CoordinatorClient,
    section: FederationSection,
    shape: PolicySection,
    iterations: int,
    base: LoadedBase,
    policies: Policies,
    folder: Path,
    patience: float = PATIENCE,
) -> League:
    """Join the federation of a coordinator over a connection that the league takes over.

    `folder` keeps what must survive, for each policy; `iterations`: of the whole run; `patience`: seconds that an
    exchange waits at most. Raises FederationError if the coordinator's experts are of another kind than the policies,
    RefusedError for a wrong token, OutboxError for a folder in use. A coordinator that is away is logged: a resumed
    run can do without for now.
    """
    manifest = Manifest(base.identity, policies.learner.layout(shape.rank), shape.scaled_alpha)
    links: dict[str, ExpertLink] = {}
    try:
        _check_manifest(client, manifest)
        for name in shape.all_names:
            links[name] = ExpertLink(folder / name, section.worker_id, name, manifest)
    except BaseException:
        for link in links.values():
            link.close()
        client.close()
        raise
    return League(section, iterations, client, manifest, policies, links, patience)


def _check_manifest(client: CoordinatorClient, manifest: Manifest) -> None:
    try:
        theirs = client.federation().manifest
    except CoordinatorUnavailableError as error:
        _log.warning("coordinator_away", reason=str(error))
        return
    expected = theirs.manifest() if theirs else manifest
    differences = expected.differences(manifest)
    if differences:
        raise FederationError(
            f"the experts of {client.url} are of another kind than the policies of this run: "
            f"{'; '.join(differences[:5])}. Set base_model ({expected.base.name}), policies.rank "
            f"({expected.layout.rank}) and policies.alpha ({expected.alpha:g}) as the coordinator has them"
        )
