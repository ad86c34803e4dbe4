"""The server below the application: Uvicorn, with clients that keep it waiting sent away, and an end that comes soon.

Imported where a server is started, and nowhere else: its packages may be missing.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE_SECONDS = 30.0  # until the head of a request has come; for the rest of an answer to be taken
GRACE_SECONDS = 2  # for what is being answered when the end is asked for


def run_server(app: ASGIApp, listener: socket.socket) -> None:
    """Answer on this socket until SIGINT or SIGTERM comes."""
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # as Uvicorn's below
    config = uvicorn.Config(
        app,
        http=_Patient,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        log_level="critical",  # what a stranger sends is nothing to be told; the application tells its own errors
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    _Server(config).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Ends for a signal and leaves it at that; Uvicorn's own raises it again, which would end the program."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kinds = (signal.SIGINT, signal.SIGTERM)
        before = {kind: signal.signal(kind, self.handle_exit) for kind in kinds}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)


class _Patient(H11Protocol):
    """A connection that is closed when no request comes, or an answer is not taken, for `PATIENCE_SECONDS`.

    Uvicorn waits for a request's head for ever. What comes after the head is the application's to wait for.
    """

    _leaving: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stay()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        with suppress(h11.LocalProtocolError):  # an answer has begun
            super().send_400_response(msg)
        self.transport.close()

    def _look(self) -> None:
        """Count the time while there is no request to answer."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stay()
        elif self._leaving is None:
            self._leaving = self.loop.call_later(PATIENCE_SECONDS, self.transport.abort)

    def _stay(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
