"""What all handlers share: the partitions, the settings, turns on a domain, work that outlives a call."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from edgehold.errors import EdgeholdError
from virtvmand.config import Config
from virtvmand.domain import Domain
from virtvmand.errors import LibvirtError
from virtvmand.guestinfo import CpuTimes
from virtvmand.mirror import Mirror
from virtvmand.xdr import Domain as Named

log = logging.getLogger(__name__)


class _Turn:
    """A lock, and how many have it or wait for it."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0


class Context:
    """One for the whole daemon. ``on_fault`` is called when work that nobody waits for failed by a bug."""

    def __init__(self, *, mirror: Mirror, config: Config, on_fault: Callable[[], None]) -> None:
        self.mirror = mirror
        self.config = config
        self.times = CpuTimes()
        self._on_fault = on_fault
        self._turns: dict[bytes, _Turn] = {}
        self._work: set[asyncio.Task[Any]] = set()

    def find(self, named: Named) -> Domain:
        """The domain that a client names: by its uuid, name and id may be old.

        Raises:
            LibvirtError: there is none.
        """
        return self.mirror.by_uuid(named.uuid)

    @contextlib.asynccontextmanager
    async def turn(self, uuid: bytes) -> AsyncIterator[None]:
        """One change of a domain's definition or run at a time; what takes several steps is not mixed with another."""
        turn = self._turns.setdefault(uuid, _Turn())
        turn.users += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.users -= 1
            if not turn.users:
                del self._turns[uuid]

    def has_turn(self, uuid: bytes) -> bool:
        """Whether somebody changes this domain now."""
        return uuid in self._turns

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Work that goes on when the client that wanted it is gone. What vmand refuses is logged; a bug is a fault."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._work.add(task)
        task.add_done_callback(self._done)
        return task

    async def close(self) -> None:
        """Let go of what is under way; vmand brings to its end what it began."""
        for task in self._work:
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        self.times.close()

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._work.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, LibvirtError | EdgeholdError):
            log.warning("%s: %s", task.get_name(), error)
        else:
            log.critical("a bug: %s failed", task.get_name(), exc_info=error)
            self._on_fault()
