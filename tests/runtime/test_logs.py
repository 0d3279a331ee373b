from __future__ import annotations

import json
import logging
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from live import push_headers, push_parameters
from support import MANIFEST, free_port, make_body

from fedmoe.runtime import logs
from fedmoe.runtime.safe_text import inert
from fedmoe.wire.client import CoordinatorClient

ESCAPES = "\x1b[31mred\x07 \x9b2J \u202eturned \x7f\r"


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.CaptureFixture[str]]:
    """A process whose log is set up as a service's; hooks and handlers are as before at the end."""
    root = logging.getLogger()
    before, hooks = root.handlers[:], (sys.excepthook, threading.excepthook)
    root.handlers.clear()
    logs.configure()
    logs.log_uncaught()
    yield capsys
    root.handlers[:] = before
    sys.excepthook, threading.excepthook = hooks
    logging.captureWarnings(False)


def lines(told: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    said = told.readouterr()
    assert said.out == ""
    return [json.loads(line) for line in said.err.splitlines()]


def test_what_libraries_log_is_an_event_of_one_line(told: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("broken\nin two lines")
    except ValueError:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application\n")
    logging.getLogger("uvicorn.error").info("Started server process")
    (line,) = lines(told)
    assert (line["event"], line["logger"], line["level"]) == ("Exception in ASGI application", "uvicorn.error", "error")
    assert "ValueError: broken" in str(line["exception"])


def test_what_nobody_caught_is_an_event_too(told: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise RuntimeError("in a thread")

    thread = threading.Thread(target=fail, name="worker-1")
    thread.start()
    thread.join()
    try:
        fail()
    except RuntimeError as error:
        sys.excepthook(RuntimeError, error, error.__traceback__)
    first, second = lines(told)
    assert (first["event"], first["thread"]) == ("uncaught", "worker-1")
    assert "in a thread" in str(second["exception"])


def test_control_characters_reach_no_log_raw(told: pytest.CaptureFixture[str]) -> None:
    structlog.get_logger().warning("refused", worker=ESCAPES, number=3)
    said = told.readouterr().err
    assert said.rstrip("\n").isprintable()
    line = json.loads(said)
    assert str(line["worker"]).isprintable()
    assert str(line["worker"]).startswith("\\x1b[31mred\\x07 ")
    assert line["number"] == 3


def test_on_a_terminal_control_characters_are_shown_as_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    logs.configure()
    structlog.get_logger().warning("refused", worker=ESCAPES)
    assert capsys.readouterr().err.rstrip("\n").isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain \u6771\u4eac", "plain \u6771\u4eac"), ("\x1b", "\\x1b"), ("a\nb", "a\nb"), ("\u202e", "\\u202e")],
)
def test_text_is_made_inert(text: str, shown: str) -> None:
    assert inert(text, keep="\n") == shown


def test_the_service_log_of_a_coordinator_is_json_lines_whatever_it_is_sent(tmp_path: Path) -> None:
    """Garbage, TLS on the plain port, a cut body, a stop: none of it brings other lines onto standard error."""
    port = free_port()
    command = [sys.executable, "-m", "fedmoe", "coordinator", "--port", str(port), "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--state-dir", str(tmp_path / "state"), "--insecure"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        said: list[str] = []
        while not any("listening" in line for line in said):
            said.append(process.stderr.readline())
        with CoordinatorClient(f"http://127.0.0.1:{port}") as client:
            client.register("python", "w1", MANIFEST)
        body = make_body(1)
        query = "&".join(f"{key}={value}" for key, value in push_parameters().items())
        head = [f"POST /push_expert_update?{query} HTTP/1.1", "Host: 127.0.0.1", "Content-Length: 5000"]
        head += [f"{name}: {value}" for name, value in push_headers(body).items()]
        cut = "\r\n".join([*head, "", "cut"]).encode()
        for sent in (b"\x16\x03\x01\x02\x00garbage", b"GET\x00 / nothing\r\n\r\n", cut):
            with socket.create_connection(("127.0.0.1", port), 10) as connection:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass
        process.send_signal(signal.SIGTERM)
        out, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    events = [json.loads(line)["event"] for line in [*said, *rest.splitlines()] if line.strip()]
    assert {"insecure", "listening", "stopped", "registered"} <= set(events)
    assert process.returncode == 0
    assert out.startswith("WARNING: --insecure")
