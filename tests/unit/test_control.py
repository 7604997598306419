"""The control socket over a real unix socket: a dialogue, and every way in which a peer can misbehave."""

import asyncio
import contextlib
import dataclasses
import os
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from edgehold.errors import (
    BadRequestError,
    BadStateError,
    DeniedError,
    EdgeholdError,
    NoCapacityError,
    TimedOutError,
    UnavailableError,
)
from edgehold.wire import control
from edgehold.wire.control import Answer, Connection, ControlClient, ControlServer, bind_unix
from edgehold.wire.jsonlines import MAX_LINE_BYTES, Request, encode_event, encode_return
from edgehold.wire.peer import Role, Roles, peer_of, require
from edgehold.wire.stream import MAX_FDS, LineStream, close_all

NOT_JSON = (
    b'{"error":{"code":"bad-request","message":"the line is not JSON: JSON is malformed: invalid character (byte 4)",'
    b'"retryable":false}}'
)


PATIENCE_S = 30
NO_SUCH_FD = 1 << 30


def open_fds() -> set[str]:
    """The descriptors of this process, without the one that looks: it is closed when the list is there."""
    return {one.name for one in Path("/proc/self/fd").iterdir() if one.exists() or one.is_symlink()}


@pytest_asyncio.fixture(autouse=True)
async def no_descriptor_left() -> AsyncIterator[None]:
    """Set up before everything else and so checked after it."""
    before = open_fds()
    yield
    await until(lambda: open_fds() == before)


def inodes(fds: Iterable[int]) -> list[int]:
    return [os.fstat(fd).st_ino for fd in fds]


@contextlib.contextmanager
def files(count: int) -> Iterator[list[int]]:
    """Anonymous files, to be told apart by their inodes."""
    fds = [os.memfd_create(str(one)) for one in range(count)]
    try:
        yield fds
    finally:
        close_all(fds)


class Daemon:
    """A handler with a word for each kind of behaviour."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.under_way = 0
        self.subscribers: list[Connection] = []
        self.seen: list[list[int]] = []

    async def handle(self, connection: Connection, request: Request) -> Any:
        if request.fds:
            self.seen.append(inodes(request.fds))
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
            case "inodes":
                await asyncio.sleep(0)
                return inodes(request.fds)
        return self.copies(request)

    def copies(self, request: Request) -> Answer:
        fds = tuple(os.dup(fd) for fd in request.fds)
        match request.command:
            case "copy":
                return Answer("copies", fds)
            case "bad copy":
                return Answer("copies", (*fds, NO_SUCH_FD))
            case "unspeakable":
                return Answer(object(), fds)
        close_all(fds)
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


@contextlib.contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    """A peer that speaks for itself, with descriptors; its reads are non-blocking."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path / "s"))
        peer.setblocking(False)
        yield peer


async def heard(peer: socket.socket, *, lines: int = 1 << 30) -> list[bytes]:
    """So many lines, or all until the end."""
    text = b""
    async with asyncio.timeout(PATIENCE_S):
        while text.count(b"\n") < lines and (more := await asyncio.get_running_loop().sock_recv(peer, 65536)):
            text += more
    return text.splitlines()


async def until_served(peer: socket.socket) -> None:
    """The server has taken the connection, and has nothing else to do for it."""
    peer.send(b'{"command":"echo","args":{"still":"there"}}\n')
    assert await heard(peer, lines=1) == [b'{"return":{"still":"there"}}']


async def ask_for_ever(peer: socket.socket, line: bytes, fds: list[int]) -> None:
    """Until the server has had enough of a peer that reads nothing."""
    while True:
        try:
            socket.send_fds(peer, [line], fds)
        except BlockingIOError:
            await asyncio.sleep(0.001)
        except ConnectionError:
            return


@contextlib.asynccontextmanager
async def scripted(path: Path) -> AsyncIterator[tuple[ControlClient, LineStream]]:
    """A client, and the server's end in our hands."""
    with bind_unix(path / "s") as listener:
        client = await ControlClient.connect(path / "s")
        stream = LineStream(listener.accept()[0], limit=MAX_LINE_BYTES)
    try:
        yield client, stream
    finally:
        stream.close()
        await client.close()


