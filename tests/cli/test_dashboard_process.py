"""`fedmoe dashboard` as a process: it shows runs until it is stopped."""

from __future__ import annotations

import json
import signal
import urllib.request
from pathlib import Path

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


def test_a_dashboard_serves_runs_until_it_is_stopped(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sample_records(2, 2, 0, 0.0)))
    port, out = free_port(), tmp_path / "out"
    process = Fork(["-m", "fedmoe", "dashboard", str(run), "--port", str(port)], out)
    try:
        wait_until(lambda: answers(port), 120)
        assert f"http://127.0.0.1:{port}/" in out.read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
