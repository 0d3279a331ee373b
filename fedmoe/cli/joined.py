"""Join lines, TOKEN@HOST:PORT#FINGERPRINT: read, written, exchanged for a token that the worker's folder keeps."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from fedmoe.cli.output import CommandError
from fedmoe.config import WorkerConfig
from fedmoe.runtime.files import FolderInUseError, lock_folder, write_atomic
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.http.bearer import hash_token, new_token
from fedmoe.wire.transport import ConnectionSettingError, address_of, check_url, names_this_machine

JOIN_FILE = "join.json"
# Written before the exchange: the token that is offered, so that the same one can be offered again after a crash.
_OFFER_FILE = "join.offer.json"
_LINE = re.compile(r"(?P<token>fmj_[A-Za-z0-9_-]{43})@(?P<address>\S+)")
_FORM = (
    "a join line has the form fmj_...@HOST:PORT#FINGERPRINT, as the coordinator or `fedmoe token create --join` shows"
)


@dataclass(frozen=True, slots=True)
class JoinLine:
    """What a join line says; `url` ends with the fingerprint if the line has one."""

    token: str
    url: str

    @classmethod
    def parse(cls, text: str, allow_http: bool = False) -> JoinLine:
        """Raises `CommandError` for what is no join line, without repeating it: there may be a token in it."""
        match = _LINE.fullmatch(text.strip())
        if match is None:
            raise CommandError(f"{_FORM}; copy the whole line, in quotes if your shell changes it")
        address = match["address"]
        url = address if "://" in address else f"https://{address}"
        try:
            check_url(url)
            plain, fingerprint = address_of(url)
        except ConnectionSettingError as error:
            raise CommandError(str(error)) from error
        if plain.startswith("http://") and not allow_http and not names_this_machine(urlsplit(plain).hostname or ""):
            raise CommandError(
                f"{plain} is not encrypted: whoever is on the way could read the token and use it first. Let the "
                "coordinator start with --tls auto, or pass --allow-http on a network you own"
            )
        return cls(match["token"], plain.rstrip("/") + (f"#{fingerprint}" if fingerprint else ""))


@dataclass(frozen=True, slots=True)
class Joined:
    """A worker's own token, and where it is good; `line` is the hash of the join line's token it was exchanged for."""

    url: str
    token: str
    line: str


def read_joined(folder: Path, name: str = JOIN_FILE) -> Joined | None:
    """What a worker's folder keeps of its joining; None if it never joined."""
    file = folder / name
    try:
        return Joined(**json.loads(file.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise CommandError(f"{file} cannot be read ({error}); remove it, and join again with a new line") from error


def exchange(line: JoinLine, folder: Path, worker: str) -> tuple[Joined, bool]:
    """The worker's own token for a join line, and whether it is new; once it has one, the same line asks nobody.

    The worker makes its token and sends only the hash. It is kept in `folder` (mode 0600) before it is sent, so that
    the same line works again after a crash on either side.
    """
    known = hash_token(line.token)
    joined = read_joined(folder)
    if joined is not None and joined.line == known:
        return Joined(line.url, joined.token, known), False
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        lock = lock_folder(folder)
    except FolderInUseError as error:
        raise CommandError(f"{error}; the line was not used: give this worker another --worker-id") from error
    try:
        return _exchange(line, known, folder, worker), True
    finally:
        lock.close()


def _exchange(line: JoinLine, known: str, folder: Path, worker: str) -> Joined:
    offer = read_joined(folder, _OFFER_FILE)
    if offer is None or offer.line != known:
        offer = Joined(line.url, new_token(), known)
        write_atomic(folder / _OFFER_FILE, json.dumps(asdict(offer)).encode())
    with CoordinatorClient(line.url, line.token, attempts=4) as client:
        client.join(hash_token(offer.token), worker)
    joined = Joined(line.url, offer.token, known)
    write_atomic(folder / JOIN_FILE, json.dumps(asdict(joined)).encode())
    os.unlink(folder / _OFFER_FILE)
    return joined


def connection(config: WorkerConfig, folder: Path) -> tuple[str, str | None]:
    """URL and token of a worker: those given, else what it has from joining this very coordinator."""
    joined = read_joined(folder) if config.token is None else None
    url, fingerprint = address_of(config.coordinator_url)
    if joined is None or address_of(joined.url)[0] != url:
        return config.coordinator_url, config.token.get_secret_value() if config.token else None
    return (config.coordinator_url if fingerprint else joined.url), joined.token
