"""How all held threads are sampled at once: by the kernel's own list where it can be read, else one by one.

A pass over the list looks at each thread of the host, whoever's it is, for less than half of what reading the file of
one costs: it is worth it where many of them are held (docs/adr/0005).
"""

import logging
from typing import Any

from edgehold.clock import Clock
from edgehold.errors import UnsupportedError
from edgehold.kernel import taskiter
from edgehold.kernel.taskiter import TaskBuffer, TaskIterator

log = logging.getLogger(__name__)

# So many passes go by until the host's threads are counted again.
_COUNT_AGAIN = 20
Read = tuple[Any, int, int]
"""The records, how many, and when the reading began (CLOCK_MONOTONIC in ns)."""
_NOTHING: Read = (None, 0, 0)


class Tasks:
    """The iterator, opened when it is worth it for the first time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._passes = 0
        self._threads = 0
        self._iterator: TaskIterator | None = None
        self._buffer: TaskBuffer | None = None
        self._why_not = ""
        self._used = False

    def __str__(self) -> str:
        if self._why_not:
            return f"a file for each thread: {self._why_not}"
        now = "read now" if self._used else "at the moment a file for each thread costs less"
        return f"the kernel's list of deadline threads where it is worth it; {now}"

    def read(self, threads: int) -> Read:
        """The list, if it is worth it and can be read."""
        if self._passes % _COUNT_AGAIN == 0:
            self._threads = taskiter.host_threads()
        self._passes += 1
        self._used = not self._why_not and self._threads > 0 and taskiter.pays(held=threads, threads=self._threads)
        if not self._used:
            return _NOTHING
        now = self._clock.monotonic_ns()
        try:
            if self._iterator is None or self._buffer is None:
                self._iterator, self._buffer = TaskIterator.open(), TaskBuffer()
                now = self._clock.monotonic_ns()
            count = self._iterator.read(self._buffer)
        except (UnsupportedError, OSError) as error:
            if isinstance(error, UnsupportedError):
                self._why_not = error.message
                log.info("threads are sampled one by one: %s", error)
            return _NOTHING  # short of descriptors or memory: this time one by one
        return self._buffer.pointer, count, now

    def close(self) -> None:
        """Unload it."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
