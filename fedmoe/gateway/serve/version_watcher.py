"""Watches a coordinator: newer versions are fetched, loaded, then served; a failed version changes nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog

from fedmoe.gateway.serve.auto_model import PromptRouter
from fedmoe.gateway.serve.catalogue import GATEWAY, RESERVED, Catalogue
from fedmoe.inference.backend import Backend, BackendError, ServedModel
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.manifest import BaseModel
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError, PulledExpert, PulledGateway
from fedmoe.wire.contract.experts import ExpertListing

_log = structlog.get_logger("fedmoe.serve")

_LONGEST_PAUSE = 60.0


@dataclass(frozen=True, slots=True)
class UpdateFailure:
    """Why a name was not brought up to date, how often in a row that failed, and when it is tried again."""

    why: str
    times: int
    retry_at: float


@dataclass(frozen=True, slots=True)
class WatchHealth:
    """How well the coordinator is followed: seconds since it last answered, and what is not up to date, by name."""

    seconds_since_answer: float
    behind: Mapping[str, str]


class VersionWatcher:
    """Keeps a catalogue up to date, in a thread of its own after `start`; unloads what nobody uses any more.

    `base` is the base model served: weights for another one are refused. `poll_seconds` lie between two questions. A
    `router` gets the prompt statistics of the experts that are served.
    """

    def __init__(
        self,
        source: CoordinatorClient,
        catalogue: Catalogue,
        backend: Backend,
        base: BaseModel,
        poll_seconds: float = 2.0,
        clock: Callable[[], float] = time.time,
        router: PromptRouter | None = None,
    ) -> None:
        self._source, self._catalogue, self._backend, self._base = source, catalogue, backend, base
        self._poll_seconds, self._clock, self._router = poll_seconds, clock, router
        self._prompts: dict[str, str] = {}
        self._unrouted: Mapping[str, str] = {}
        self._route_again = 0.0
        self._failures: dict[str, UpdateFailure] = {}
        self._answered = clock()
        self._unreachable: str | None = None
        self._reserved: frozenset[str] = frozenset()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def start(self) -> None:
        """Follow from now on; call `poll` before, so that there is something to serve."""
        self._thread.start()

    def close(self) -> None:
        """Stop following; what is served stays."""
        self._stop.set()
        self._catalogue.wake()
        if self._thread.is_alive():
            self._thread.join()

    def health(self) -> WatchHealth:
        """How well the coordinator is followed."""
        behind = {f"prompts of {name}": why for name, why in self._unrouted.items()}
        behind |= {name: failure.why for name, failure in self._failures.items()}
        if self._unreachable is not None:
            behind["coordinator"] = self._unreachable
        return WatchHealth(self._clock() - self._answered, behind)

    def poll(self) -> None:
        """Ask once and serve what is new; raises what the coordinator's client raises when the listing fails."""
        listing = self._source.list_experts()
        listed = self._listed(listing)
        self._answered = self._clock()
        changed = self._catalogue.snapshot.changed(listed)
        loaded = {name: model for name in changed if (model := self._load_newest(name, listed[name][0])) is not None}
        behind = set(changed) - loaded.keys()
        self._failures = {name: failure for name, failure in self._failures.items() if name in behind}
        before = self._catalogue.snapshot.models
        models = {name: model for name, model in {**before, **loaded}.items() if name in listed}
        if models != before:
            self._catalogue.publish(models, self._clock())
            _log.info("serving", **{name: str(model) for name, model in sorted(loaded.items())})
        self._follow_prompts(listing)
        self.sweep()

    def sweep(self) -> None:
        """Unload what nobody uses any more."""
        for model in self._catalogue.retired():
            try:
                self._backend.unload(model)
            except BackendError as error:
                _log.error("unload_failed", model=str(model), reason=str(error))

    def _follow_prompts(self, listing: ExpertListing) -> None:
        """Give the router the statistics of the experts that are served, where they changed or could not be had."""
        if self._router is None:
            return
        served = self._catalogue.snapshot.models.keys() - RESERVED
        prompts = {e.name: e.prompts for e in listing.experts if e.prompts is not None and e.name in served}
        if prompts == self._prompts and not (self._unrouted and self._clock() >= self._route_again):
            return

        def fetch(expert: str) -> bytes:
            return self._source.data_statistics(expert, "prompts")

        self._unrouted = self._router.follow(prompts, fetch)
        self._prompts, self._route_again = prompts, self._clock() + _LONGEST_PAUSE

    def _listed(self, listing: ExpertListing) -> dict[str, tuple[int, str]]:
        """Version and digest of every model that can be served, by name."""
        reserved = RESERVED & {expert.name for expert in listing.experts}
        if reserved - self._reserved:
            _log.warning("name_means_something_else", experts=sorted(reserved), fix="register them under other names")
        self._reserved |= reserved
        models = {e.name: (e.version, e.digest) for e in listing.experts if e.name not in RESERVED}
        if listing.gateway is not None:
            # One that is not merged yet has no digest: it counts as changed, and pulling it has it merged.
            models[GATEWAY] = (listing.gateway.version, listing.gateway.digest or "")
        return models

    def _load_newest(self, name: str, version: int) -> ServedModel | None:
        """The newest version of `name`, at least `version`, loaded; None if that failed, which is tried again later."""
        failure = self._failures.get(name)
        if failure is not None and self._clock() < failure.retry_at:
            return None
        try:
            model, adapter = self._pull(name, version)
            if model not in self._backend.loaded():
                self._backend.load(model, adapter)
        except (BackendError, CoordinatorUnavailableError, RefusedError) as error:
            times, why = failure.times + 1 if failure else 1, str(error)
            if failure is None or failure.why != why:
                _log.warning("not_up_to_date", model=name, reason=why)
            pause = min(_LONGEST_PAUSE, self._poll_seconds * 2**times)
            self._failures[name] = UpdateFailure(why, times, self._clock() + pause)
            return None
        return model

    def _pull(self, name: str, version: int) -> tuple[ServedModel, Adapter]:
        pulled: PulledGateway | PulledExpert | None
        pulled = self._source.pull_gateway() if name == GATEWAY else self._source.pull_expert(name)
        assert pulled is not None, "without an ETag there is always an answer"
        if isinstance(pulled, PulledGateway):
            base = pulled.base.get("weights_hash"), pulled.base.get("tokenizer_hash")
        else:
            base = pulled.manifest.base.weights_hash, pulled.manifest.base.tokenizer_hash
        if pulled.version < version:
            raise BackendError(f"the coordinator lists {name} at version {version} and sent {pulled.version}")
        if base != (self._base.weights_hash, self._base.tokenizer_hash):
            raise BackendError(
                f"{name} version {pulled.version} belongs on the base model {str(base[0])[:16]}, served is "
                f"{self._base.name} ({self._base.weights_hash[:16]}); start with the federation's --base-model"
            )
        return ServedModel(name, pulled.version, pulled.digest), pulled.adapter

    def _run(self) -> None:
        due = time.monotonic() + self._poll_seconds
        while not self._stop.is_set():
            self._catalogue.await_retired(max(0.0, due - time.monotonic()))
            if self._stop.is_set():
                return
            if time.monotonic() < due:
                self.sweep()
                continue
            self._poll_safely()
            due = time.monotonic() + self._poll_seconds

    def _poll_safely(self) -> None:
        """Poll; log a coordinator that is lost or found again once, and keep the reason for `health`."""
        try:
            self.poll()
        except (CoordinatorUnavailableError, RefusedError) as error:
            if self._unreachable is None:
                _log.warning("coordinator_lost", reason=str(error), serving="what was there before")
            self._unreachable = str(error)
        except Exception as error:  # nothing may end this thread: the server would serve old versions and not say so
            _log.error("follower_failed", error=repr(error))
            self._unreachable = f"following failed: {error!r}"
        else:
            if self._unreachable is not None:
                _log.info("coordinator_found")
            self._unreachable = None