async def say(tmp_path: Path, *lines: bytes) -> list[bytes]:
    """Send the lines, close our side, return what came back."""
    async with raw(tmp_path) as (reader, writer):
        writer.write(b"".join(lines))
        writer.write_eof()
        answer = await reader.read()
    return answer.splitlines()


async def until(condition: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
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


async def test_an_event_is_heard_before_the_answer_that_came_after_it(tmp_path: Path) -> None:
    seen: list[Any] = []

    async def handle(connection: Connection, request: Request) -> Any:
        connection.send_event("tick", request.command)
        return request.command

    server = ControlServer(handle, roles=Roles())
    await server.listen(bind_unix(tmp_path / "s"))
    client = await ControlClient.connect(tmp_path / "s", on_event=lambda name, data: seen.append((name, data)))

    async def ask(command: str) -> None:
        seen.append(await client.call(command))

    await asyncio.gather(*(ask(str(number)) for number in range(20)))
    for number in range(20):
        assert seen.index(("tick", str(number))) < seen.index(str(number))
    await server.close()
    with pytest.raises(UnavailableError, match="closed the connection"):  # which `events` still tells
        await anext(client.events())
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


@pytest.mark.parametrize(("count", "known"), [(0, 0), (1, 1), (256, 256), (257, 0)])
def test_a_peer_has_its_supplementary_groups(tmp_path: Path, count: int, known: int) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a process other groups")
    groups = list(range(70_000, 70_000 + count))
    with bind_unix(tmp_path / "s") as listener:
        connect = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1]); sys.stdin.read()"
        argv = [sys.executable, "-c", connect, str(tmp_path / "s")]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, group=4, extra_groups=groups) as child:
            listener.settimeout(20)
            connection, _address = listener.accept()
            with connection:
                peer = peer_of(connection)
            assert child.stdin is not None
            child.stdin.close()
    assert (peer.pid, peer.gid) == (child.pid, 4)
    assert peer.groups == {4, *groups[:known]}


@pytest.mark.usefixtures("daemon")
async def test_descriptors_go_both_ways(tmp_path: Path) -> None:
    client = await ControlClient.connect(tmp_path / "s")
    with files(MAX_FDS) as fds:
        assert await client.call("inodes", fds=fds) == inodes(fds)
        assert await client.call("inodes") == []
        value, came = await client.call_with_fds("copy", fds=fds)
        assert (value, inodes(came)) == ("copies", inodes(fds))
        assert not set(came) & set(fds)
        close_all(came)
        assert await client.call_with_fds("copy") == ("copies", [])
    await client.close()


@pytest.mark.usefixtures("daemon")
async def test_requests_at_once_keep_their_own_descriptors(tmp_path: Path) -> None:
    client = await ControlClient.connect(tmp_path / "s")
    with files(3 * control.MAX_INFLIGHT) as fds:

        async def one(mine: list[int]) -> None:
            assert await client.call("inodes", fds=mine) == inodes(mine)
            _value, came = await client.call_with_fds("copy", fds=mine)
            assert inodes(came) == inodes(mine)
            close_all(came)

        await asyncio.gather(*(one(fds[at : at + at % 3]) for at in range(3 * control.MAX_INFLIGHT)))
    await client.close()


@pytest.mark.usefixtures("daemon")
async def test_lines_that_come_together_or_in_pieces_have_their_own_descriptors(tmp_path: Path) -> None:
    with files(3) as fds, connected(tmp_path) as peer:
        numbers = inodes(fds)
        peer.send(b'{"command":"inodes"}\n{"command":"in')
        socket.send_fds(peer, [b'odes"}\n'], fds[:1])
        socket.send_fds(peer, [b'{"command":'], fds[1:2])
        socket.send_fds(peer, [b'"inodes"}\n'], fds[2:])
        peer.send(b'{"command":"inodes"}\n')
        peer.shutdown(socket.SHUT_WR)
        assert await heard(peer) == [
            b'{"return":[]}',
            b'{"return":[%d]}' % numbers[0],
            b'{"return":[%d,%d]}' % (numbers[1], numbers[2]),
            b'{"return":[]}',
        ]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"nonsense", b"bad-request"),
        (b'{"command":"inodes","fd":1,"id":7}', b"bad-request"),
        (b'{"command":"no such thing"}', b"unknown-command"),
        (b'{"command":"refuse","id":7}', b"bad-state"),
        (b'{"command":"bug"}', b"internal"),
        (b'{"command":"bad copy","id":7}', b"internal"),
        (b'{"command":"unspeakable"}', b"internal"),
    ],
)
@pytest.mark.usefixtures("daemon")
async def test_descriptors_of_what_is_refused_are_closed(tmp_path: Path, line: bytes, code: bytes) -> None:
    with files(2) as fds, connected(tmp_path) as peer:
        await until_served(peer)
        before = open_fds()
        socket.send_fds(peer, [line + b"\n"], fds)
        (answer,) = await heard(peer, lines=1)
        assert b'"code":"%s"' % code in answer
        await until(lambda: open_fds() == before)
        await until_served(peer)


