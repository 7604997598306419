"""The control socket over a real unix socket: a dialogue, and every way in which a peer can misbehave."""

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from edgehold.errors import BadStateError, DeniedError, EdgeholdError, TimedOutError, UnavailableError
from edgehold.wire import control
from edgehold.wire.control import Connection, ControlClient, ControlServer, bind_unix
from edgehold.wire.jsonlines import MAX_LINE_BYTES, Request
from edgehold.wire.peer import Role, Roles, peer_of, require

NOT_JSON = (
    b'{"error":{"code":"bad-request","message":"the line is not JSON: JSON is malformed: invalid character (byte 4)",'
    b'"retryable":false}}'
)


class Daemon:
    """A handler with a word for each kind of behaviour."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.under_way = 0
        self.subscribers: list[Connection] = []

    async def handle(self, connection: Connection, request: Request) -> Any:
        match request.command:
            case "echo":
                return request.args
            case "refuse":
                raise BadStateError("partition 1 is READY; suspend needs DEPLOYED")
            case "bug":
                raise ZeroDivisionError
            case "wait":
                self.under_way += 1
                await self.gate.wait()
                return "done"
            case "operate":
                require(connection.role, Role.OPERATE, "operate")
                return str(connection.peer)
            case "subscribe":
                self.subscribers.append(connection)
                connection.on_close.append(lambda: self.subscribers.remove(connection))
                return None
        raise EdgeholdError(request.command, code="unknown-command")


@pytest_asyncio.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    behaviour = Daemon()
    server = ControlServer(behaviour.handle, roles=Roles())
    await server.listen(bind_unix(tmp_path / "s"))
    yield behaviour
    await server.close()


@contextlib.asynccontextmanager
async def raw(path: Path) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_unix_connection(str(path / "s"), limit=1 << 16)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def say(tmp_path: Path, *lines: bytes) -> list[bytes]:
    """Send the lines, close our side, return what came back."""
    async with raw(tmp_path) as (reader, writer):
        writer.write(b"".join(lines))
        writer.write_eof()
        answer = await reader.read()
    return answer.splitlines()


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is waited for happens on the other side of a socket
            await asyncio.sleep(0.001)


@pytest.mark.usefixtures("daemon")
async def test_dialogue(tmp_path: Path) -> None:
    assert await say(
        tmp_path,
        b'{"command":"echo","args":{"a":1}}\n',
        b'{"command":"echo","id":5}\n',
        b"nonsense\n",
        b'{"command":"refuse"}\n',
        b'{"command":"echo"',
    ) == [
        b'{"return":{"a":1}}',
        NOT_JSON,
        b'{"error":{"code":"bad-state","message":"partition 1 is READY; suspend needs DEPLOYED","retryable":false}}',
        b'{"return":{},"id":5}',
    ]


async def test_ids_overlap_and_others_keep_their_order(tmp_path: Path, daemon: Daemon) -> None:
    async with raw(tmp_path) as (reader, writer):
        writer.write(b'{"command":"wait","id":1}\n{"command":"echo","id":2}\n{"command":"echo"}\n')
        first = [await reader.readline(), await reader.readline()]
        assert set(first) == {b'{"return":{}}\n', b'{"return":{},"id":2}\n'}
        daemon.gate.set()
        assert await reader.readline() == b'{"return":"done","id":1}\n'


async def test_requests_under_way_are_bounded(tmp_path: Path, daemon: Daemon) -> None:
    async with raw(tmp_path) as (reader, writer):
        for one in range(3 * control.MAX_INFLIGHT):
            writer.write(b'{"command":"wait","id":%d}\n' % one)
        await until(lambda: daemon.under_way == control.MAX_INFLIGHT)
        daemon.gate.set()
        answers = [await reader.readline() for _ in range(3 * control.MAX_INFLIGHT)]
        assert len(set(answers)) == 3 * control.MAX_INFLIGHT


@pytest.mark.usefixtures("daemon")
async def test_a_bug_ends_one_request_only(tmp_path: Path) -> None:
    client = await ControlClient.connect(tmp_path / "s")
    with pytest.raises(EdgeholdError, match="journal has the details") as caught:
        await client.call("bug")
    assert caught.value.code == "internal"
    assert await client.call("echo", {"x": [1]}) == {"x": [1]}
    await client.close()


@pytest.mark.usefixtures("daemon")
async def test_too_long_a_line_ends_the_connection_with_a_reason(tmp_path: Path) -> None:
    async with raw(tmp_path) as (reader, writer):
        writer.write(b"x" * (MAX_LINE_BYTES + 2))
        assert b"longer than" in await reader.readline()
        assert await reader.read() == b""


async def test_a_peer_that_never_reads_is_cut_off(tmp_path: Path, daemon: Daemon) -> None:
    async with raw(tmp_path) as (reader, writer):
        writer.write(b'{"command":"subscribe"}\n')
        assert await reader.readline() == b'{"return":null}\n'
        (subscriber,) = daemon.subscribers
        for _ in range(40):
            subscriber.send_event("noise", "x" * 60_000)
            await asyncio.sleep(0)
        await until(lambda: not daemon.subscribers)
    assert len(await say(tmp_path, b'{"command":"echo"}\n')) == 1


@pytest.mark.usefixtures("daemon")
async def test_too_many_connections_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "MAX_CONNECTIONS", 2)
    one, two = await ControlClient.connect(tmp_path / "s"), await ControlClient.connect(tmp_path / "s")
    assert await one.call("echo") == await two.call("echo") == {}
    async with raw(tmp_path) as (reader, _writer):
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
    await one.close()
    await two.close()
    assert len(await say(tmp_path, b'{"command":"echo"}\n')) == 1


@pytest.mark.usefixtures("daemon")
async def test_no_user_takes_all_connections_and_root_gets_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "MAX_CONNECTIONS", 6)
    monkeypatch.setattr(control, "ROOT_CONNECTIONS", 2)
    monkeypatch.setattr(control, "MAX_CONNECTIONS_OF_A_USER", 3)
    uids = iter([1000] * 4 + [1001] * 2 + [0] * 3)
    monkeypatch.setattr(control, "peer_of", lambda sock: dataclasses.replace(peer_of(sock), uid=next(uids)))
    monkeypatch.setattr(Roles, "role_of", lambda _self, _peer: Role.OPERATE)
    got_in = []
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(9):
            reader, writer = await stack.enter_async_context(raw(tmp_path))
            with contextlib.suppress(ConnectionError):
                writer.write(b'{"command":"echo"}\n')
                got_in.append(await reader.readline() != b"")
                continue
            got_in.append(False)
    assert got_in == [True, True, True, False, True, False, True, True, False]


async def test_whoever_may_do_nothing_is_told_so_and_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Roles, "role_of", lambda _self, _peer: Role.NONE)
    server = ControlServer(Daemon().handle, roles=Roles())
    await server.listen(bind_unix(tmp_path / "s"))
    async with raw(tmp_path) as (reader, _writer):
        assert b'"code":"denied"' in await reader.readline()
        assert await reader.read() == b""
    await server.close()


async def test_events_reach_the_subscriber_in_order(tmp_path: Path, daemon: Daemon) -> None:
    client = await ControlClient.connect(tmp_path / "s")
    await client.call("subscribe")
    for number in range(3):
        daemon.subscribers[0].send_event("tick", number)
    seen = []
    async for name, data in client.events():
        seen.append((name, data))
        if len(seen) == 3:
            break
    assert seen == [("tick", 0), ("tick", 1), ("tick", 2)]
    await client.close()


async def test_events_that_nobody_reads_end_the_conversation(
    tmp_path: Path, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "MAX_EVENTS_UNREAD", 3)
    client = await ControlClient.connect(tmp_path / "s")
    await client.call("subscribe")
    for number in range(4):
        daemon.subscribers[0].send_event("tick", number)
    with pytest.raises(UnavailableError, match="3 events came that nobody read"):
        await client.call("wait")
    await client.close()


@pytest.mark.usefixtures("daemon")
async def test_client_gives_up_after_its_timeout(tmp_path: Path) -> None:
    client = await ControlClient.connect(tmp_path / "s")
    with pytest.raises(TimedOutError, match=r"no answer to wait within 0\.05 s"):
        await client.call("wait", timeout_s=0.05)
    await client.close()


async def test_client_learns_that_the_server_went_away(tmp_path: Path) -> None:
    behaviour = Daemon()
    server = ControlServer(behaviour.handle, roles=Roles())
    await server.listen(bind_unix(tmp_path / "s"))
    client = await ControlClient.connect(tmp_path / "s")
    waiting = asyncio.create_task(client.call("wait"))
    await until(lambda: behaviour.under_way)
    await server.close()
    with pytest.raises(UnavailableError, match="closed the connection"):
        await waiting
    with pytest.raises(UnavailableError):
        await client.call("echo")
    with pytest.raises(UnavailableError):
        await anext(client.events())
    await client.close()


async def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="is the daemon running"):
        await ControlClient.connect(tmp_path / "s")
    with pytest.raises(UnavailableError, match="AF_UNIX path too long"):
        await ControlClient.connect(tmp_path / ("s" * 200))


def test_bind_replaces_the_dead_and_respects_the_living(tmp_path: Path) -> None:
    first = bind_unix(tmp_path / "s", mode=0o600)
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
    with pytest.raises(UnavailableError, match="another process listens there"):
        bind_unix(tmp_path / "s")
    first.close()
    bind_unix(tmp_path / "s").close()


def test_bind_removes_nothing_but_sockets(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    with pytest.raises(UnavailableError, match="it is there and no socket"):
        bind_unix(tmp_path / "precious")
    assert (tmp_path / "precious").read_text() == "data"


def test_bind_names_the_path_and_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="No such file or directory"):
        bind_unix(tmp_path / "none" / "s")


def test_roles() -> None:
    left, right = socket.socketpair()
    peer = peer_of(left)
    left.close()
    right.close()
    assert Roles().role_of(peer) is Role.OPERATE  # our own user
    stranger = type(peer)(1, 12345, 12345, frozenset({12345, 7}))
    assert Roles().role_of(stranger) is Role.NONE
    assert Roles(read=frozenset({7})).role_of(stranger) is Role.READ
    assert Roles(read=frozenset({7}), operate=frozenset({12345})).role_of(stranger) is Role.OPERATE
    with pytest.raises(DeniedError, match="needs the role operate, and this user has read"):
        require(Role.READ, Role.OPERATE, "suspend")
    with pytest.raises(EdgeholdError, match="no group 'nobody-has-this'"):
        Roles.from_groups(read=["nobody-has-this"], operate=[])
