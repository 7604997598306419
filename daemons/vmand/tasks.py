"""One owner for the work behind the answers: what is begun is brought to its end, a bug ends the daemon."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from edgehold.errors import EdgeholdError

log = logging.getLogger(__name__)

# How long a stop waits for commands under way; what takes longer is settled at the next start.
_DRAIN_S = 5.0


class Tasks:
    """Starts tasks, and tells of those that failed by a bug."""

    def __init__(self, on_fault: Callable[[], None]) -> None:
        self._on_fault = on_fault
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loops: set[asyncio.Task[Any]] = set()
        self.closing = asyncio.Event()

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run something to its end, whoever asked for it and went away. A bug in it ends the daemon."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self.done)
        return task

    def loop(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        """Run something until the stop, which does not wait for it."""
        task = self.spawn(work, name)
        self._loops.add(task)

    def done(self, task: asyncio.Task[Any]) -> None:
        """A task has ended: where it failed, that is a bug and nobody does its work any more."""
        self._tasks.discard(task)
        self._loops.discard(task)
        if task.cancelled() or (error := task.exception()) is None or isinstance(error, EdgeholdError):
            return
        log.critical("the task %r failed", task.get_name(), exc_info=error)
        self._on_fault()

    async def pause(self, seconds: float) -> bool:
        """Wait; True where the stop has begun meanwhile."""
        try:
            async with asyncio.timeout(seconds):
                await self.closing.wait()
        except TimeoutError:
            pass
        return self.closing.is_set()

    async def close(self) -> None:
        """Let what is under way end, then cancel the rest."""
        self.closing.set()
        for task in list(self._loops):
            task.cancel()
        if work := self._tasks - self._loops:
            await asyncio.wait(work, timeout=_DRAIN_S)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
