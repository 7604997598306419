"""How many connections an HTTP daemon keeps, and whose: no user may take all of them from the others."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from edgehold.wire import http
from edgehold.wire.peer import Peer, Roles


class Callers:
    """Connects as any user."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uid = 1000
        self.writers: list[asyncio.StreamWriter] = []

    def peer_of(self, _connection: socket.socket) -> Peer:
        return Peer(1, self.uid, self.uid, frozenset())

    async def call(self, uid: int) -> bool:
        """Connect and stay. Returns whether one is heard."""
        self.uid = uid
        reader, writer = await asyncio.open_unix_connection(str(self.path))
        self.writers.append(writer)
        try:
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            await writer.drain()
            return (await reader.readline()).startswith(b"HTTP/1.1 200")
        except ConnectionError:
            return False

    async def leave(self) -> None:
        """All of them."""
        writers, self.writers = self.writers, []
        for writer in writers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@pytest_asyncio.fixture
async def callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callers]:
    one = Callers(tmp_path / "api.sock")
    monkeypatch.setattr(http, "peer_of", one.peer_of)
    app = http.application([], roles=Roles(), registry=CollectorRegistry(), health=lambda: None)
    async with http.serve(app, one.path):
        yield one
        await one.leave()


async def test_one_user_has_so_many_and_others_get_in(callers: Callers, caplog: pytest.LogCaptureFixture) -> None:
    most = http.MAX_CONNECTIONS_OF_A_USER
    assert [await callers.call(1000) for _ in range(most + 3)] == [True] * most + [False] * 3
    assert caplog.text.count("refusing connections") == 1
    assert await callers.call(1001)
    await callers.leave()
    async with asyncio.timeout(30):
        while not await callers.call(1000):  # noqa: ASYNC110 - the server's end is closed a moment later
            await asyncio.sleep(0.01)


async def test_all_users_leave_room_for_root_and_ourselves(callers: Callers) -> None:
    room = http.MAX_CONNECTIONS - http.ROOT_CONNECTIONS
    heard = [await callers.call(1000 + number % 10) for number in range(room + 1)]
    assert heard == [True] * room + [False]
    ours = [await callers.call(uid) for uid in [0, os.geteuid()] * http.ROOT_CONNECTIONS]
    assert ours == [True] * http.ROOT_CONNECTIONS + [False] * http.ROOT_CONNECTIONS


async def test_who_is_nobody_s_peer_counts_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that systemd passed may be of the network."""
    monkeypatch.setattr(http, "MAX_CONNECTIONS", http.ROOT_CONNECTIONS + 2)
    app = http.application([], roles=Roles(), registry=CollectorRegistry(), health=lambda: None)
    listener = socket.create_server(("127.0.0.1", 0))
    async with http.serve(app, listener), contextlib.AsyncExitStack() as all_of_them:
        heard = []
        for _ in range(3):
            reader, writer = await asyncio.open_connection(*listener.getsockname()[:2])
            all_of_them.callback(writer.close)
            with contextlib.suppress(ConnectionError):
                writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                heard.append(await reader.readline())
        assert [line for line in heard if line] == [b"HTTP/1.1 200 OK\r\n"] * 2
