"""Federation meets arena: policies are experts of a coordinator, experts of other sites are opponents.

    site A                               coordinator                             site B
    policy solver   -- its updates -->   expert solver, version rises   -->      opponent solver@7, frozen
    opponent critic@4, frozen      <--   expert critic, version rises   <-- its updates --   policy critic

Two sites may also train the same expert: each pushes what it learned and goes on from what both have learned. The
coordinator being away never stops the training: what has to travel waits on disk (see `federation_link`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import structlog

from fedmoe.arena.config import ArenaConfig, FederationSection, PolicySection
from fedmoe.arena.league.link import FederationError, Link
from fedmoe.arena.learning.adapt import AdaptRules
from fedmoe.arena.learning.policies import Policies
from fedmoe.arena.modes.memory import ModeMemory
from fedmoe.arena.trainer import Trainer
from fedmoe.inference.engine import AdapterKey, EngineError
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.codec import digest
from fedmoe.lora.manifest import Manifest
from fedmoe.models.base import LoadedBase
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError, Expected

__all__ = ["MOST_OPPONENTS", "FederationError", "League", "join_league", "learning_rate_only"]

#: Experts of other sites that are held as opponents at once; each takes the memory of an adapter.
MOST_OPPONENTS = 8
#: How long an exchange waits for the answers to its updates, in seconds; after that they are delivered meanwhile.
PATIENCE = 20.0
# So many tries in a row without an answer, and the exchange is left for later.
_BEARABLE_FAILURES = 3
_TICK_SECONDS = 0.05
_log = structlog.get_logger("fedmoe.arena")


class League:
    """What a run has to do with the coordinator; used by one thread, the one that learns.

    While `exchange` runs nothing may be sampled: it gives policies other weights and lets opponents go.
    """

    def __init__(
        self,
        section: FederationSection,
        iterations: int,
        client: CoordinatorClient,
        manifest: Manifest,
        policies: Policies,
        links: Mapping[str, Link],
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._section = section
        self._iterations = iterations
        self._client = client
        self._manifest = manifest
        self._policies = policies
        self._links = links
        self._patience = patience
        self._clock = clock
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

    def exchange(self, trainer: Trainer) -> None:
        """Push what the policies have learned, take over what others have, and meet their newest experts.

        A coordinator that is away is told once and tried again the next time.
        """
        early = self._clock() - self._exchanged_at < self._least_seconds
        if early and trainer.iteration < self._iterations:
            return
        try:
            self._exchange(trainer)
        except CoordinatorUnavailableError as error:
            self._trouble(error)
            return
        finally:
            trainer.let_go()
        self._exchanged_at = self._clock()
        if not any(link.under_way for link in self._links.values()):
            self._back()

    def _exchange(self, trainer: Trainer) -> None:
        # Also the cheapest way to learn that nobody is there.
        self._least_seconds = self._client.federation().min_sync_interval
        self._failures = 0
        idle = [name for name in self._links if not self._send(name)]
        self._await_answers(self._patience)
        for name, link in self._links.items():
            local = self._policies.adapter(name).flat
            with _Tolerance(name):
                newest = link.refresh(self._client, local) if name in idle else link.take_in(local)
                if newest is not None:
                    self._policies.adopt(name, link.adapter(newest))
        self._meet(trainer.society)

    def _send(self, name: str) -> bool:
        link = self._links[name]
        with _Tolerance(name):
            link.register(self._client)
            local = self._policies.adapter(name).flat
            return link.send(self._client, local, self._policies.updates(name), self._trouble)
        return True

    def _await_answers(self, seconds: float) -> None:
        deadline = self._clock() + seconds
        for link in self._links.values():
            while not link.wait(_TICK_SECONDS):
                if self._clock() > deadline or self._failures >= _BEARABLE_FAILURES:
                    return

    def meet(self, society: ModeMemory) -> None:
        """Take in the newest experts of other sites as opponents; a coordinator that is away is told once."""
        try:
            self._meet(society)
        except CoordinatorUnavailableError as error:
            self._trouble(error)

    def _meet(self, society: ModeMemory) -> None:
        if not self._section.opponents:
            return
        known = {one.key.name: one.key for one in society.opponents.opponents() if one.key and one.kind == "foreign"}
        # Version 0 is the base model, which is an opponent anyway.
        listed = [one for one in self._client.list_experts().experts if one.name not in self._links and one.version]
        chosen = sorted(listed, key=lambda one: (one.name not in known, one.name))
        for one in chosen[:MOST_OPPONENTS]:
            held = known.get(one.name)
            # By content: a coordinator that was restored gives numbers it gave before to other weights.
            if held is None or self._digest(held) != one.digest:
                with _Tolerance(one.name):
                    self._take_opponent(society, one.name, held)
        left_out = {one.name for one in chosen[MOST_OPPONENTS:]}
        if left_out - self._left_out:
            _log.warning("opponents_left_out", most=MOST_OPPONENTS, names=", ".join(sorted(left_out)))
        self._left_out |= left_out

    def _digest(self, key: AdapterKey) -> str | None:
        """The content hash of an opponent's weights; None where they are not held."""
        adapter = self._policies.kept().get(key)
        if adapter is None:
            return None
        if key not in self._digests:
            self._digests[key] = digest(adapter)
        return self._digests[key]

    def _take_opponent(self, society: ModeMemory, name: str, held: AdapterKey | None) -> None:
        pulled = self._client.pull_expert(name, expected=Expected(self._manifest))
        assert pulled is not None, "without an ETag there is always an answer"
        # A key is never used for other weights, so its number rises even where the coordinator's went back.
        key = AdapterKey(name, max(pulled.version, held.version + 1 if held else 0))
        if held is not None:
            self._digests.pop(held, None)
        self._policies.hold(key, pulled.adapter)
        for earlier in society.opponents.add_foreign(key):
            # A little stronger or weaker than before, so its games still say something; `let_go` unloads it.
            if str(earlier) in society.ratings:
                society.ratings.copy_of(str(key), str(earlier))
                society.ratings.remove(str(earlier))
        _log.info("opponent_pulled", expert=name, version=pulled.version, digest=pulled.digest[:12])

    def _trouble(self, error: CoordinatorUnavailableError) -> None:
        """Also called by deliveries, from their threads."""
        with self._telling:
            self._failures += 1
            told, self._away = self._away, True
        if not told:
            _log.warning("coordinator_away", reason=str(error), then="training goes on; updates go later")

    def _back(self) -> None:
        with self._telling:
            was_away, self._away = self._away, False
        if was_away:
            _log.info("coordinator_back", url=self._client.url)

    def leave(self) -> None:
        """Hand over what has still to travel; call it before the last checkpoint, and `close` waits for the answers."""
        self._leaving = True
        self._failures = 0
        for name, link in self._links.items():
            if link.begun:
                with _Tolerance(name):
                    local = self._policies.adapter(name).flat
                    link.send(self._client, local, self._policies.updates(name), self._trouble)

    def close(self) -> None:
        """Give folders and connections back; an update that was not answered goes at the next start."""
        if self._leaving:
            self._await_answers(self._patience)
        left = [name for name, link in self._links.items() if link.close()]
        if left:
            _log.warning("left_with_updates", policies=", ".join(left), then="resume the run to deliver them")
        self._client.close()


