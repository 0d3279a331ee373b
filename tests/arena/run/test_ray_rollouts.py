"""Rollouts by real Ray actors on loopback: the same numbers as in this process, whoever dies on the way."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from arena_process import ArenaProcess
from builders import random_adapter
from tiny_arena import curve, tiny_config

from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.run import checkpoint, ray_cluster
from fedmoe.arena.run.ray_cluster import ActorNeeds, reserved
from fedmoe.arena.run.ray_rollouts import rollout_engine
from fedmoe.inference.engine import AdapterKey, Engine, EngineError, Sample, SampleRequest
from fedmoe.inference.verify import Probe, verify_sync
from fedmoe.lora.adapter import Layout, ModuleShape
from fedmoe.lora.codec import digest
from fedmoe.models.base import LoadedBase, load_base
from fedmoe.models.multilora import MultiLora

pytestmark = [
    pytest.mark.scale,
    pytest.mark.timeout(1800),
    # Ray leaves files and sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

CPUS = 4
#: Seconds; every actor imports torch, beside whatever else the machine does.
PATIENCE = 600
KEYS = tuple(AdapterKey(name, 0) for name in ("ann", "bob", "cy"))
PROBES = (Probe(tuple(range(60, 70)), (65, 66, 67)), Probe((97, 98, 99), (70, 80)))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def named(process: psutil.Process, *names: str) -> list[psutil.Process]:
    """The descendants of a process whose names begin so."""
    found = []
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [child] if child.name().startswith(names) else []
    return found


def node_of(pid: int) -> list[psutil.Process]:
    """What of a run's own cluster computes and listens; two agents of Ray's go some minutes after these."""
    node = named(psutil.Process(pid), "ray::RolloutAct", "raylet", "gcs_server")
    assert len(node) >= 3
    return node


@pytest.fixture(scope="module")
def loopback() -> Iterator[dict[str, str]]:
    """Ray on loopback, with a token of its own, in this process and those that it starts."""
    settings = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        # Only now: Ray reads some of them when it is imported.
        pytest.importorskip("ray", reason="Ray is not installed: pip install 'fedmoe[ray]'")
        yield settings


@pytest.fixture(scope="module")
def cluster(loopback: dict[str, str]) -> Iterator[str]:
    """The address of a cluster of one node with four CPUs, started as an operator starts one."""
    port = free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    options = ["--num-cpus", str(CPUS), "--num-gpus", "0", "--port", str(port), "--include-dashboard", "false"]
    node = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert node.poll() is None, "the node ended"
            assert time.monotonic() < deadline, "the node does not listen"
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        node.send_signal(signal.SIGTERM)
        try:
            node.wait(60)
        except subprocess.TimeoutExpired:
            for process in psutil.Process(node.pid).children(recursive=True):
                process.kill()
            node.kill()


@pytest.fixture(scope="module")
def model() -> tuple[LoadedBase, MultiLora]:
    base = load_base("tiny", "cpu", "fp32")
    return base, MultiLora(base.model)


def config(actors: int) -> ArenaConfig:
    return ArenaConfig.model_validate({"base_model": "tiny", "engine": {"actors": actors, "rows": 4}})


def load_all(engine: Engine, multi: MultiLora) -> None:
    for seed, key in enumerate(KEYS):
        engine.load(key, random_adapter(multi.layout(4), seed, 0.1))


def asked() -> list[SampleRequest]:
    lengths = np.random.default_rng(0).integers(3, 20, 22)
    keys = (*KEYS, None)
    return [
        SampleRequest(keys[index % 4], tuple(range(60, 60 + int(length))), 8, 1.0, index)
        for index, length in enumerate(lengths)
    ]


def bits(samples: list[Sample]) -> list[tuple[tuple[int, ...], bytes, bool]]:
    return [(sample.tokens, sample.logprobs.tobytes(), sample.stopped) for sample in samples]


@pytest.fixture(scope="module")
def alone(model: tuple[LoadedBase, MultiLora], tmp_path_factory: pytest.TempPathFactory) -> object:
    """What the engine in this process samples."""
    base, multi = model
    with rollout_engine(config(0), tmp_path_factory.mktemp("run"), base, multi, base.device) as engine:
        load_all(engine, multi)
        return bits(engine.sample(asked()))


@pytest.mark.parametrize("actors", [1, 2, 4])
def test_the_number_of_actors_changes_no_bit_also_when_one_is_killed(
    actors: int, cluster: str, model: tuple[LoadedBase, MultiLora], alone: object, tmp_path: Path
) -> None:
    base, multi = model
    with rollout_engine(config(actors), tmp_path, base, multi, base.device, cluster) as engine:
        load_all(engine, multi)
        assert bits(engine.sample(asked())) == alone
        references = [engine.score(KEYS[0], probe.prompt, probe.tokens) for probe in PROBES]
        assert verify_sync(engine, references, KEYS[0], PROBES, 1e-4).largest_gap == 0.0
        if actors == 2:
            everyone = [process for process in psutil.process_iter() if process.name().startswith("ray::Rollout")]
            assert len(everyone) == actors
            everyone[0].kill()
            assert bits(engine.sample(asked())) == alone
        with pytest.raises(EngineError, match=r"rollout actor \d: adapter .dee@0. adapts other modules"):
            engine.load(AdapterKey("dee", 0), random_adapter(Layout((ModuleShape("nowhere", 4, 4),), 2), 1, 0.1))
        assert engine.loaded() == set(KEYS)


def test_a_cluster_that_is_too_small_or_not_there_is_refused_in_words(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(EngineError, match=r"too small for \[engine\] actors = 5: they need 5 x 1 CPUs, it has 4; start"),
        ray_cluster.ray_cluster(cluster, ActorNeeds(5, 1, 0.0), []),
    ):
        pass
    with (
        pytest.raises(EngineError, match=r"they need 1 x 1 GPUs, it has 0; start fewer actors"),
        ray_cluster.ray_cluster(cluster, ActorNeeds(1, 1, 1.0), []),
    ):
        pass
    with (
        pytest.raises(EngineError, match=r"no Ray cluster can be used at nowhere: .*Invalid address format"),
        ray_cluster.ray_cluster("nowhere", ActorNeeds(1, 1, 0.0), []),
    ):
        pass
    monkeypatch.setattr(ray_cluster, "_CONNECT_SECONDS", 8.0)
    with (
        pytest.raises(EngineError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 within 8 s; check --ray-address"),
        ray_cluster.ray_cluster("127.0.0.1:1", ActorNeeds(1, 1, 0.0), []),
    ):
        pass


def test_room_that_others_have_taken_is_not_waited_for_without_end(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with ray_cluster.ray_cluster(cluster, ActorNeeds(3, 1, 0.0), []) as ray:
        assert signal.getsignal(signal.SIGTERM) is handler
        with reserved(ray, ActorNeeds(3, 1, 0.0)):
            monkeypatch.setattr(ray_cluster, "_PLACE_SECONDS", 3.0)
            with (
                pytest.raises(EngineError, match=r"2 actors of \{'CPU': 1\} found no place within 3 s; free are"),
                reserved(ray, ActorNeeds(2, 1, 0.0)),
            ):
                pass


def digests(run: ArenaProcess) -> dict[str, str]:
    newest = checkpoint.load_newest(run.folder / "checkpoints")
    assert newest is not None
    return {key: digest(adapter) for key, adapter in newest.state.adapters.items()}


@pytest.mark.usefixtures("loopback")
def test_a_run_whose_actors_and_learner_are_killed_is_the_run_of_one_process(tmp_path: Path) -> None:
    plain = tiny_config([("competitive", 5), ("team_battle", 3)])
    engine = plain.engine.model_copy(update={"rows": 8})
    whole = ArenaProcess(tmp_path / "whole", plain.model_copy(update={"engine": engine}))
    fleet = engine.model_copy(update={"actors": 2})
    killed = ArenaProcess(tmp_path / "killed", plain.model_copy(update={"engine": fleet}))
    try:
        whole.finish()
        killed.start()
        killed.wait_for_iteration(1, 0, PATIENCE)
        assert killed.process is not None
        assert killed.process.pid is not None
        actors = named(psutil.Process(killed.process.pid), "ray::RolloutAct")
        assert len(actors) == 2
        actors[1].kill()
        killed.wait_for_iteration(3, 0, PATIENCE)
        node = node_of(killed.process.pid)
        assert killed.kill(), "it was over too soon"
        assert psutil.wait_procs(node, 60)[1] == [], "its cluster goes with it"
        killed.finish(PATIENCE)
        assert curve(killed.folder) == curve(whole.folder)
        assert digests(killed) == digests(whole)
        assert "replica_lost" in (killed.folder / "logs" / "training_runner.log").read_text()
    finally:
        whole.end()
        killed.end()


@pytest.mark.usefixtures("loopback")
def test_a_signal_ends_a_run_with_actors_in_order(tmp_path: Path) -> None:
    plain = tiny_config([("competitive", 500)])
    engine = plain.engine.model_copy(update={"rows": 8, "actors": 1})
    run = ArenaProcess(tmp_path / "run", plain.model_copy(update={"engine": engine}))
    try:
        process = run.start()
        run.wait_for_iteration(1, 0, PATIENCE)
        assert process.pid is not None
        node = node_of(process.pid)
        os.kill(process.pid, signal.SIGTERM)
        process.join(PATIENCE)
        assert process.exitcode == 0, run.told()
        assert checkpoint.load_newest(run.folder / "checkpoints") is not None
        assert psutil.wait_procs(node, 60)[1] == []
    finally:
        run.end()
