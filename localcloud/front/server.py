"""Azure's own hosts as one TLS server on loopback, which answers by the Host header."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localcloud.azure.world import World
from localcloud.front.authority import context
from localcloud.front.blob import Blob
from localcloud.front.directory import BLOB_SUFFIX, HUB, LOGIN, REGISTRY_SUFFIX, Directory
from localcloud.front.entra import Entra
from localcloud.front.exchange import IDLE_SECONDS, Exchange
from localcloud.front.registry import Registry
from localcloud.front.tokens import Tokens
from localcloud.hub import Model
from localcloud.hub import answer as answer_as_hub
from localcloud.loopback import LoopbackServer


class Front(LoopbackServer):
    """login.microsoftonline.com, huggingface.co, the Blob accounts and the registries of `world`, until `close`.

    `folder`: of the local cloud; the front keeps its keys in `front` there, and writes `ca_bundle`. `issuer_key`: the
    PEM file by which the API server signs service account tokens; it may come later. `blobs` and `account_key`: the
    emulator's account, as `localcloud.azurite` has them. `registry`: HOST:PORT, as `localcloud.registry` serves it.
    `models`: folders by OWNER/NAME, for the hub.
    """

    request_queue_size = 128  # every connection of every pod comes here
    ca_bundle: Path
    """Certificates that a client must trust: this machine's authorities, and the one of this folder."""

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        issuer_key: Path,
        blobs: str,
        account_key: str,
        registry: str,
        models: Mapping[str, Path],
        port: int = 0,
    ) -> None:
        own = folder / "front"
        self._context = context(own, [LOGIN, HUB, f"*{BLOB_SUFFIX}", f"*{REGISTRY_SUFFIX}", "localhost"])
        self.ca_bundle = own / "ca-bundle.crt"
        directory, tokens = Directory(world), Tokens(own / "tokens.key")
        self.entra = Entra(directory, tokens, issuer_key)
        self.blob = Blob(directory, self.entra, blobs, account_key)
        self.registry = Registry(directory, self.entra, tokens, registry)
        self.models = {name: Model(path) for name, path in models.items()}
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(_Handler, port)
        self.url = f"https://localhost:{self.server_port}"

    def finish_request(self, request: Any, client_address: Any) -> None:
        """In the connection's own thread: one client that is slow to greet holds up no other."""
        request.settimeout(IDLE_SECONDS)
        with self._context.wrap_socket(request, server_side=True) as connection:
            with self._lock:
                self._open.add(connection)
            try:
                super().finish_request(connection, client_address)
            finally:
                with self._lock:
                    self._open.discard(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that left, or trusts us not
            super().handle_error(request, client_address)

    def close(self) -> None:
        """Ends open connections too."""
        super().close()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    # Not SSLSocket's own, which would pull the TLS state from under the thread that reads.
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)


class _Handler(Exchange):
    server: Front

    def respond(self) -> None:
        if self.name == LOGIN:
            self.server.entra.answer(self)
        elif self.name == HUB:
            if self.command in ("GET", "HEAD"):
                answer_as_hub(self, self.server.models)
            else:
                self.reply(405)
        elif self.name.endswith(BLOB_SUFFIX):
            self.server.blob.answer(self)
        elif self.name.endswith(REGISTRY_SUFFIX):
            self.server.registry.answer(self)
        else:
            self.reply(421)
