"""Lines and descriptors over a connected unix socket: what the control socket's two ends are made of.

Descriptors travel beside the bytes (SCM_RIGHTS, unix(7)). A read ends with the message whose descriptors it took, so
the line that holds the read's last byte is theirs: a sender puts bytes of one line only into a message with
descriptors, and this one does. Whoever is given descriptors closes them; what nobody took is closed here.
"""

import array
import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Iterable, Sequence

from edgehold.errors import BadRequestError, DeniedError, EdgeholdError, FailedError

MAX_FDS = 16
"""Descriptors of one message and of one line."""
# What one read takes, and so what may lie here unread: nothing more is read while a whole line waits to be taken.
_CHUNK_BYTES = 64 * 1024
_FD = array.array("i")
# Room for exactly MAX_FDS: the kernel closes what does not fit and says MSG_CTRUNC.
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_FDS * _FD.itemsize)
# As plain numbers: arithmetic with the socket module's enums costs a microsecond a read.
_TRUNCATED = int(socket.MSG_CTRUNC)
_RECEIVE = int(socket.MSG_CMSG_CLOEXEC)
_SEND = int(socket.MSG_NOSIGNAL)
# `drain` waits above the first until there is less than the second.
_HIGH_BYTES = 64 * 1024
_LOW_BYTES = 16 * 1024

Line = tuple[bytes, tuple[int, ...]]
"""A line with its line feed, and the descriptors that came with it."""