class _Tolerance:
    """Around what concerns one expert: its refusal is told, and the others go on."""

    def __init__(self, expert: str) -> None:
        self._expert = expert

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, RefusedError | FederationError | EngineError):
            return False
        code = error.code if isinstance(error, RefusedError) else type(error).__name__
        _log.warning("federation_refused", expert=self._expert, code=code, reason=str(error))
        return True


def _behind(link: Link, saved: object) -> bool:
    """Whether something was handed over or taken in after the mark `saved`; refuses a folder that is not its own."""
    if not isinstance(saved, list) or not link.begun or saved[0] != link.mark[0] or saved[1:] > link.mark[1:]:
        raise FederationError(
            f"the state folder of {link.expert} is not the one this checkpoint was made with, so what the coordinator "
            "knows of it cannot be told; restore RUN/federation, or begin anew with --fresh"
        )
    return saved != link.mark


def learning_rate_only(rules: AdaptRules, shape: PolicySection) -> AdaptRules:
    """The same rules, but rank and scale stay what they are: they are part of what all sites have agreed on."""
    scale = _alpha(shape) / shape.rank
    return replace(rules, min_scale=scale, max_scale=scale, max_rank=shape.rank)


def _alpha(shape: PolicySection) -> float:
    return shape.scaled_alpha


def join_league(config: ArenaConfig, token: str | None, base: LoadedBase, policies: Policies, folder: Path) -> League:
    """Connect to the coordinator of `config.federation`; `folder` keeps what must survive, for each policy.

    Raises FederationError if its experts are of another kind than the policies, RefusedError for a wrong token,
    OutboxError for a folder in use. A coordinator that is away is told: a resumed run can do without for now.
    """
    if config.federation is None:
        raise ValueError("the configuration has no [federation] with the url of a coordinator")
    return join_through(
        CoordinatorClient(config.federation.url, token), config, config.federation, base, policies, folder
    )


def join_through(
    client: CoordinatorClient,
    config: ArenaConfig,
    section: FederationSection,
    base: LoadedBase,
    policies: Policies,
    folder: Path,
    patience: float = PATIENCE,
) -> League:
    """As `join_league`, over a connection that the league takes over; an exchange waits `patience` seconds at most."""
    shape = config.policies
    manifest = Manifest(base.identity, policies.learner.layout(shape.rank), _alpha(shape))
    links: dict[str, Link] = {}
    try:
        _check_manifest(client, manifest)
        for name in shape.all_names:
            links[name] = Link(folder / name, section.worker_id, name, manifest)
    except BaseException:
        for link in links.values():
            link.close()
        client.close()
        raise
    return League(section, config.iterations, client, manifest, policies, links, patience)


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
