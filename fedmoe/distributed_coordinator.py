"""The coordinator as an HTTP service: state directory, federation, socket, and orderly shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from functools import partial
from pathlib import Path

import structlog
import uvicorn

from fedmoe.config import CoordinatorConfig
from fedmoe.server.access.own_certificate import OwnCertificate, certificate_now
from fedmoe.server.app.federation_app import FederationApp, aggregation_of
from fedmoe.server.descriptors import few_left, in_use, raise_limit
from fedmoe.server.storage.backup import TLS
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.start_options import check_file
from fedmoe.server.storage.state_dir import Database, StateDir
from fedmoe.wire.http.serving import end_at_stop, listen, own_signals, server_of

_log = structlog.get_logger("fedmoe.coordinator")

EXIT_PORT_IN_USE = 98
EXIT_STORAGE_FAILED = 74
# So long it says that its storage failed before it leaves, so that whoever watches /healthz sees why.
_FAILED_SECONDS = 3.0
_DAY = 86_400.0


class DistributedCoordinator:
    """Owns the state directory and the federation in it; `app` is the HTTP application, `serve` runs it until a stop.

    Opening recovers everything that was acknowledged before; tokens made at the first start are in `new_tokens`, and
    nowhere else. `certificate` is the one that it made for itself (`--tls auto`).
    """

    def __init__(self, config: CoordinatorConfig) -> None:
        self.config = config
        self._descriptors = raise_limit()
        self._few_descriptors = False
        url = config.database_url
        self._state = StateDir.open(
            Path(config.state_dir),
            config.accept_older_journal,
            config.skip_damaged,
            config.allow_network_fs,
            partial(check_file, aggregation_of(config)),
            config.blobs,
            database=Database(url.get_secret_value(), config.accept_database_loss) if url is not None else None,
        )
        state = self._state
        with contextlib.ExitStack() as opened:
            opened.callback(state.close)
            self.certificate = self._own_certificate()
            self._federation = FederationApp(config, state.journal, state.blobs, state.path, state.problem)
            opened.pop_all()
        self.service, self.gate, self.app = self._federation.service, self._federation.gate, self._federation.app
        self.new_tokens, self.links = self._federation.new_tokens, self._federation.links

    def _own_certificate(self) -> OwnCertificate | None:
        if self.config.tls is None:
            return None
        return certificate_now(self._state.path / TLS, self.config.host)

    def serve(self) -> int:
        """Listen until SIGTERM or SIGINT; finishes requests under way, then returns the exit status."""
        listener = listen(self.config.host, self.config.port)
        files = (self.config.tls_cert, self.config.tls_key)
        if self.certificate is not None:
            files = (str(self.certificate.certificate), str(self.certificate.key))
        server = server_of(self.app, *files)
        self.service.start()
        try:
            # uvicorn's own choice of loop: uvloop where there is one, which halves the time of a push.
            with own_signals(server), asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
                # Said once a signal is answered: whoever reads it may send one at once.
                _log.info("listening", host=self.config.host, port=listener.getsockname()[1], pid=os.getpid())
                runner.run(self._run(server, listener))
        finally:
            self.close()
        if self.service.committer.failed:
            _log.error("stopped", reason=self.service.committer.failed)
            return EXIT_STORAGE_FAILED
        _log.info("stopped")
        return 0

    async def _run(self, server: uvicorn.Server, listener: socket.socket) -> None:
        beside = [self._stop_when_failed(server), self._watch_descriptors(), self._federation.look_after()]
        beside.append(end_at_stop(server, self._federation.end_streams))
        beside += [self._renew_certificate(server)] if self.certificate is not None else []
        watches = [asyncio.create_task(watch) for watch in beside]
        try:
            await server.serve(sockets=[listener])
        finally:
            for watch in watches:
                watch.cancel()

    async def _renew_certificate(self, server: uvicorn.Server) -> None:
        """Look once a day whether the certificate is to be renewed; handshakes from then on show the new one."""
        while True:
            await asyncio.sleep(_DAY)
            certificate = await asyncio.to_thread(self._own_certificate)
            if certificate is not None and server.config.ssl is not None:
                server.config.ssl.load_cert_chain(certificate.certificate, certificate.key)

    async def _watch_descriptors(self) -> None:
        """Say that descriptors run out, once each time: new connections are closed at once then."""
        while True:
            await asyncio.sleep(1.0)
            used = in_use(self._descriptors)
            few = few_left(used, self._descriptors)
            if few and not self._few_descriptors:
                _log.error("few_file_descriptors", used=used, limit=self._descriptors, fix="raise 'ulimit -n'")
            self._few_descriptors = few

    async def _stop_when_failed(self, server: uvicorn.Server) -> None:
        """After a failed fsync, or without its folder, nothing can be promised: answer 503 for a moment, then leave."""
        while not self.service.committer.failed:
            await asyncio.sleep(0.2)
            with contextlib.suppress(StorageFailedError):
                await asyncio.to_thread(self.service.committer.check_storage)
        await asyncio.sleep(_FAILED_SECONDS)
        server.should_exit = True

    def close(self) -> None:
        """Finish what was accepted and give the state directory back."""
        self._federation.close()
        self._state.close()
