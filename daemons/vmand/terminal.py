"""A terminal of ours joined with a stream: what is typed goes there, what comes from there is shown.

The terminal is raw meanwhile (termios(3)), so that the keys reach the other side as they are, ^C too; one key ends it.
However it ends, by a signal as well, the terminal is as it was before. Neither side is waited for: where the other
side does not read or the screen stands still, the key that ends it is heard all the same.
"""

import contextlib
import os
import select
import signal
import socket
import termios
import tty
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from types import FrameType

_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
_READ_BYTES = 16 * 1024
# What poll(2) calls writable takes as much without a wait.
_SHOW_BYTES = 512
_UNSHOWN_BYTES = 64 * 1024
_UNTYPED_BYTES = 64 * 1024
_IN = select.POLLIN | select.POLLHUP | select.POLLERR
_OUT = select.POLLOUT | select.POLLHUP | select.POLLERR


class Why(Enum):
    """What ended it."""

    KEY = "the key"
    TERMINAL = "the terminal is gone"
    GUEST = "the other side"
    SIGNAL = "a signal"


@dataclass(frozen=True, slots=True)
class Ended:
    """What ended it; ``signal`` is its number, else 0."""

    why: Why
    signal: int = 0


@contextlib.contextmanager
def raw(terminal: int) -> Iterator[None]:
    """A terminal that hands on every key and changes nothing that is shown, until the block ends."""
    before = termios.tcgetattr(terminal)
    tty.setraw(terminal, termios.TCSANOW)
    try:
        yield
    finally:
        # Now, not after what is unshown was shown: a screen that stands still would keep us here.
        with contextlib.suppress(termios.error):
            termios.tcsetattr(terminal, termios.TCSANOW, before)


def converse(stream: socket.socket, *, keyboard: int, screen: int, escape: int) -> Ended:
    """Join them until the key ``escape`` (a byte), a signal, or the end of either side. The stream stays the caller's.

    ``keyboard``: a terminal's descriptor. ``screen``: any descriptor that can be written to.

    Raises:
        BrokenPipeError: nobody reads what is written to the screen.
    """
    stream.setblocking(False)
    with _signals() as (wake, caught), raw(keyboard):
        return _Conversation(stream, keyboard=keyboard, screen=screen, escape=escape).run(wake, caught)


class _Conversation:
    def __init__(self, stream: socket.socket, *, keyboard: int, screen: int, escape: int) -> None:
        self._stream = stream
        self._keyboard = keyboard
        self._screen = screen
        self._escape = bytes([escape])
        self._untyped = bytearray()
        self._unshown = bytearray()
        self._over = False

    def run(self, wake: int, caught: list[int]) -> Ended:
        while not caught:
            if self._over and not self._unshown:
                return Ended(Why.GUEST)
            ready = self._ready(wake)
            if self._stream.fileno() in ready:
                self._talk()
            if self._screen in ready and self._unshown:
                del self._unshown[: os.write(self._screen, self._unshown[:_SHOW_BYTES])]
            if self._keyboard in ready and (ended := self._listen()) is not None:
                return ended
        return Ended(Why.SIGNAL, caught[0])

    def _ready(self, wake: int) -> set[int]:
        poll = select.poll()
        wanted = {self._keyboard: _IN, wake: _IN}
        if self._unshown:
            wanted[self._screen] = wanted.get(self._screen, 0) | _OUT
        if not self._over:
            here = _IN if len(self._unshown) < _UNSHOWN_BYTES else 0
            wanted[self._stream.fileno()] = here | (_OUT if self._untyped else 0)
        for fd, events in wanted.items():
            if events:
                poll.register(fd, events)
        return {fd for fd, _events in poll.poll()}

    def _talk(self) -> None:
        """With the other side, as far as it goes without waiting."""
        try:
            with contextlib.suppress(BlockingIOError):
                if self._untyped:
                    del self._untyped[: self._stream.send(self._untyped)]
            with contextlib.suppress(BlockingIOError):
                data = self._stream.recv(_READ_BYTES)
                self._unshown += data
                self._over = not data
        except OSError:
            self._over = True

    def _listen(self) -> Ended | None:
        """What was typed. A side that does not read gets no more than it can be given one day."""
        try:
            data = os.read(self._keyboard, _READ_BYTES)
        except OSError:  # EIO: the terminal hung up
            data = b""
        if not data:
            return Ended(Why.TERMINAL)
        typed, key, _rest = data.partition(self._escape)
        self._untyped += typed[: _UNTYPED_BYTES - len(self._untyped)]
        if not key:
            return None
        self._talk()
        return Ended(Why.KEY)


@contextlib.contextmanager
def _signals() -> Iterator[tuple[int, list[int]]]:
    """A descriptor that is readable, and the numbers, once one of `_SIGNALS` came. One that is ignored stays so."""
    caught: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        caught.append(number)

    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    before = {one: signal.getsignal(one) for one in _SIGNALS}
    old = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        for one, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(one, note)
        yield read, caught
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        signal.set_wakeup_fd(old)
        os.close(read)
        os.close(write)
