"""What happens to domains without a client: transient ones go when they end, autostarts come with the host's boot."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from edgehold.errors import EdgeholdError, UnavailableError
from edgehold.kernel.procfs import boot_id
from virtvmand.domain import Domain
from virtvmand.driver.context import Context
from virtvmand.driver.run import Run
from virtvmand.errors import LibvirtError

log = logging.getLogger(__name__)

AUTOSTART_ID = "e3b5a8d07c1f4f7fb5a7c0f6a1d2e948"
"""MESSAGE_ID of a domain that was to start with the host and could not."""
_AT_ONCE = 4
_AGAIN_S, _AGAIN_MOST_S = 0.5, 30.0


class Keeper:
    """Hears of each change of a domain. ``marker``: a file that says in which boot of the host autostarts were done."""

    def __init__(self, context: Context, run: Run, *, marker: Path) -> None:
        self._context = context
        self._run = run
        self._marker = marker
        self._starting = False
        self._removing: set[bytes] = set()

    def changed(self, _old: Domain | None, new: Domain | None) -> None:
        """A domain is another than it was, or was found."""
        if new is not None and not new.active and not new.persistent:
            self._remove(new)

    def synced(self) -> None:
        """vmand is there, and all its partitions are known."""
        for one in self._context.mirror.all():
            if not one.active and not one.persistent:
                self._remove(one)
        if not self._starting and self._due():
            self._starting = True
            self._context.spawn(self._autostart(), "autostart")

    def _remove(self, one: Domain) -> None:
        """Begin to remove a transient domain that has ended. In its turn it is looked at again: it may be about to be
        started for the first time."""
        if one.uuid not in self._removing:
            self._removing.add(one.uuid)
            self._context.spawn(self._reap(one.uuid), f"removal of the transient domain '{one.name}'")

    async def _reap(self, uuid: bytes) -> None:
        try:
            async for _ in _pauses():
                try:
                    async with self._context.turn(uuid):
                        self._removing.discard(uuid)  # from here on it may end once more
                        await self._run.reap(uuid)
                        return
                except EdgeholdError as error:
                    if not error.retryable or isinstance(error, UnavailableError):
                        raise  # with vmand away: when it is back, `synced` comes again
        finally:
            self._removing.discard(uuid)

    def _due(self) -> bool:
        try:
            return self._marker.read_text() != boot_id()
        except OSError:
            return True

    async def _autostart(self) -> None:
        try:
            wanted = [one for one in self._context.mirror.all() if one.autostart and one.persistent and not one.active]
            slots = asyncio.Semaphore(_AT_ONCE)
            async with asyncio.TaskGroup() as group:
                for one in wanted:
                    group.create_task(self._start(one.uuid, one.name, slots))
            # After them: what a kill of ours cut off is started by the next of us.
            self._marker.write_text(boot_id())
        except OSError as error:
            log.warning("%s: %s; a restart of virtvmand starts autostarted domains again", self._marker, error.strerror)
        finally:
            self._starting = False

    async def _start(self, uuid: bytes, name: str, slots: asyncio.Semaphore) -> None:
        """Until it runs, or is refused for good: after a boot, memory is taken anew, and vmand may come and go."""
        async for _ in _pauses():
            try:
                async with slots, self._context.turn(uuid):
                    one = self._context.mirror.by_uuid(uuid)
                    if not one.active:
                        await self._run.start(one, one.config, paused=False)
                        log.info("domain %s was started with the host", name)
                    return
            except (EdgeholdError, LibvirtError) as error:
                fields = {"message_id": AUTOSTART_ID, "domain": name}
                if not error.retryable:
                    log.error("domain %s can't be started with the host: %s", name, error, extra=fields)  # noqa: TRY400
                    return
                log.warning("domain %s can't be started with the host yet: %s", name, error)


async def _pauses() -> AsyncIterator[None]:
    """At once, and again and again, each time after a longer while."""
    pause_s = _AGAIN_S
    while True:
        yield
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _AGAIN_MOST_S)
