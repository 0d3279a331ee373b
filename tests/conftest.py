from __future__ import annotations

import os
import secrets
import ssl
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import httpcore2
import pytest
import structlog
from hypothesis import settings
from s3_server import Way, environment, make_bucket, moto_server
from support import CoordinatorProcess

if TYPE_CHECKING:
    from live import House
    from postgres_server import PostgresServer

    from fedmoe.models.base import LoadedBase

# The same examples everywhere: a change is judged by what it changed. HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("repeatable", derandomize=True, max_examples=50)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    """Commands that run in the tests' own process set up logging for it; the next test starts without."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session", autouse=True)
def authorities_read_once() -> Iterator[None]:
    """Every client reads the authorities this machine trusts, also one of plain HTTP; that takes 50 ms each time."""
    own = httpcore2.default_ssl_context

    @cache
    def read(trust_env: bool, *_: str | None) -> ssl.SSLContext:
        return own(_trust_env=trust_env)

    def authorities(*, _trust_env: bool = True) -> ssl.SSLContext:
        return read(_trust_env, os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpcore2, "default_ssl_context", authorities)
        yield


@pytest.fixture
def coordinator_process(tmp_path: Path) -> Iterator[Callable[..., CoordinatorProcess]]:
    """Makes coordinator processes on one state directory; every one of them is ended by its own process id."""
    made: list[CoordinatorProcess] = []

    def make(arguments: Sequence[str] = (), fresh: bool = False) -> CoordinatorProcess:
        made.append(CoordinatorProcess(tmp_path / "state", arguments=arguments, fresh=fresh))
        return made[-1]

    yield make
    for process in made:
        if process.process is not None:
            process.kill()


@pytest.fixture(scope="session")
def moto_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a real S3 server."""
    with moto_server(tmp_path_factory.mktemp("moto") / "log") as port:
        yield port


@pytest.fixture
def way(moto_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    """The way to the S3 server that this process and its children take."""
    opened = Way(moto_port)
    for name, value in environment(opened.url).items():
        monkeypatch.setenv(name, value)
    yield opened
    opened.close()


@pytest.fixture
def bucket_url(moto_port: int, way: Way) -> str:
    """A prefix in a bucket of its own."""
    name = f"bucket-{secrets.token_hex(8)}"
    make_bucket(moto_port, name)
    return f"s3://{name}/of/fedmoe"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """An open coordinator without tokens and without experts."""
    from live import open_house

    with open_house(tmp_path) as opened:
        yield opened


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server for all tests of a process; each asks it for databases of its own."""
    from postgres_server import PostgresServer

    server = PostgresServer.make()
    yield server
    server.remove()


@pytest.fixture(scope="module")
def base() -> LoadedBase:
    """The tiny base model, one for the tests of a file that leave it as it is."""
    from fedmoe.models.base import load_base

    return load_base("tiny", "cpu", "fp32")