def close_all(fds: Iterable[int]) -> None:
    """Close these descriptors. What close(2) says is of no use: the descriptor is gone either way."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def duplicates(fds: Iterable[int]) -> tuple[int, ...]:
    """Descriptors of our own for the same open files; `close_all` closes them.

    Raises:
        FailedError: this process has no descriptor left.
    """
    made: list[int] = []
    try:
        for fd in fds:
            made.append(os.dup(fd))  # noqa: PERF401 - those before a failure must be known
    except OSError as error:
        close_all(made)
        raise FailedError(f"descriptors can't be kept: {error.strerror}") from error
    return tuple(made)


class LineStream:
    """One end of a conversation: one task reads lines, anybody sends. It owns the socket.

    ``limit``: the longest line that is read, in bytes without its line feed. ``no_fds``: why this peer may send no
    descriptors. The kernel then drops them; they never become ours, whose close(2) may wait for the peer's own file
    system (FUSE).
    """

    def __init__(self, sock: socket.socket, *, limit: int, no_fds: str = "") -> None:
        sock.setblocking(False)
        self._sock = sock
        self._fd = sock.fileno()
        self._limit = limit
        self._no_fds = no_fds
        self._room = 0 if no_fds else _ANCILLARY_BYTES
        self._loop = asyncio.get_running_loop()
        # What was read last, from where it is not taken yet, and its next line feed; its descriptors.
        self._chunk = b""
        self._at = 0
        self._feed = -1
        self._chunk_fds: list[int] = []
        # The beginning of a line whose end is in a chunk still to come, and what came with it.
        self._part = bytearray()
        self._part_fds: list[int] = []
        self._error: EdgeholdError | None = None
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None
        self._unsent: deque[tuple[bytearray, list[int]]] = deque()
        self._unsent_bytes = 0
        self._drained: list[asyncio.Future[None]] = []
        self._deaf = False
        self._closed = False
        self._reading = False

    @property
    def unsent_bytes(self) -> int:
        """What the peer has not made room for yet; what lies in the socket's own buffer is not counted."""
        return self._unsent_bytes

    @property
    def unsent_fds(self) -> int:
        """The descriptors that wait with those bytes."""
        return sum(len(fds) for _data, fds in self._unsent)

    async def readline(self) -> Line | None:
        """The next line, or None at the end of the conversation; half a line at the end is nobody's.

        Raises:
            BadRequestError: a line is too long, or too many descriptors came; nothing is read after that.
            DeniedError: descriptors came from a peer that may send none; the same.
        """
        while self._feed < 0:
            if self._ended:
                self._forget()
                if self._error is not None:
                    raise self._error
                return None
            if not self._reading:
                self._reading = True
                self._loop.add_reader(self._fd, self._readable)
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._cut()

    def send(self, line: bytes, fds: Sequence[int] = ()) -> None:
        """Send a line, or queue what the peer has no room for. Does nothing where the peer is gone.

        The descriptors stay the caller's, who may close them at once.

        Raises:
            ValueError: more than `MAX_FDS` descriptors.
            OSError: a descriptor is not open (EBADF) or can't be sent or kept (ETOOMANYREFS, EMFILE); nothing was sent.
        """
        if len(fds) > MAX_FDS:
            raise ValueError(f"{len(fds)} descriptors for one line; {MAX_FDS} may go with it")
        if self._deaf:
            return
        sent = 0
        if not self._unsent:
            try:
                sent = self._transmit(line, fds)
            except OSError as error:
                if fds and not isinstance(error, ConnectionError):
                    raise
                self._give_up(error)
                return
            if sent == len(line):
                return
        self._queue(line[sent:] if sent else line, () if sent else fds)

    async def drain(self) -> None:
        """Wait while the peer has much to read; at once where it is gone."""
        # Again and again: one of those that waited may have sent much before the next comes to it.
        while self._unsent_bytes > _HIGH_BYTES and not self._deaf:
            room: asyncio.Future[None] = self._loop.create_future()
            self._drained.append(room)
            try:
                await room
            finally:
                self._drained.remove(room)

    def close(self) -> None:
        """End the conversation now: what is unsent is dropped, descriptors that nobody took are closed."""
        if self._closed:
            return
        self._closed = True
        self._deafen()
        self._end()
        self._forget()
        self._sock.close()

    def _readable(self) -> None:
        if self._feed >= 0:  # a line is enough: what comes after this chunk stays with the kernel, and the sender waits
            self._pause()
            return
        try:
            data, ancillary, flags, _address = self._sock.recvmsg(_CHUNK_BYTES, self._room, _RECEIVE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # a reset: the peer left with something unread
            self._end()
            return
        fds = _descriptors(ancillary) if ancillary else []
        if flags & _TRUNCATED:
            close_all(fds)
            fds = []
            data = data[: data.rfind(b"\n", 0, -1) + 1]  # the lines before the one that they came with
            self._fail(self._lost())
        elif not data:
            self._end()
            return
        self._chunk, self._chunk_fds, self._at = data, fds, 0
        self._next()
        if self._feed >= 0:
            self._wake_reader()

    def _next(self) -> None:
        """Find the chunk's next line; what is left where there is none begins the line that the next chunk ends."""
        self._feed = self._chunk.find(b"\n", self._at)
        if self._feed < 0:
            self._part += self._chunk[self._at :]
            self._part_fds = self._part_fds + self._chunk_fds  # a new list: `_cut` may hold the old one
            self._chunk, self._chunk_fds = b"", []
            if len(self._part) > self._limit or len(self._part_fds) > MAX_FDS:
                self._fail(self._refusal(len(self._part)))

    def _cut(self) -> Line:
        """Take the chunk's next line; the descriptors are those of the line that holds the chunk's last byte."""
        line, fds = self._chunk[self._at : self._feed + 1], self._part_fds
        self._at = self._feed + 1
        if self._part:
            line = bytes(self._part) + line
            self._part, self._part_fds = bytearray(), []
        if self._at < len(self._chunk):
            self._next()
        else:
            fds = fds + self._chunk_fds
            self._chunk, self._chunk_fds, self._feed = b"", [], -1
        if len(line) - 1 > self._limit or len(fds) > MAX_FDS:
            close_all(fds)
            error = self._refusal(len(line) - 1)
            self._fail(error)
            self._forget()
            raise error
        return line, tuple(fds)

    def _refusal(self, size: int) -> EdgeholdError:
        if size > self._limit:
            return BadRequestError(f"the line is longer than {self._limit} bytes; the connection ends here")
        return BadRequestError(f"more than {MAX_FDS} descriptors came with one line; the connection ends here")

    def _lost(self) -> EdgeholdError:
        if self._no_fds:
            return DeniedError(f"{self._no_fds}; the connection ends here")
        what = f"more than {MAX_FDS} descriptors came at once, or there is no room for another in this process"
        return BadRequestError(f"{what}; the connection ends here")

    def _fail(self, error: EdgeholdError) -> None:
        if self._error is None:
            self._error = error
        self._end()

    def _end(self) -> None:
        """Nothing more is read; lines that are here already may be taken."""
        self._ended = True
        self._pause()
        self._wake_reader()

    def _forget(self) -> None:
        close_all(self._part_fds)
        close_all(self._chunk_fds)
        self._part, self._part_fds = bytearray(), []
        self._chunk, self._chunk_fds, self._feed = b"", [], -1

    def _wake_reader(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _pause(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def _transmit(self, data: bytes | bytearray, fds: Sequence[int]) -> int:
        """How many bytes went; the descriptors went with the first of them."""
        try:
            if not fds:
                return self._sock.send(data, _SEND)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
            return self._sock.sendmsg([data], [rights], _SEND)
        except (BlockingIOError, InterruptedError):
            return 0

    def _queue(self, data: bytes, fds: Sequence[int]) -> None:
        kept: list[int] = []
        try:
            for fd in fds:
                kept.append(os.dup(fd))  # noqa: PERF401 - those before the one that fails have to be closed
        except OSError:
            close_all(kept)
            raise
        if not self._unsent:
            self._loop.add_writer(self._fd, self._writable)
        if self._unsent and not kept and not self._unsent[-1][1]:
            self._unsent[-1][0].extend(data)
        else:
            self._unsent.append((bytearray(data), kept))
        self._unsent_bytes += len(data)

    def _writable(self) -> None:
        while self._unsent:
            data, fds = self._unsent[0]
            try:
                sent = self._transmit(data, fds)
            except OSError as error:
                self._give_up(error)
                return
            if not sent:
                break
            close_all(fds)
            fds.clear()
            self._unsent_bytes -= sent
            if sent == len(data):
                self._unsent.popleft()
            else:
                del data[:sent]
        if not self._unsent:
            self._loop.remove_writer(self._fd)
        if self._unsent_bytes < _LOW_BYTES:
            self._wake()

    def _give_up(self, error: OSError) -> None:
        """The peer is gone: what it sent before is still read. Any other error loses an answer, so all ends."""
        self._deafen()
        if not isinstance(error, ConnectionError):
            self._end()

    def _deafen(self) -> None:
        """Nothing more is sent; what is unsent is dropped."""
        self._deaf = True
        if self._unsent:
            self._loop.remove_writer(self._fd)
        for _data, fds in self._unsent:
            close_all(fds)
        self._unsent.clear()
        self._unsent_bytes = 0
        self._wake()

    def _wake(self) -> None:
        for room in self._drained:
            if not room.done():
                room.set_result(None)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return found.tolist()