@pytest.mark.usefixtures("daemon")
async def test_too_many_descriptors_end_the_connection_with_a_reason(tmp_path: Path) -> None:
    with files(MAX_FDS + 1) as fds, connected(tmp_path) as peer:
        peer.send(b'{"command":"echo"}\n')
        socket.send_fds(peer, [b'{"command":"inodes"}\n'], fds)
        first, second = await heard(peer)
        assert first == b'{"return":{}}'
        assert b"more than 16 descriptors came at once" in second


async def test_who_may_only_look_may_send_no_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Roles, "role_of", lambda _self, _peer: Role.READ)
    behaviour = Daemon()
    server = ControlServer(behaviour.handle, roles=Roles())
    await server.listen(bind_unix(tmp_path / "s"))
    client = await ControlClient.connect(tmp_path / "s")
    assert await client.call("echo") == {}
    with files(1) as fds, pytest.raises(UnavailableError, match="descriptors need the role operate"):
        await client.call("inodes", fds=fds)
    assert behaviour.seen == []
    await client.close()
    await server.close()


async def test_a_peer_that_sends_descriptors_and_vanishes(tmp_path: Path, daemon: Daemon) -> None:
    before = open_fds()
    with files(3) as fds, connected(tmp_path) as peer:
        socket.send_fds(peer, [b'{"command":"wait","id":1}\n'], fds[:1])
        socket.send_fds(peer, [b'{"command":"wait"}\n'], fds[1:2])
        socket.send_fds(peer, [b'{"command":'], fds[2:])
        await until(lambda: daemon.under_way == 2)
    daemon.gate.set()
    await until(lambda: open_fds() == before)
    assert len(daemon.seen) == 2


@pytest.mark.parametrize("one", [b"", b',"id":%d'])
@pytest.mark.parametrize("begun", [False, True])
async def test_closing_the_server_closes_what_requests_hold(tmp_path: Path, one: bytes, begun: bool) -> None:
    behaviour = Daemon()
    before = open_fds()
    server = ControlServer(behaviour.handle, roles=Roles())
    await server.listen(bind_unix(tmp_path / "s"))
    count = 2 * control.MAX_INFLIGHT  # some wait for their turn
    with files(1) as fds, connected(tmp_path) as peer:
        for number in range(count):
            words = one % number if one else b""
            socket.send_fds(peer, [b'{"command":"wait"%s}\n' % words], fds)
        await until(lambda: len(open_fds()) > len(before) + 4)  # the first of them is here
        if begun:
            await until(lambda: behaviour.under_way == (control.MAX_INFLIGHT if one else 1))
        await server.close()
    assert open_fds() == before


async def test_requests_hold_a_bounded_number_of_descriptors(
    tmp_path: Path, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "MAX_HELD_FDS", 3)
    client = await ControlClient.connect(tmp_path / "s")
    with files(2) as fds:
        waiting = asyncio.create_task(client.call("wait", fds=fds))
        await until(lambda: daemon.under_way)
        with pytest.raises(NoCapacityError, match="requests under way hold 2 descriptors, and 3 is the most"):
            await client.call("inodes", fds=fds)
        assert await client.call("inodes", fds=fds[:1]) == inodes(fds[:1])
        daemon.gate.set()
        assert await waiting == "done"
        assert await client.call("inodes", fds=fds) == inodes(fds)
    await client.close()


