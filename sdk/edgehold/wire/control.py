"""The control socket: JSON lines and descriptors over a unix socket, server and client.

The server answers in order what has no id, and concurrently what has one; it bounds everything that a peer could make
it hold: the line, the depth, the requests under way, descriptors, the bytes not read, the connections. It must not know
any command.
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
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from edgehold.errors import (
    BadRequestError,
    DeniedError,
    EdgeholdError,
    NoCapacityError,
    TimedOutError,
    UnavailableError,
    from_wire,
)
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
from edgehold.wire.stream import MAX_FDS, LineStream, close_all

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
ROOT_CONNECTIONS = 16
MAX_CONNECTIONS_OF_A_USER = 24
MAX_INFLIGHT = 16
# What a peer has not read yet. A reader that is slower than this is cut off, so that it holds no memory of ours.
MAX_UNREAD_BYTES = 1024 * 1024
MAX_UNREAD_FDS = 64
# The descriptors of all requests under way, far from the 1024 that a process has where nobody gave it more.
MAX_HELD_FDS = 256
MAX_EVENTS_UNREAD = 10_000
# No descriptor or memory for another connection (accept(2)): try again after this, as asyncio's own server does.
_ACCEPT_PAUSE_S = 1.0
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
# Somebody listens, and his backlog is full (EAGAIN of connect(2)): nothing tells when there is room.
_BACKLOG_PAUSE_S = 0.01


@dataclass(frozen=True, slots=True)
class Answer:
    """What a handler returns to send descriptors with its answer: the server closes them, whatever happens."""

    value: Any
    fds: tuple[int, ...] = ()


Handler = Callable[["Connection", Request], Awaitable[Any]]


class Connection:
    """One peer of the server: who it is, what it may do, and a way to send it events."""

    def __init__(self, stream: LineStream, peer: Peer, role: Role) -> None:
        self._stream = stream
        self.peer = peer
        self.role = role
        self.on_close: list[Callable[[], None]] = []

    def send_event(self, name: str, data: Any) -> None:
        """Queue an event; a peer that does not read is cut off instead of being waited for."""
        self.send(encode_event(name, data))

    def send(self, line: bytes, fds: Sequence[int] = ()) -> None:
        """Queue a line; the descriptors stay the caller's, who may close them at once.

        Raises:
            ValueError, OSError: as `LineStream.send`; never without descriptors.
        """
        stream = self._stream
        # One answer may be longer than that, as a list of all partitions: it goes where nothing waits before it.
        if (stream.unsent_bytes and stream.unsent_bytes + len(line) > MAX_UNREAD_BYTES) or (
            fds and stream.unsent_fds + len(fds) > MAX_UNREAD_FDS
        ):
            log.warning("cutting off a peer that does not read", extra={"peer": str(self.peer)})
            stream.close()
        else:
            stream.send(line, fds)

    async def reply(self, line: bytes) -> None:
        """Send an answer, and wait while the peer has much to read: its next request then waits, not our memory."""
        self.send(line)
        await self.drain()

    async def drain(self) -> None:
        """Wait while the peer has much to read; at once where it is gone."""
        if self._stream.unsent_bytes:
            await self._stream.drain()


class ControlServer:
    """Serves one handler on listening unix sockets. The handler raises `EdgeholdError` to refuse."""

    def __init__(self, handler: Handler, *, roles: Roles) -> None:
        self._handler = handler
        self._roles = roles
        self._listeners: list[socket.socket] = []
        self._serving: dict[asyncio.Task[None], int] = {}
        self._held_fds = 0
        self._told_full = False

    async def listen(self, listener: socket.socket) -> None:
        """Accept on a bound and listening socket; this object owns it from now on."""
        listener.setblocking(False)
        self._listeners.append(listener)
        self._accept_on(listener)

    async def close(self) -> None:
        """Stop accepting, end every conversation, wait for the requests under way to be cancelled."""
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        self._listeners.clear()
        for task in list(self._serving):
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def _accept_on(self, listener: socket.socket) -> None:
        if listener in self._listeners:  # close() may have come during the pause
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            sock, _address = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            log.warning("can't accept a connection: %s; trying again in %g s", error.strerror, _ACCEPT_PAUSE_S)
            loop.remove_reader(listener)
            loop.call_later(_ACCEPT_PAUSE_S, self._accept_on, listener)
            return
        try:
            peer = peer_of(sock)
            role = self._roles.role_of(peer)
        except BaseException:
            sock.close()
            raise
        if self._is_full(peer):
            sock.close()
            return
        no_fds = "" if role >= Role.OPERATE else "descriptors need the role operate"
        stream = LineStream(sock, limit=MAX_LINE_BYTES, no_fds=no_fds)
        connection = Connection(stream, peer, role)
        task = loop.create_task(self._serve(connection, stream), name=f"control connection of {peer}")
        self._serving[task] = peer.uid
        # Not in the task: one that is cancelled before its first step runs none of its code.
        task.add_done_callback(partial(self._end, connection, stream))

    async def _serve(self, connection: Connection, stream: LineStream) -> None:
        try:
            require(connection.role, Role.READ, "a conversation")  # whoever may do nothing must not hold a connection
            await self._converse(connection, stream)
        except EdgeholdError as error:
            await connection.reply(encode_error(error, None))

    def _end(self, connection: Connection, stream: LineStream, task: asyncio.Task[None]) -> None:
        self._serving.pop(task, None)
        stream.close()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a bug: a conversation failed", exc_info=error, extra={"peer": str(connection.peer)})
        for callback in connection.on_close:
            callback()

    def _is_full(self, peer: Peer) -> bool:
        """No user may take all connections from the others; root gets in when the rest is taken."""
        uids = list(self._serving.values())
        room = MAX_CONNECTIONS if peer.uid == 0 else MAX_CONNECTIONS - ROOT_CONNECTIONS
        full = len(uids) >= room or (peer.uid != 0 and uids.count(peer.uid) >= MAX_CONNECTIONS_OF_A_USER)
        if full and not self._told_full:
            log.warning("refusing connections, %d are open; told once until one is accepted again", len(uids))
        self._told_full = full
        return full

    async def _converse(self, connection: Connection, stream: LineStream) -> None:
        slots = asyncio.Semaphore(MAX_INFLIGHT)
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    came = await stream.readline()
                except EdgeholdError as error:  # what can't be read ends the connection, with a reason
                    await connection.reply(encode_error(error, None))
                    break
                if came is None:
                    break  # the peer went away, its right; half a line is nobody's request
                line, fds = came
                try:
                    request = decode_request(line, fds)
                    self._hold(request)
                except RefusedRequest as refused:
                    close_all(fds)
                    await connection.reply(encode_error(refused.error, refused.id))
                    continue
                try:
                    await slots.acquire()
                except asyncio.CancelledError:
                    self._release(request)
                    raise
                work = self._answer(connection, request, slots)
                if request.id is None:
                    await work
                else:
                    group.create_task(work)

    async def _answer(self, connection: Connection, request: Request, slots: asyncio.Semaphore) -> None:
        passed: tuple[int, ...] = ()
        try:
            answer = await self._handler(connection, request)
            if isinstance(answer, Answer):
                answer, passed = answer.value, answer.fds
            connection.send(encode_return(answer, request.id), passed)
        except EdgeholdError as error:
            connection.send(encode_error(error, request.id))
        except Exception:  # the connection is a boundary: a bug in one request must not end the others
            log.exception("a bug: %s failed", request.command, extra={"peer": str(connection.peer)})
            internal = EdgeholdError("internal error; the daemon's journal has the details")
            connection.send(encode_error(internal, request.id))
        finally:
            close_all(passed)
            self._release(request)
            slots.release()
        await connection.drain()

    def _hold(self, request: Request) -> None:
        """Count the request's descriptors until `_release`."""
        if self._held_fds + len(request.fds) > MAX_HELD_FDS:
            text = f"requests under way hold {self._held_fds} descriptors, and {MAX_HELD_FDS} is the most; try again"
            raise RefusedRequest(NoCapacityError(text), request.id)
        self._held_fds += len(request.fds)

    def _release(self, request: Request) -> None:
        self._held_fds -= len(request.fds)
        close_all(request.fds)


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


