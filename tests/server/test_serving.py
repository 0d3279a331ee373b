from __future__ import annotations

import signal
import socket
from collections.abc import Callable

import pytest
from live import push_headers, push_parameters
from support import MANIFEST, CoordinatorProcess, make_body

from fedmoe.config import CoordinatorConfig
from fedmoe.distributed_coordinator import DistributedCoordinator
from fedmoe.server.listening import PortInUseError
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.messages import UpdateHeader


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
