"""Whether any thread was created on this host: the last thread id that the kernel gave (proc_loadavg(5)).

One read of a small file instead of a look at every process: while no id was given, nobody has a new thread. Ids that
were given are not yet threads that can be seen: between the two lies the rest of a fork.
"""

import contextlib
import os
from pathlib import Path

from edgehold.clock import NS_PER_MS, Clock, SystemClock

UNKNOWN = -1


class Births:
    """Keeps one descriptor. `close` it, or use it as a context manager's ``contextlib.closing``."""

    def __init__(self, path: Path = Path("/proc/loadavg"), *, clock: Clock | None = None) -> None:
        """Never raises: where the file can't be read (ProcSubset=pid), `last` says `UNKNOWN`."""
        self._clock = clock or SystemClock()
        self._at_ns = 0
        self._last = UNKNOWN
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def last(self) -> int:
        """The id that was given last in this process-id namespace, not older than a millisecond; or `UNKNOWN`."""
        now_ns = self._clock.monotonic_ns()
        if self._fd >= 0 and now_ns - self._at_ns >= NS_PER_MS:
            self._at_ns = now_ns
            try:
                self._last = int(os.pread(self._fd, 128, 0).split()[-1])
            except (OSError, ValueError, IndexError):
                self._last = UNKNOWN
        return self._last

    def close(self) -> None:
        """Idempotent; afterwards `last` says `UNKNOWN`."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._last = -1, UNKNOWN
