"""`fedmoe doctor`: what it finds on the way to a coordinator, and that its advice works when it is followed."""

from __future__ import annotations

import json
import resource
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from command import Outcome
from live import JOIN, LiveServer
from support import free_port

from fedmoe.cli import doctor, doctor_network
from fedmoe.runtime import machine

Run = Callable[..., Outcome]
CERTIFICATES = Path(__file__).parents[1] / "fixtures" / "certificates"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("FEDMOE_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


def found(fedmoe: Run, *options: str) -> dict[str, dict[str, str]]:
    said = json.loads(fedmoe("doctor", "--json", *options).out)
    return {finding["what"]: finding for finding in said}


class Strange(BaseHTTPRequestHandler):
    """Answers everything with an empty listing, dated `ahead` seconds from now."""

    ahead = 0.0

    def do_GET(self) -> None:
        body = b'{"experts": [], "gateway": null, "enable_gateway": true, "status": "ok"}'
        self.send_response_only(200)
        self.send_header("Date", formatdate(time.time() + self.ahead, usegmt=True))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A handshake that fails is what some tests are about."""


@contextmanager
def served(ahead: float = 0.0, certificate: str = "") -> Iterator[int]:
    server = _Quiet(("127.0.0.1", 0), type("Dated", (Strange,), {"ahead": ahead}))
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATES / f"{certificate}.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_coordinator_that_is_well_is_found_so(server: LiveServer, fedmoe: Run) -> None:
    said = found(fedmoe, "--coordinator-url", server.url)
    assert {said[name]["state"] for name in ("connection", "clock", "coordinator")} == {"ok"}
    assert said["connection"]["found"] == "direct, no proxy"


@pytest.mark.parametrize(("ahead", "words"), [(420.0, "420 s behind"), (-86400.0, "86400 s ahead of")])
def test_a_clock_that_is_far_off_is_a_problem(ahead: float, words: str, fedmoe: Run) -> None:
    with served(ahead) as port:
        clock = found(fedmoe, "--coordinator-url", f"http://127.0.0.1:{port}")["clock"]
    assert clock["state"] == "problem"
    number, _, which = words.partition(" s ")
    assert abs(int(clock["found"].split()[0]) - int(number)) <= 5
    assert which in clock["found"]
    assert "timedatectl set-ntp true" in clock["fix"]


def test_a_free_port_is_told_with_the_command_that_starts_a_coordinator_there(fedmoe: Run) -> None:
    port = free_port()
    said = found(fedmoe, "--coordinator-url", f"http://127.0.0.1:{port}")
    assert said["port"]["found"] == f"{port} is free here"
    assert said["coordinator"]["fix"] == f"start it with: fedmoe coordinator --port {port}"
    default = found(fedmoe)["coordinator"] if port_is_free(5000) else None
    assert default is None or default["fix"] == "start it with: fedmoe coordinator"


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_port_that_something_else_holds_is_told_with_its_holder_14(fedmoe: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closing = threading.Thread(target=_hang_up, args=(listener,), daemon=True)
        closing.start()
        said = found(fedmoe, "--coordinator-url", f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert f"process {psutil.Process().pid}" in said["port"]["found"]
    assert said["coordinator"]["state"] == "problem"
    assert "another --port" in said["coordinator"]["fix"]


def _hang_up(listener: socket.socket) -> None:
    try:
        while True:
            listener.accept()[0].close()
    except OSError:
        return


def test_a_token_that_is_missing_and_then_there(
    locked_server: LiveServer, fedmoe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = found(fedmoe, "--coordinator-url", locked_server.url)["coordinator"]
    assert said["state"] == "problem"
    assert "FEDMOE_TOKEN" in said["fix"]
    monkeypatch.setenv("FEDMOE_TOKEN", JOIN)
    assert found(fedmoe, "--coordinator-url", locked_server.url)["coordinator"]["state"] == "ok"


def test_a_certificate_nobody_trusts_and_then_trusted_70(fedmoe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATES / "ca.pem"))
    with served(certificate="self") as port:
        url = f"https://127.0.0.1:{port}"
        said = found(fedmoe, "--coordinator-url", url)
        assert said["TLS"]["state"] == "problem"
        assert "SHA-256 " in said["TLS"]["found"]
        assert said["TLS"]["found"].count(":") == 31
        assert "set SSL_CERT_FILE" in said["TLS"]["fix"]
        assert said["coordinator"]["state"] == "problem"
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATES / "self.pem"))
        trusted = found(fedmoe, "--coordinator-url", url)
    assert (trusted["TLS"]["state"], trusted["coordinator"]["state"]) == ("ok", "ok")
    assert "valid for" in trusted["TLS"]["found"]


def test_the_wrong_scheme_is_told_and_the_right_one_works_23(fedmoe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATES / "ca.pem"))
    with served(certificate="good") as port:
        said = found(fedmoe, "--coordinator-url", f"http://127.0.0.1:{port}")["coordinator"]
        assert "this port speaks https: write https://" in said["found"]
        assert found(fedmoe, "--coordinator-url", f"https://127.0.0.1:{port}")["coordinator"]["state"] == "ok"
    with served() as port:
        said = found(fedmoe, "--coordinator-url", f"https://127.0.0.1:{port}")["coordinator"]
        assert "this port speaks http, not https" in said["found"]


def test_a_proxy_in_the_way_and_no_proxy(fedmoe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "ftp://proxy.example")
    said = found(fedmoe, "--coordinator-url", "http://coordinator.invalid:5000")["connection"]
    assert said["state"] == "problem"
    assert "HTTP_PROXY" in said["found"]
    assert "put coordinator.invalid into NO_PROXY" in said["found"]
    monkeypatch.setenv("NO_PROXY", "coordinator.invalid")
    after = found(fedmoe, "--coordinator-url", "http://coordinator.invalid:5000")
    assert after["connection"]["found"] == "direct, no proxy"
    assert "its name is not known" in after["coordinator"]["found"]


def test_a_token_in_clear_is_noted(fedmoe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMOE_TOKEN", JOIN)
    said = found(fedmoe, "--coordinator-url", "http://coordinator.invalid:5000")["TLS"]
    assert (said["state"], "--tls-cert" in said["fix"]) == ("note", True)


def test_the_hub_is_asked_only_when_told_to(fedmoe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "hub" not in found(fedmoe)
    with served() as port:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}/")
        assert found(fedmoe, "--hub")["hub"]["state"] == "ok"
    said = found(fedmoe, "--hub")["hub"]
    assert (said["state"], "--base-model FOLDER" in said["fix"]) == ("problem", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = found(fedmoe, "--hub")["hub"]
    assert (said["state"], said["fix"].startswith("unset HF_HUB_OFFLINE")) == ("note", True)


SOCKS = "socks5://127.0.0.1:1"


def test_a_socks_proxy_without_its_package_is_told_with_the_command_and_the_way_around(
    fedmoe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", SOCKS)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    said = found(fedmoe, "--coordinator-url", "http://coordinator.invalid:5000", "--hub")
    for name, host in (("connection", "coordinator.invalid"), ("hub", "hub.invalid")):
        assert said[name]["state"] == "problem"
        assert "ALL_PROXY names a SOCKS proxy, which takes the package socksio" in said[name]["found"]
        assert "run: pip install socksio" in said[name]["found"]
        assert f"put {host} into NO_PROXY" in said[name]["found"]
    monkeypatch.setenv("NO_PROXY", "coordinator.invalid,hub.invalid")
    said = found(fedmoe, "--coordinator-url", "http://coordinator.invalid:5000", "--hub")
    assert said["connection"]["found"] == "direct, no proxy"
    assert "SOCKS" not in str(said)


def test_a_worker_ends_at_once_over_a_socks_proxy_without_its_package(
    fedmoe: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", SOCKS)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "one row"}\n')
    options = {
        "worker-id": "W1",
        "specialty": "python",
        "dataset": data,
        "base-model": "tiny",
        "state-dir": tmp_path / "w",
    }
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    ran = fedmoe("worker", "--coordinator-url", "http://coordinator.invalid:5000", *given)
    assert ran.status == 2
    assert "run: pip install socksio" in ran.err
    assert not (tmp_path / "w").exists()


def test_a_hub_that_accepts_and_never_answers_does_not_hold_the_doctor(
    fedmoe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_network, "_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections wait in its backlog for ever
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        for scheme in ("http", "https"):
            monkeypatch.setenv("HF_ENDPOINT", f"{scheme}://{address}")
            said = found(fedmoe, "--hub")["hub"]
            assert (said["state"], "does not answer" in said["found"]) == ("problem", True)
            assert "timed out" in said["found"]
            assert "--base-model FOLDER" in said["fix"]


@pytest.mark.parametrize("endless", [b"x" * 65536, b""])
def test_a_hub_whose_answer_never_ends_is_taken_at_its_status(
    endless: bytes, fedmoe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless(Strange):
        def do_GET(self) -> None:
            self.send_response_only(200)
            self.end_headers()
            with suppress(OSError):
                while not gone.wait(0.0 if endless else 0.01):
                    self.wfile.write(endless)

    gone = threading.Event()
    server = _Quiet(("127.0.0.1", 0), Endless)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert found(fedmoe, "--hub")["hub"]["state"] == "ok"
    finally:
        gone.set()
        server.shutdown()
        thread.join()
        server.server_close()


def test_few_open_files_are_noted_and_the_advice_raises_them(monkeypatch: pytest.MonkeyPatch) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr("resource.getrlimit", lambda kind: (256, hard))
    said = doctor._limits()
    assert (said.state, "ulimit -n 1024" in said.fix) == ("note", True)
    monkeypatch.setattr("resource.getrlimit", lambda kind: (1024, hard))
    assert doctor._limits().state == "ok"


def test_a_container_with_little_memory_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    little = machine.Memory(512 << 20, 300 << 20)
    monkeypatch.setattr(doctor, "memory", lambda: little)
    said = doctor._memory()
    assert said.state == "note"
    assert "to this container" in said.found
    assert "docker run --memory" in said.fix
    monkeypatch.setattr(doctor, "memory", lambda: replace(little, total=4 << 30, available=3 << 30))
    assert doctor._memory().state == "ok"


def test_a_gpu_shows_its_free_memory_and_a_full_one_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmoe.runtime.device.free_and_total", lambda device: (40 << 30, 80 << 30))
    assert "40.0 of 80.0 GiB free" in doctor._device().found
    monkeypatch.setattr("fedmoe.runtime.device.free_and_total", lambda device: (100 << 20, 80 << 30))
    assert (doctor._device().state, "nvidia-smi" in doctor._device().fix) == ("note", True)

    def broken(device: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr("fedmoe.runtime.device.free_and_total", broken)
    assert doctor._device().state == "problem"
    assert "nvidia-smi" in doctor._device().found


def test_a_wrong_number_of_threads_is_a_problem_until_it_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    said = doctor._threads()
    assert (said.state, said.fix) == ("problem", "unset it, or set it to 1 or more")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert doctor._threads().state == "ok"


def test_an_old_sqlite_is_noted_and_a_sound_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqlite3.sqlite_version_info", (3, 40, 1))
    assert "keep it off NFS" in doctor._sqlite().fix
    monkeypatch.setattr("sqlite3.sqlite_version_info", (3, 51, 3))
    assert doctor._sqlite().state == "ok"