class _Call:
    """A request that waits for its answer, and the descriptors that came with that until somebody takes them."""

    __slots__ = ("answer", "fds")

    def __init__(self) -> None:
        self.answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.fds: tuple[int, ...] = ()


class ControlClient:
    """An open conversation with a `ControlServer`. Requests may overlap; events are queued for `events`."""

    def __init__(self, stream: LineStream, socket_path: Path, on_event: Callable[[str, Any], None] | None) -> None:
        self._stream = stream
        self._path = socket_path
        self._on_event = on_event or self._queue_event
        self._ids = itertools.count(1)
        self._waiting: dict[int, _Call] = {}
        self._events: deque[tuple[str, Any]] = deque()
        self._event = asyncio.Event()
        self._gone: EdgeholdError | None = None
        self._task = asyncio.create_task(self._read(), name=f"control client {socket_path}")

    @classmethod
    async def connect(
        cls, path: Path, *, timeout_s: float = 5.0, on_event: Callable[[str, Any], None] | None = None
    ) -> Self:
        """Open a conversation.

        ``on_event``: called with name and data of each event in the order of the wire, before whoever waits for an
        answer that came later goes on; `events` then only tells of the end.

        Raises:
            UnavailableError: nobody listens there.
            DeniedError: this user may not open it.
        """
        try:
            async with asyncio.timeout(timeout_s):
                sock = await _connected(path)
        except PermissionError as error:
            raise DeniedError(
                f"{path}: this user may not connect; run it as root or join a group with a role"
            ) from error
        except (OSError, TimeoutError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UnavailableError(f"{path}: {reason}; is the daemon running?") from error
        # An answer may be longer than a request: a list of all partitions is one line.
        return cls(LineStream(sock, limit=64 * MAX_LINE_BYTES), path, on_event)

    async def call(
        self, command: str, args: dict[str, Any] | None = None, *, timeout_s: float = 30.0, fds: Sequence[int] = ()
    ) -> Any:
        """Send one request and return what its answer holds. The descriptors stay the caller's.

        Raises:
            EdgeholdError: as the server answered.
            BadRequestError: the request is too long, or a descriptor can't be sent.
            TimedOutError: no answer within ``timeout_s`` seconds; the request may still be carried out.
            UnavailableError: the conversation is over.
        """
        value, came = await self.call_with_fds(command, args, timeout_s=timeout_s, fds=fds)
        close_all(came)
        return value

    async def call_with_fds(
        self, command: str, args: dict[str, Any] | None = None, *, timeout_s: float = 30.0, fds: Sequence[int] = ()
    ) -> tuple[Any, list[int]]:
        """As `call`, with the descriptors that came with the answer: the caller owns and closes them."""
        if self._gone is not None:
            raise self._gone
        one = next(self._ids)
        line = encode_request(Request(command, args or {}, one))
        waiting = self._waiting[one] = _Call()
        try:
            async with asyncio.timeout(timeout_s):
                self._send(line, fds)
                if self._stream.unsent_bytes:
                    await self._stream.drain()
                answer = await waiting.answer
            if "error" in answer:
                raise from_wire(answer["error"])
            came, waiting.fds = list(waiting.fds), ()
            return answer["return"], came
        except TimeoutError:
            raise TimedOutError(f"{self._path}: no answer to {command} within {timeout_s:g} s") from None
        finally:
            self._waiting.pop(one, None)
            close_all(waiting.fds)

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
        """End the conversation. What an ``on_event`` raised comes out here."""
        self._task.cancel()
        try:
            await asyncio.wait({self._task})  # it never takes a cancellation of the caller for the reader's
        finally:
            self._stream.close()
        if not self._task.cancelled():
            self._task.result()

    def _send(self, line: bytes, fds: Sequence[int]) -> None:
        if len(fds) > MAX_FDS:
            raise BadRequestError(f"fds: {len(fds)} descriptors; {MAX_FDS} may go with one request")
        try:
            self._stream.send(line, fds)
        except OSError as error:
            raise BadRequestError(f"fds: can't send the descriptors {list(fds)}: {error.strerror}") from error

    def _queue_event(self, name: str, data: Any) -> None:
        if len(self._events) >= MAX_EVENTS_UNREAD:
            raise BadRequestError(f"{MAX_EVENTS_UNREAD} events came that nobody read")
        self._events.append((name, data))
        self._event.set()

    async def _read(self) -> None:
        reason = "the daemon closed the connection"
        try:
            while (came := await self._stream.readline()) is not None:
                line, fds = came
                try:
                    answer = decode_answer(line)
                    if "event" in answer:
                        self._on_event(str(answer["event"]), answer.get("data"))
                    elif (waiting := self._waiting.get(answer.get("id", 0))) is not None and not waiting.answer.done():
                        waiting.fds, fds = fds, ()
                        waiting.answer.set_result(answer)
                    elif answer.get("id") is None and "error" in answer:
                        reason = from_wire(answer["error"]).message
                finally:
                    close_all(fds)  # those that nobody asked for
        except BadRequestError as error:
            reason = str(error)
        finally:
            self._gone = UnavailableError(f"{self._path}: {reason}")
            self._event.set()
            for waiting in self._waiting.values():
                if not waiting.answer.done():
                    waiting.answer.set_exception(self._gone)


async def _connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        while True:
            try:
                sock.connect(str(path))
            except BlockingIOError:  # never EINPROGRESS on a unix socket
                await asyncio.sleep(_BACKLOG_PAUSE_S)
            else:
                return sock
    except BaseException:
        sock.close()
        raise
