"""A real S3 server on loopback for tests (moto in an environment of its own), and a way to it that can be disturbed."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from support import free_port

#: The interpreter that has moto; `make test-scale` makes one and names it.
MOTO_PYTHON = os.environ.get("FEDMOE_MOTO_PYTHON", str(Path(__file__).parents[1] / ".venv-moto" / "bin" / "python"))
ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key-that-is-never-shown"


@dataclass(frozen=True)
class Answer:
    """What a disturbed way answers by itself, in S3's form."""

    status: int
    code: str = ""

    @property
    def body(self) -> bytes:
        # A real store tells of the key and repeats what was signed.
        told = f"<Code>{self.code}</Code><AWSAccessKeyId>{ACCESS_KEY}</AWSAccessKeyId><StringToSign>{SECRET_KEY}"
        return f'<?xml version="1.0"?><Error>{told}</StringToSign></Error>'.encode() if self.code else b""


@dataclass
class Asked:
    """A request on its way; a disturbance may change its headers."""

    method: str
    path: str
    headers: dict[str, str] = field(default_factory=dict)


#: Called with every request: None lets it pass, an answer takes its place, an exception cuts the connection.
Disturbance = Callable[[Asked], Answer | None]


class CutError(Exception):
    """The connection is to be cut without an answer."""


class Way:
    """An HTTP proxy to a server, which can be taken away, put back, and asked to disturb what passes."""

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self.disturb: Disturbance = lambda asked: None
        #: After the server has answered: an exception cuts the connection before the answer.
        self.disturb_answer: Disturbance = lambda asked: None
        self.asked: list[str] = []
        self._target = target
        self._server: ThreadingHTTPServer | None = None
        self.open()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        """Listen, from now on or again."""
        way = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                """Nothing."""

            def _pass(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                asked = Asked(self.command, self.path, dict(self.headers.items()))
                way.asked.append(f"{self.command} {self.path}")
                try:
                    if way._server is not server:
                        raise CutError  # a connection from before the way was closed
                    own = way.disturb(asked)
                    status, headers, content = way._ask(asked, body) if own is None else (own.status, {}, own.body)
                    way.disturb_answer(asked)
                except CutError:
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass

        server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        self._server = server

    def close(self) -> None:
        """Listen no more: whoever connects is refused."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _ask(self, asked: Asked, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._target, timeout=60)
        try:
            connection.request(asked.method, asked.path, body, asked.headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        unwanted = {"connection", "transfer-encoding", "server", "date"}
        return answer.status, {k: v for k, v in answer.headers.items() if k.lower() not in unwanted}, content


def environment(url: str) -> dict[str, str]:
    """What a process needs in its environment to reach the server at `url`."""
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
    }


def make_bucket(port: int, name: str) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{name}", method="PUT")
    with urllib.request.urlopen(request, timeout=30):
        pass


@contextmanager
def moto_server(log: Path) -> Iterator[int]:
    """A running S3 server; its port. What it holds is gone with it."""
    if not Path(MOTO_PYTHON).exists():
        raise AssertionError(f"{MOTO_PYTHON} is not there: run 'make test-scale', or name one in FEDMOE_MOTO_PYTHON")
    port, variables = free_port(), {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = [MOTO_PYTHON, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=variables)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5):
                    break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"moto did not start: {log.read_text()[-2000:]}") from None
                time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait(30)


if __name__ == "__main__":
    with moto_server(Path(os.devnull)) as listening:
        print(f"an S3 server listens on http://127.0.0.1:{listening}; Ctrl-C ends it", file=sys.stderr)
        threading.Event().wait()
