"""The control socket: JSON lines over a unix socket, server and client.

The server answers in order what has no id, and concurrently what has one; it bounds everything that a peer could make
it hold: the line, the depth, the requests under way, the bytes not read, the connections. It must not know any command.
"""

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import socket
import stat
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Self

from edgehold.errors import BadRequestError, DeniedError, EdgeholdError, TimedOutError, UnavailableError, from_wire
from edgehold.wire.jsonlines import (
    MAX_LINE_BYTES,
    RefusedRequest,
    Request,
    decode_answer,
    decode_request,
    encode_error,
    encode_event,
    encode_request,
    encode_return,
)
from edgehold.wire.peer import Peer, Role, Roles, peer_of, require

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
ROOT_CONNECTIONS = 16
MAX_CONNECTIONS_OF_A_USER = 24
MAX_INFLIGHT = 16
# What a peer has not read yet. A reader that is slower than this is cut off, so that it holds no memory of ours.
MAX_UNREAD_BYTES = 1024 * 1024
MAX_EVENTS_UNREAD = 10_000

Handler = Callable[["Connection", Request], Awaitable[Any]]


class Connection:
    """One peer of the server: who it is, what it may do, and a way to send it events."""

    def __init__(self, writer: asyncio.StreamWriter, peer: Peer, role: Role) -> None:
        self._writer = writer
        self.peer = peer
        self.role = role
        self.on_close: list[Callable[[], None]] = []

    def send_event(self, name: str, data: Any) -> None:
        """Queue an event; a peer that does not read is cut off instead of being waited for."""
        self._send(encode_event(name, data))

    def _send(self, line: bytes) -> None:
        if self._writer.transport.get_write_buffer_size() + len(line) > MAX_UNREAD_BYTES:
            log.warning("cutting off a peer that does not read", extra={"peer": str(self.peer)})
            self._writer.transport.abort()
        elif not self._writer.is_closing():
            self._writer.write(line)

    async def reply(self, line: bytes) -> None:
        """Send an answer, and wait while the peer has much to read: its next request then waits, not our memory."""
        self._send(line)
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()


class ControlServer:
    """Serves one handler on listening unix sockets. The handler raises `EdgeholdError` to refuse."""

    def __init__(self, handler: Handler, *, roles: Roles) -> None:
        self._handler = handler
        self._roles = roles
        self._servers: list[asyncio.Server] = []
        self._serving: dict[asyncio.Task[None], int] = {}
        self._told_full = False

    async def listen(self, listener: socket.socket) -> None:
        """Accept on a bound and listening socket; this object owns it from now on."""
        listener.setblocking(False)
        self._servers.append(await asyncio.start_unix_server(self._accept, sock=listener, limit=MAX_LINE_BYTES))

    async def close(self) -> None:
        """Stop accepting, end every conversation, wait for the requests under way to be cancelled."""
        for server in self._servers:
            server.close()
        for task in list(self._serving):
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:  # pragma: no cover - a coroutine always runs in a task
            return
        peer = peer_of(writer.get_extra_info("socket"))
        if self._is_full(peer):
            writer.transport.abort()
            return
        self._serving[task] = peer.uid
        connection = Connection(writer, peer, self._roles.role_of(peer))
        try:
            require(connection.role, Role.READ, "a conversation")  # whoever may do nothing must not hold a connection
            await self._converse(connection, reader)
        except EdgeholdError as error:
            await connection.reply(encode_error(error, None))
        except asyncio.CancelledError:
            pass  # close(): the conversation ends here, quietly
        finally:
            self._serving.pop(task, None)
            for callback in connection.on_close:
                callback()
            if writer.transport.get_write_buffer_size():
                writer.transport.abort()  # it does not read: nothing to wait for
            writer.close()

    def _is_full(self, peer: Peer) -> bool:
        """No user may take all connections from the others; root gets in when the rest is taken."""
        uids = list(self._serving.values())
        room = MAX_CONNECTIONS if peer.uid == 0 else MAX_CONNECTIONS - ROOT_CONNECTIONS
        full = len(uids) >= room or (peer.uid != 0 and uids.count(peer.uid) >= MAX_CONNECTIONS_OF_A_USER)
        if full and not self._told_full:
            log.warning("refusing connections, %d are open; told once until one is accepted again", len(uids))
        self._told_full = full
        return full

    async def _converse(self, connection: Connection, reader: asyncio.StreamReader) -> None:
        slots = asyncio.Semaphore(MAX_INFLIGHT)
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    line = await reader.readuntil(b"\n")
                except (asyncio.IncompleteReadError, ConnectionError):
                    break  # the peer went away, its right; half a line is nobody's request
                except asyncio.LimitOverrunError:
                    error = BadRequestError(f"the line is longer than {MAX_LINE_BYTES} bytes; the connection ends here")
                    await connection.reply(encode_error(error, None))
                    break
                try:
                    request = decode_request(line)
                except RefusedRequest as refused:
                    await connection.reply(encode_error(refused.error, refused.id))
                    continue
                await slots.acquire()
                work = self._answer(connection, request, slots)
                if request.id is None:
                    await work
                else:
                    group.create_task(work)

    async def _answer(self, connection: Connection, request: Request, slots: asyncio.Semaphore) -> None:
        try:
            line = encode_return(await self._handler(connection, request), request.id)
        except EdgeholdError as error:
            line = encode_error(error, request.id)
        except Exception:  # the connection is a boundary: a bug in one request must not end the others
            log.exception("a bug: %s failed", request.command, extra={"peer": str(connection.peer)})
            line = encode_error(EdgeholdError("internal error; the daemon's journal has the details"), request.id)
        finally:
            slots.release()
        await connection.reply(line)


