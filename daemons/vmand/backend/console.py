"""A guest's serial console: the last 64 KiB of it, and whole lines to whoever watches.

What the guest prints while no vmand is connected is lost: QEMU does not keep it.
"""

import asyncio
import codecs
import contextlib
from collections.abc import Callable
from pathlib import Path

from edgehold.errors import TimedOutError

KEEP_BYTES = 64 * 1024
_READ_BYTES = 16 * 1024
_RETRY_S = 0.01
# A prompt ends without a line break: it is handed on when nothing has followed for so long.
_IDLE_S = 0.5
_LINE_LIMIT = 4096


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

    async def drain(self, timeout_s: float) -> None:
        """Read what a dead QEMU left in the socket, until its end."""
        await asyncio.wait({self.task}, timeout=timeout_s)

    async def close(self) -> None:
        """Let go."""
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        self.flush()

    async def _read(self) -> None:
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(str(self._path), limit=_READ_BYTES)
                break
            except OSError:
                await asyncio.sleep(_RETRY_S)
        self._connected.set()
        try:
            while data := await reader.read(_READ_BYTES):
                self._feed(data)
        except OSError:
            pass
        finally:
            writer.close()

    def _feed(self, data: bytes) -> None:
        self._kept += data
        del self._kept[:-KEEP_BYTES]
        self._unsent += self._decoder.decode(data)
        lines, newline, rest = self._unsent.rpartition("\n")
        if newline:
            self._unsent = rest
            self._on_text(lines + newline)
        if len(self._unsent) > _LINE_LIMIT:
            self.flush()
        elif self._unsent and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_IDLE_S, self.flush)
