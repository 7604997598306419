"""A client of libvirt's RPC that says exactly what it is told to, for tests: nothing is checked before it is sent.

It reads only when asked to, so that a test can be a client that does not read.
"""

import asyncio
import contextlib
import grp
import itertools
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edgehold.testing.capability import need_open_root
from virtvmand import wire
from virtvmand.table import NUMBERS, PROCEDURES
from virtvmand.wire import Framer, Packet
from virtvmand.xdr import Domain

ANSWER_S = 30.0
READ_ONLY = 1
"""Flag of ``connect_open``."""
_USERS = itertools.count(64_000)
_LIMIT = 32 * 1024 * 1024 + 4


class RefusedError(Exception):
    """What the server answered instead of values."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text


class ClosedError(Exception):
    """The server ended the connection."""


class RawClient:
    """One connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.others: list[Packet] = []
        """What came while an answer was waited for: events, pings, streams."""
        self._framer = Framer(_LIMIT)
        self._serial = 0
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def connect(cls, path: Path, *, flags: int | None = 0, receive_bytes: int = 0) -> Self:
        """Connect, and open with these flags; None: open nothing. ``receive_bytes``: a small buffer of the kernel's.

        Raises:
            RefusedError: it is not opened.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        one = cls(sock)
        try:
            await one._loop.sock_connect(sock, str(path))
            if flags is not None:
                await one.call("connect_open", "vman:///system", flags)
        except BaseException:
            sock.close()
            raise
        return one

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Say nothing more."""
        self.sock.close()

    async def send(self, data: bytes) -> None:
        """These bytes.

        Raises:
            ClosedError: nobody takes them.
        """
        try:
            async with asyncio.timeout(ANSWER_S):  # not wait_for, which may lose a cancellation before Python 3.12
                await self._loop.sock_sendall(self.sock, data)
        except ConnectionError as error:
            raise ClosedError from error

    def packet(self, name: str, *values: Any, **fields: Any) -> Packet:
        """The call of a procedure, with a serial of its own; ``fields`` are put into the header as they are."""
        procedure = PROCEDURES[NUMBERS[name]]
        self._serial += 1
        payload = procedure.arguments.encode(values)
        return Packet(wire.REMOTE, wire.VERSION, procedure.number, wire.CALL, self._serial, wire.OK, payload)._replace(
            **fields
        )

    async def ask(self, packet: Packet) -> Packet:
        """Send a packet and wait for the reply with its serial."""
        await self.send(wire.encode(packet))
        return await self.reply(packet.serial)

    async def reply(self, serial: int) -> Packet:
        """The reply with this serial; what comes before it is kept in ``others``.

        Raises:
            ClosedError: the server ended the connection.
            TimeoutError: it does not answer.
        """
        while True:
            one = await self.next()
            if one.kind == wire.REPLY and one.serial == serial:
                return one
            self.others.append(one)

    async def call(self, name: str, *values: Any) -> tuple[Any, ...]:
        """Call a procedure; the values of its answer.

        Raises:
            RefusedError: the answer is an error.
            ClosedError: the server ended the connection.
            TimeoutError: it does not answer.
        """
        answer = await self.ask(self.packet(name, *values))
        if answer.status == wire.ERROR:
            raise RefusedError(*wire.read_error(answer.payload))
        return PROCEDURES[answer.procedure].returns.decode(answer.payload)

    async def next(self, *, timeout_s: float = ANSWER_S) -> Packet:
        """The next packet, whatever it is.

        Raises:
            ClosedError: the server ended the connection.
            TimeoutError: nothing comes.
        """
        async with asyncio.timeout(timeout_s):
            while (one := self._framer.next()) is None:
                try:
                    data = await self._loop.sock_recv(self.sock, 256 * 1024)
                except ConnectionError as error:
                    raise ClosedError from error
                if not data:
                    raise ClosedError
                self._framer.feed(data)
        return one

    async def until_closed(self, *, timeout_s: float = ANSWER_S) -> list[Packet]:
        """Read until the server ends the connection; what it said before.

        Raises:
            TimeoutError: it does not.
        """
        said = []
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    said.append(await self.next(timeout_s=timeout_s))
        except ClosedError:
            return said


def refusal(packet: Packet) -> int:
    """The code of an answer that is an error."""
    assert (packet.kind, packet.status) == (wire.REPLY, wire.ERROR), packet
    return wire.read_error(packet.payload)[0]


def frame(words: Sequence[int], payload: bytes = b"") -> bytes:
    """A packet whose words may be any, also its length."""
    return struct.pack(">7I", *(one & 0xFFFFFFFF for one in words)) + payload


@contextlib.contextmanager
def as_user(group: str) -> Iterator[None]:
    """Connections that begin in the block are those of a user nobody else is, in this group ("" is one without roles).

    The kernel notes the effective ids at connect(2).
    """
    need_open_root()
    gid, groups = grp.getgrnam(group).gr_gid if group else 65_533, os.getgroups()
    before = os.getegid()
    os.setgroups([])
    os.setegid(gid)
    os.seteuid(next(_USERS))
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(before)
        os.setgroups(groups)


async def connected_as(path: Path, group: str, *, flags: int | None = 0) -> RawClient:
    """A client that belongs to another user."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with as_user(group):
            sock.connect(str(path))
        sock.setblocking(False)
        one = RawClient(sock)
        if flags is not None:
            await one.call("connect_open", "vman:///system", flags)
    except BaseException:  # a skip too
        sock.close()
        raise
    return one


async def domain(client: RawClient, name: str) -> Domain:
    """Look a domain up by its name."""
    (found,) = await client.call("domain_lookup_by_name", name)
    assert isinstance(found, Domain)
    return found


def arguments(number: int, dom: Domain) -> bytes:
    """Arguments that the procedure would take; its domain is a real one."""
    simple: dict[str, object] = {"i32": 0, "u32": 0, "i64": 0, "u64": 0, "str": "<x/>", "uuid": dom.uuid}
    values: list[object] = []
    for one in PROCEDURES[number].takes.split():
        kind = one.partition(":")[2]
        if kind == "domain":
            values.append(dom)
        elif kind.endswith("?"):
            values.append(None)
        elif kind.startswith("opaque"):
            values.append(b"\1")
        else:
            values.append([] if kind.endswith(">") else simple[kind])
    return PROCEDURES[number].arguments.encode(values)


def call(number: int, serial: int, payload: bytes = b"") -> Packet:
    """The call of a procedure by its number, with any arguments."""
    return Packet(wire.REMOTE, 1, number, wire.CALL, serial, wire.OK, payload)
