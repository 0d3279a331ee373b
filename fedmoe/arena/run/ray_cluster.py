"""The Ray cluster of a run: one that is there, or one of its own on loopback; with the room that actors need."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import structlog

from fedmoe.inference.engine import EngineError

#: To connect: Ray itself tries a dead address for minutes.
_CONNECT_SECONDS = 60.0
#: Until other work of the cluster makes room; the actors are placed all or none.
_PLACE_SECONDS = 60.0
_STARTS = 3
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
#: Ray's public interface, in a process that can be ended: it does not listen to signals while it connects.
_PROBE = """
import json, sys
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
print(json.dumps(ray.cluster_resources()))
"""
_log = structlog.get_logger("fedmoe.arena")


@dataclass(frozen=True, slots=True)
class ActorNeeds:
    """What `actors` actors need: CPUs, which are threads, and GPUs of each."""

    actors: int
    cpus: int
    gpus: float

    @property
    def bundle(self) -> dict[str, float]:
        """One actor's resources in Ray's words."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    def missing(self, resources: Mapping[str, float]) -> str:
        """What a cluster of these resources has too little of, in words; "" where it has enough."""
        short = [
            f"{self.actors} x {each:g} {kind}s, it has {resources.get(kind, 0.0):g}"
            for kind, each in self.bundle.items()
            if resources.get(kind, 0.0) < self.actors * each - 1e-6
        ]
        return "; ".join(short)


def gpus_beside(learner: int | None, visible: Sequence[str]) -> list[str]:
    """The GPUs that a cluster of the run's own may hand out: all but the learner's, where there are others."""
    others = [name for index, name in enumerate(visible) if index != learner]
    return others or list(visible)


@contextmanager
def ray_cluster(address: str | None, needs: ActorNeeds, gpus: Sequence[str]) -> Iterator[Any]:
    """The module `ray`, connected to `address` (`auto`: the one that runs here) or to a local cluster of its own.

    A local cluster listens on loopback only, has no dashboard, sends no statistics and hands out `gpus`. A program that
    is connected already keeps its connection. Raises EngineError without Ray, without a cluster at the address, and
    where it could never have room for the actors.
    """
    ray = _imported(local=address is None)
    if address is None and ray.is_initialized():
        _check_room(needs, ray.cluster_resources())
        yield ray
        return
    if address is not None:
        _check_room(needs, _probed(address))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if address is None:
            _start_local(ray, needs, gpus)
        else:
            ray.init(address, **_QUIET)
    finally:
        # Ray takes over SIGTERM; a run ends in order at it.
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        addresses = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
        _log.info("ray_cluster", nodes=len(addresses), address=addresses[0], resources=needs.bundle)
        yield ray
    finally:
        ray.shutdown()


def _imported(local: bool) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if local:
        # Read when Ray is imported: without it a node takes the machine's outer address, whatever it is told, and its
        # servers listen on all addresses.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # Ray's default of 15 leaves actors nothing where anything else computes, the learner for example.
        os.environ.setdefault("RAY_worker_niceness", "0")
        if "RAY_AUTH_MODE" not in os.environ:
            # A token of this process and its children; Ray would write one into the home folder.
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    try:
        import ray
    except ModuleNotFoundError as error:
        raise EngineError(
            "[engine] actors needs Ray, which is not installed; run: pip install 'fedmoe[ray]'"
        ) from error
    return ray


def _start_local(ray: Any, needs: ActorNeeds, gpus: Sequence[str]) -> None:
    """A cluster on this machine with a CPU for every thread of the actors, also where cores are fewer."""
    cores, threads = os.cpu_count() or 1, needs.actors * needs.cpus
    if threads > cores:
        _log.warning("actors_share_cores", actors=needs.actors, threads=threads, cores=cores)
    _check_room(needs, {"CPU": threads, "GPU": len(gpus)})
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    resources = {"num_cpus": max(cores, threads), "num_gpus": len(gpus)}
    try:
        _started(lambda: ray.init("local", **resources, include_dashboard=False, **_QUIET))
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def _started(start: Callable[[], object]) -> None:
    """Start a cluster; again if need be, since Ray gives its processes no more than half a minute."""
    for attempt in range(1, _STARTS + 1):
        try:
            start()
            return
        except Exception as error:  # Ray raises nothing more special
            _log.warning("ray_start_failed", attempt=attempt, reason=str(error)[:300])
            reason = error
    raise EngineError(
        f"no Ray cluster could be started here, the last time by: {str(reason)[:300]}; see Ray's logs "
        "(session_latest in its temporary folder), and try again when the machine is less busy"
    ) from reason


def _check_room(needs: ActorNeeds, resources: Mapping[str, float]) -> None:
    if missing := needs.missing(resources):
        raise EngineError(
            f"the Ray cluster is too small for [engine] actors = {needs.actors}: they need {missing}; start "
            "fewer actors, or add nodes first"
        )


def _probed(address: str) -> dict[str, float]:
    """The resources of the cluster at an address."""
    command = [sys.executable, "-c", _PROBE, address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_CONNECT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise EngineError(
            f"no Ray cluster answers at {address} within {_CONNECT_SECONDS:g} s; check --ray-address, that `ray "
            "status` works from this machine, and RAY_AUTH_TOKEN"
        ) from error
    if done.returncode:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise EngineError(
            f"no Ray cluster can be used at {address}: {last[:500]}; check --ray-address, or leave it out"
        )
    resources: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return resources


@contextmanager
def reserved(ray: Any, needs: ActorNeeds) -> Iterator[Any]:
    """Room for all actors at once, as a placement group; it stays theirs when one of them dies.

    Raises EngineError where other work takes it for a minute.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([needs.bundle] * needs.actors, strategy="PACK")
    try:
        if not group.wait(_PLACE_SECONDS):
            free = {kind: ray.available_resources().get(kind, 0.0) for kind in needs.bundle}
            raise EngineError(
                f"{needs.actors} actors of {needs.bundle} found no place within {_PLACE_SECONDS:g} s; free are {free} "
                "on all nodes together; end other work of the cluster, or start fewer actors"
            )
        yield group
    finally:
        remove_placement_group(group)
