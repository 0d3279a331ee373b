"""`fedmoe dashboard` as a process: it shows runs until it is stopped."""

from __future__ import annotations

import json
import signal
import socket
import urllib.request
from pathlib import Path

import pytest
from builders import wait_until
from forks import Fork
from support import free_port

from fedmoe.monitor.sample_records import sample_records


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_dashboard_serves_runs_until_it_is_stopped_and_pages_that_are_open_do_not_hold_it(
    tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sample_records(2, 2, 0, 0.0)))
    port, out = free_port(), tmp_path / "out"
    process = Fork(["-m", "fedmoe", "dashboard", str(run), "--port", str(port)], out)
    try:
        wait_until(lambda: answers(port), 120)
        assert f"http://127.0.0.1:{port}/" in out.read_text()
        with socket.create_connection(("127.0.0.1", port), 60) as page:
            page.sendall(f"GET /live HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
            begun = page.recv(1 << 16)
            process.send_signal(number)
            assert process.wait(60) == 0
            # A stream that the drain had cut off would lack its last, empty chunk.
            assert (begun + b"".join(iter(lambda: page.recv(1 << 16), b""))).endswith(b"\n\n\r\n0\r\n\r\n")
    finally:
        process.kill()