def bind_unix(path: Path, *, mode: int = 0o660, gid: int | None = None) -> socket.socket:
    """A listening stream socket at the path, replacing the remains of a dead daemon.

    Raises:
        UnavailableError: a living process listens there already, or the path can't be used; the text says why.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            # EAGAIN: somebody listens, and his backlog is full.
            if probe.connect_ex(str(path)) in {0, errno.EAGAIN}:
                raise UnavailableError(f"{path}: another process listens there; stop it or set another socket path")
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise UnavailableError(f"{path}: it is there and no socket; set another path", retryable=False)
            path.unlink()
        old = os.umask(0o177)  # nobody gets in between bind and chmod
        try:
            listener.bind(str(path))
        finally:
            os.umask(old)
        if gid is not None:
            os.chown(path, -1, gid)
        path.chmod(mode)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UnavailableError(f"{path}: can't listen there: {error.strerror or error}", retryable=False) from error
    except BaseException:
        listener.close()
        raise
    return listener


class ControlClient:
    """An open conversation with a `ControlServer`. Requests may overlap; events are queued for `events`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, socket_path: Path) -> None:
        self._reader = reader
        self._writer = writer
        self._path = socket_path
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._events: deque[tuple[str, Any]] = deque()
        self._event = asyncio.Event()
        self._gone: EdgeholdError | None = None
        self._task = asyncio.create_task(self._read(), name=f"control client {socket_path}")

    @classmethod
    async def connect(cls, path: Path, *, timeout_s: float = 5.0) -> Self:
        """Open a conversation.

        Raises:
            UnavailableError: nobody listens there.
            DeniedError: this user may not open it.
        """
        try:
            async with asyncio.timeout(timeout_s):
                # An answer may be longer than a request: a list of all partitions is one line.
                reader, writer = await asyncio.open_unix_connection(str(path), limit=64 * MAX_LINE_BYTES)
        except PermissionError as error:
            raise DeniedError(
                f"{path}: this user may not connect; run it as root or join a group with a role"
            ) from error
        except (OSError, TimeoutError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UnavailableError(f"{path}: {reason}; is the daemon running?") from error
        return cls(reader, writer, path)

    async def call(self, command: str, args: dict[str, Any] | None = None, *, timeout_s: float = 30.0) -> Any:
        """Send one request and return what its answer holds.

        Raises:
            EdgeholdError: as the server answered.
            TimedOutError: no answer within ``timeout_s`` seconds; the request may still be carried out.
            UnavailableError: the conversation is over.
        """
        if self._gone is not None:
            raise self._gone
        one = next(self._ids)
        line = encode_request(Request(command, args or {}, one))
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[one] = future
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(line)
                with contextlib.suppress(ConnectionError):  # the reader's end says why
                    await self._writer.drain()
                answer = await future
        except TimeoutError:
            raise TimedOutError(f"{self._path}: no answer to {command} within {timeout_s:g} s") from None
        finally:
            self._waiting.pop(one, None)
        if "error" in answer:
            raise from_wire(answer["error"])
        return answer["return"]

    async def events(self) -> AsyncIterator[tuple[str, Any]]:
        """(name, data) of each event, in order; raises `UnavailableError` when the server goes away."""
        while True:
            while self._events:
                yield self._events.popleft()
            if self._gone is not None:
                raise self._gone
            self._event.clear()
            await self._event.wait()

    async def close(self) -> None:
        """End the conversation."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def _read(self) -> None:
        reason = "the daemon closed the connection"
        try:
            while line := await self._reader.readline():
                answer = decode_answer(line)
                if "event" in answer:
                    if len(self._events) >= MAX_EVENTS_UNREAD:
                        reason = f"{MAX_EVENTS_UNREAD} events came that nobody read"
                        break
                    self._events.append((str(answer["event"]), answer.get("data")))
                    self._event.set()
                elif (future := self._waiting.get(answer.get("id", 0))) is not None and not future.done():
                    future.set_result(answer)
                elif answer.get("id") is None and "error" in answer:
                    reason = from_wire(answer["error"]).message
        except (ConnectionError, ValueError, BadRequestError) as error:
            reason = str(error) or type(error).__name__
        finally:
            self._gone = UnavailableError(f"{self._path}: {reason}")
            self._event.set()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(self._gone)
