from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from live import push_headers, push_parameters
from support import MANIFEST, CoordinatorProcess, free_port, make_body

from fedmoe.config import CoordinatorConfig
from fedmoe.distributed_coordinator import DistributedCoordinator
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.messages import UpdateHeader
from fedmoe.wire.http.serving import PortInUseError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_finishes_what_is_under_way_and_exits_with_0_76(
    coordinator_process: Callable[..., CoordinatorProcess], number: signal.Signals
) -> None:
    running = coordinator_process()
    running.start()
    body = make_body(1)
    query = "&".join(f"{key}={value}" for key, value in push_parameters().items())
    lines = [f"POST /push_expert_update?{query} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in push_headers(body).items()]
    with CoordinatorClient(running.url) as client:
        client.register("python", "w1", MANIFEST)
    with socket.create_connection(("127.0.0.1", running.port), 10) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body[:20])
        with CoordinatorClient(running.url) as client:
            client.healthy()  # answered after the head of the push was read
        assert running.process is not None
        running.process.send_signal(number)
        connection.sendall(body[20:])
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    assert running.wait() == 0
    running.start()
    with CoordinatorClient(running.url) as client:
        header = UpdateHeader(expert="python", worker="w1", epoch="e1", sequence=0, base_version=0)
        assert client.push(header, body).result.duplicate
    assert "Traceback" not in running.log.read_text()


def test_a_port_in_use_is_named_with_the_way_out_14(tmp_path: pytest.TempPathFactory) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        coordinator = DistributedCoordinator(CoordinatorConfig(port=port, state_dir=f"{tmp_path}/state"))
        with pytest.raises(PortInUseError, match=rf"cannot listen on 127\.0\.0\.1:{port}.*choose another --port"):
            coordinator.serve()
    coordinator.service.start()
    coordinator.close()


def pushing(running: CoordinatorProcess, connection: socket.socket) -> bytes:
    """Begin a push of worker w1; what is left to send."""
    body = make_body(1)
    query = "&".join(f"{key}={value}" for key, value in push_parameters().items())
    lines = [f"POST /push_expert_update?{query} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in push_headers(body).items()]
    with CoordinatorClient(running.url) as client:
        client.register("python", "w1", MANIFEST)
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body[:20])
        client.healthy()  # answered after the head of the push was read
    return body[20:]


def test_a_closed_terminal_is_a_stop_like_any_other_76(coordinator_process: Callable[..., CoordinatorProcess]) -> None:
    running = coordinator_process()
    running.start()
    with socket.create_connection(("127.0.0.1", running.port), 10) as connection:
        rest = pushing(running, connection)
        assert running.process is not None
        running.process.send_signal(signal.SIGHUP)
        connection.sendall(rest)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    assert running.wait() == 0


def test_a_second_signal_ends_at_once_and_loses_nothing_that_was_acknowledged_76(
    coordinator_process: Callable[..., CoordinatorProcess],
) -> None:
    """The first waits for a push that never ends, up to 30 seconds; the second does not."""
    running = coordinator_process()
    running.start()
    with socket.create_connection(("127.0.0.1", running.port), 10) as connection:
        pushing(running, connection)
        assert running.process is not None
        running.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            running.process.wait(1.5)
        started = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        assert running.wait() == 0
        assert time.monotonic() - started < 15
    running.start()
    with CoordinatorClient(running.url) as client:
        assert [expert.version for expert in client.list_experts().experts] == [0]


def test_started_with_nohup_it_outlives_its_terminal_76(
    coordinator_process: Callable[..., CoordinatorProcess],
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as children inherit it
    try:
        running = coordinator_process(fresh=True)
        running.start()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert running.process is not None
    running.process.send_signal(signal.SIGHUP)
    with CoordinatorClient(running.url) as client:
        assert client.healthy()
    assert running.stop() == 0


def test_with_nobody_reading_its_log_it_works_on_and_stops_in_order_76(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "fedmoe", "coordinator", "--port", str(port)]
    command += ["--state-dir", str(tmp_path / "state")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        while b"listening" not in process.stderr.readline():
            pass
        process.stderr.close()
        with CoordinatorClient(f"http://127.0.0.1:{port}") as client:
            client.register("python", "w1", MANIFEST)
            assert client.healthy()
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
    finally:
        process.kill()
