"""A guest's serial console: the last 64 KiB of it, and whole lines to whoever watches.

What the guest prints while no vmand is connected is lost: QEMU does not keep it.
"""

import asyncio
import codecs
import contextlib
import logging
import select
import socket
from collections.abc import Callable
from pathlib import Path

from edgehold.errors import NoCapacityError, TimedOutError

KEEP_BYTES = 64 * 1024
_READ_BYTES = 16 * 1024
_RETRY_S = 0.01
# A prompt ends without a line break: it is handed on when nothing has followed for so long.
_IDLE_S = 0.5
_LINE_LIMIT = 4096
VIEWERS = 8
_UNREAD_BYTES = 4 * KEEP_BYTES
_TYPED_BYTES = 4096
_TYPE_AGAIN_S = 0.1

log = logging.getLogger(__name__)


class Viewer:
    """One who is attached. It is never waited for: who leaves too much unread is cut off."""

    def __init__(
        self, stream: socket.socket, *, type_in: Callable[[bytes], bool], gone: Callable[["Viewer"], None]
    ) -> None:
        self._stream = stream
        self._type_in = type_in
        self._gone = gone
        self._unread = bytearray()
        self._untyped = b""
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.TimerHandle | None = None
        self._loop.add_reader(stream, self._on_typed)

    def show(self, data: bytes) -> None:
        """Give it what the guest printed."""
        if self._stream.fileno() < 0 or not data:
            return
        idle = not self._unread
        self._unread += data
        if idle:
            self._send()
        if len(self._unread) > _UNREAD_BYTES:
            log.warning("cutting off a viewer of a console that does not read")
            self.close()

    def has_left(self) -> bool:
        """Whether it has hung up. What it typed last may still wait for the guest: until then its end is not read."""
        poll = select.poll()
        poll.register(self._stream, select.POLLRDHUP)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Hang up. Idempotent."""
        if self._stream.fileno() < 0:
            return
        if self._again is not None:
            self._again.cancel()
        with contextlib.suppress(OSError):
            self._stream.send(self._unread)  # what fits into the socket is still read
        self._loop.remove_reader(self._stream)
        self._loop.remove_writer(self._stream)
        self._stream.close()
        self._gone(self)

    def _send(self) -> None:
        try:
            sent = self._stream.send(self._unread)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._unread.clear()
            self.close()
            return
        del self._unread[:sent]
        if self._unread:
            self._loop.add_writer(self._stream, self._send)
        else:
            self._loop.remove_writer(self._stream)

    def _on_typed(self) -> None:
        try:
            data = self._stream.recv(_TYPED_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._untyped = data
        self._hand_on()

    def _hand_on(self) -> None:
        """A guest that does not read its console is given no more: then its typist waits, not our memory."""
        self._again = None
        if self._type_in(self._untyped):
            self._loop.add_reader(self._stream, self._on_typed)
        else:
            self._loop.remove_reader(self._stream)
            self._again = self._loop.call_later(_TYPE_AGAIN_S, self._hand_on)


class Console:
    """Reads the socket of QEMU's character device until it is closed."""

    def __init__(self, path: Path, on_text: Callable[[str], None], *, who: str) -> None:
        self._path = path
        self._who = who
        self._on_text = on_text
        self._kept = bytearray()
        self._unsent = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._timer: asyncio.TimerHandle | None = None
        self._viewers: set[Viewer] = set()
        self._writer: asyncio.StreamWriter | None = None
        self._connected = asyncio.Event()
        self.task = asyncio.create_task(self._read(), name=f"console of {who}")

    @property
    def text(self) -> str:
        """The last output."""
        return self._kept.decode(errors="replace")

    async def wait_connected(self, timeout_s: float) -> None:
        """Until it is connected: what is printed from then on is not lost.

        Raises:
            TimedOutError: it was not in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._connected.wait()
        except TimeoutError:
            raise TimedOutError(f"the console of {self._who} does not connect within {timeout_s:g} s") from None

    def flush(self) -> None:
        """Hand on what has no line break yet."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        text, self._unsent = self._unsent, ""
        if text:
            self._on_text(text)

    def attach(self) -> socket.socket:
        """A stream with the console: its last output, then what it prints; what is written to it is typed.

        Raises:
            NoCapacityError: as many as may be are attached, or this process has no descriptor left.
        """
        if len(self._viewers) >= VIEWERS:
            for one in [viewer for viewer in self._viewers if viewer.has_left()]:
                one.close()
        if len(self._viewers) >= VIEWERS:
            raise NoCapacityError(f"{VIEWERS} are attached to the console of {self._who}; one of them must leave first")
        try:
            here, there = socket.socketpair()
        except OSError as error:
            raise NoCapacityError(f"the console of {self._who} can't be attached: {error.strerror}") from error
        here.setblocking(False)
        viewer = Viewer(here, type_in=self._type, gone=self._viewers.discard)
        self._viewers.add(viewer)
        viewer.show(bytes(self._kept))
        return there

    def _type(self, data: bytes) -> bool:
        """Hand on what was typed; False where the guest does not take more now."""
        writer = self._writer
        if writer is None or writer.is_closing():
            return True  # nobody is there to hear it
        if writer.transport.get_write_buffer_size() > _TYPED_BYTES:
            return False
        writer.write(data)
        return True

    async def drain(self, timeout_s: float) -> None:
        """Read what a dead QEMU left in the socket, until its end."""
        await asyncio.wait({self.task}, timeout=timeout_s)

    async def close(self) -> None:
        """Let go."""
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        self._hang_up()
        self.flush()

    def _hang_up(self) -> None:
        for viewer in list(self._viewers):
            viewer.close()

    async def _read(self) -> None:
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(str(self._path), limit=_READ_BYTES)
                break
            except OSError:
                await asyncio.sleep(_RETRY_S)
        self._writer = writer
        self._connected.set()
        try:
            while data := await reader.read(_READ_BYTES):
                self._feed(data)
        except OSError:
            pass
        finally:
            self._writer = None
            writer.close()
            self._hang_up()

    def _feed(self, data: bytes) -> None:
        self._kept += data
        del self._kept[:-KEEP_BYTES]
        for viewer in list(self._viewers):
            viewer.show(data)
        self._unsent += self._decoder.decode(data)
        lines, newline, rest = self._unsent.rpartition("\n")
        if newline:
            self._unsent = rest
            self._on_text(lines + newline)
        if len(self._unsent) > _LINE_LIMIT:
            self.flush()
        elif self._unsent and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_IDLE_S, self.flush)