@pytest.mark.usefixtures("daemon")
async def test_descriptors_that_a_peer_never_takes_cut_it_off(tmp_path: Path) -> None:
    before = open_fds()
    with files(MAX_FDS) as fds, connected(tmp_path) as peer:
        await until_served(peer)
        asking = asyncio.create_task(ask_for_ever(peer, b'{"command":"copy"}\n', fds))
        async with asyncio.timeout(PATIENCE_S):
            await asking
    await until(lambda: open_fds() == before)


@pytest.mark.usefixtures("daemon")
async def test_client_refuses_descriptors_that_can_not_be_sent(tmp_path: Path) -> None:
    client = await ControlClient.connect(tmp_path / "s")
    with pytest.raises(BadRequestError, match="fds: 17 descriptors; 16 may go with one request"):
        await client.call("inodes", fds=[0] * 17)
    with pytest.raises(BadRequestError, match=r"can't send the descriptors \[1073741824\]: Bad file descriptor"):
        await client.call("inodes", fds=[NO_SUCH_FD])
    assert await client.call("inodes") == []
    await client.close()


async def test_client_closes_descriptors_that_it_did_not_ask_for(tmp_path: Path) -> None:
    async with scripted(tmp_path) as (client, server):
        with files(2) as fds:
            before = open_fds()
            server.send(encode_event("tick", 1), fds)
            server.send(encode_return("late", 99), fds)
            calling = asyncio.create_task(client.call("x"))
            await server.readline()
            server.send(encode_return("value", 1), fds)
            assert await calling == "value"
            calling = asyncio.create_task(client.call_with_fds("x"))
            await server.readline()
            server.send(b'{"error":{"code":"bad-state","message":"no"},"id":2}\n', fds)
            with pytest.raises(BadStateError, match="no"):
                await calling
            assert open_fds() == before


async def test_client_that_gave_up_closes_what_its_answer_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[bool] = []
    original = control._Call

    def cancelled_by_its_answer() -> control._Call:
        """Cancelled between the answer's arrival and the caller's next step."""
        one = original()
        one.answer.add_done_callback(lambda answer: answered.append(calling.cancel() and not answer.cancelled()))
        return one

    async with scripted(tmp_path) as (client, server):
        with files(2) as fds:
            before = open_fds()
            with pytest.raises(TimedOutError):
                await client.call_with_fds("x", timeout_s=0.01)
            server.send(encode_return("too late", 1), fds)
            monkeypatch.setattr(control, "_Call", cancelled_by_its_answer)
            calling = asyncio.create_task(client.call_with_fds("x"))
            await server.readline()
            await server.readline()
            monkeypatch.undo()
            server.send(encode_return("now", 2), fds)
            with pytest.raises(asyncio.CancelledError):
                await calling
            assert answered == [True]
            await until(lambda: open_fds() == before)


async def test_client_ends_a_conversation_with_too_many_descriptors(tmp_path: Path) -> None:
    async with scripted(tmp_path) as (client, server):
        with files(MAX_FDS + 1) as fds:
            calling = asyncio.create_task(client.call("x"))
            await server.readline()
            socket.send_fds(server._sock, [encode_return("value", 1)], fds)
            with pytest.raises(UnavailableError, match="more than 16 descriptors came at once"):
                await calling


@pytest.mark.usefixtures("daemon")
async def test_no_descriptor_for_a_connection_is_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(control, "_ACCEPT_PAUSE_S", 0.01)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as peer:
        free = os.dup(peer.fileno())  # the lowest number: now there is none
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        os.close(free)
        try:
            peer.connect(str(tmp_path / "s"))
            await until(lambda: "can't accept a connection: Too many open files" in caplog.text)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await until_served(peer)


async def test_client_waits_for_room_in_the_backlog(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)  # room for one
        first = await ControlClient.connect(tmp_path / "s")
        with pytest.raises(UnavailableError, match="is the daemon running"):
            await ControlClient.connect(tmp_path / "s", timeout_s=0.05)
        connecting = asyncio.create_task(ControlClient.connect(tmp_path / "s", timeout_s=PATIENCE_S))
        await asyncio.sleep(0)
        assert not connecting.done()
        listener.accept()[0].close()
        second = await connecting
        listener.accept()[0].close()
        await first.close()
        await second.close()
