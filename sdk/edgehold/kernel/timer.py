"""A timer that wakes an event loop on time: the loop's own ones are of whole milliseconds, and late by one.

epoll_wait(2) takes milliseconds, which asyncio rounds up; a timerfd (timerfd_create(2)) is an event like any other.
"""

import asyncio
import os
from types import TracebackType
from typing import Self

from edgehold.kernel import native


class Timer:
    """One timer of the running loop; use as a context manager. One task waits at a time."""

    def __init__(self) -> None:
        """Raises `OSError`: no descriptor is left."""
        self._fd = native.timer_open()
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._loop.add_reader(self._fd, self._fired)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    async def wait_until(self, at_ns: int) -> None:
        """Until this time of CLOCK_MONOTONIC in nanoseconds (at once where it is past), or until `wake`."""
        self._waiter = self._loop.create_future()
        native.timer_set(self._fd, max(at_ns, 1))
        await self._waiter

    def wake(self) -> None:
        """Let who waits go on now."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fired(self) -> None:
        native.timer_set(self._fd, 0)  # else it stays readable
        self.wake()
