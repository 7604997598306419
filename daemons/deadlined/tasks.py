"""How all held threads are sampled at once: by the kernel's own list where it can be read, else one by one.

A pass over the list costs some tens of microseconds on any host and then a tenth of what reading a thread's file does,
so with few threads the files are cheaper.
"""

import logging
from typing import Any

from edgehold.clock import Clock
from edgehold.errors import UnsupportedError
from edgehold.kernel.taskiter import TaskBuffer, TaskIterator

log = logging.getLogger(__name__)

# From so many held threads on the list is read.
_WORTH_IT = 16
Read = tuple[Any, int, int]
"""The records, how many, and when the reading began (CLOCK_MONOTONIC in ns)."""
_NOTHING: Read = (None, 0, 0)


class Tasks:
    """The iterator, opened when it is worth it for the first time."""

    def __init__(self, clock: Clock, *, worth_it: int = _WORTH_IT) -> None:
        self._clock = clock
        self._worth_it = worth_it
        self._iterator: TaskIterator | None = None
        self._buffer: TaskBuffer | None = None
        self._why_not = ""

    def __str__(self) -> str:
        if self._why_not:
            return f"a file for each thread: {self._why_not}"
        return f"the kernel's list of deadline threads, from {self._worth_it} threads on"

    def read(self, threads: int) -> Read:
        """The list, if it is worth it and can be read."""
        if threads < self._worth_it or self._why_not:
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
