"""Time as a parameter: monotonic nanoseconds inside, wall time only at the edges."""

import time
from typing import Protocol

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000


class Clock(Protocol):
    """What a daemon may ask of time; tests pass their own."""

    def monotonic_ns(self) -> int:
        """Nanoseconds of CLOCK_MONOTONIC (clock_gettime(2)): for intervals and deadlines."""
        ...

    def wall_s(self) -> float:
        """Seconds since the epoch: for people and for messages, never for intervals."""
        ...


class SystemClock:
    """The kernel's clocks."""

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()

    def wall_s(self) -> float:
        return time.time()
