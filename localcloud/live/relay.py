"""Carries TCP connections into and out of a network namespace, over Unix sockets: files, which both sides see."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

PIECE = 1 << 16
Place = tuple[str, int] | Path
"""(host, port) of TCP, or the file of a Unix socket."""


class Relay:
    """Passes on what comes to `listen` to `target`, from its making until `close`, in a thread of its own.

    `target` may be a function, asked for each connection. Where nobody answers there, or it raises OSError, the
    connection is closed at once. Raises OSError where it cannot listen.
    """

    def __init__(self, listen: Place, target: Place | Callable[[], Place]) -> None:
        self._listen, self._target = listen, target
        self._loop = asyncio.new_event_loop()
        if isinstance(listen, Path):
            listen.parent.mkdir(parents=True, exist_ok=True)
            listen.unlink(missing_ok=True)
        self._server = self._loop.run_until_complete(_serve(listen, self._pass))
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends open connections too."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._end())
        self._loop.close()
        if isinstance(self._listen, Path):
            self._listen.unlink(missing_ok=True)

    async def _end(self) -> None:
        self._server.close()
        await asyncio.sleep(0.05)  # what it has just accepted becomes a task first
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.CancelledError):
            target = await asyncio.to_thread(self._target) if callable(self._target) else self._target
            there_reader, there_writer = await _connect(target)
            with contextlib.closing(there_writer):
                # Each direction ends by itself: a client may have said all, and wait for the answer.
                await asyncio.gather(_copy(reader, there_writer), _copy(there_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(PIECE):
        writer.write(piece)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


def _serve(
    place: Place, handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> Awaitable[asyncio.Server]:
    if isinstance(place, Path):
        return asyncio.start_unix_server(handle, place)
    return asyncio.start_server(handle, *place)


def _connect(place: Place) -> Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    if isinstance(place, Path):
        return asyncio.open_unix_connection(place)
    return asyncio.open_connection(*place)
