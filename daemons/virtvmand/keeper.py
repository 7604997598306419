"""What happens to domains without a client: transient ones go when they end, autostarts come with the host's boot."""

import asyncio
import logging
from pathlib import Path

from edgehold.errors import EdgeholdError
from edgehold.kernel.procfs import boot_id
from virtvmand.domain import Domain
from virtvmand.driver.context import Context
from virtvmand.driver.run import Run
from virtvmand.errors import LibvirtError

log = logging.getLogger(__name__)

AUTOSTART_ID = "e3b5a8d07c1f4f7fb5a7c0f6a1d2e948"
"""MESSAGE_ID of a domain that was to start with the host and could not."""
_AT_ONCE = 4


class Keeper:
    """Hears of each change of a domain. ``marker``: a file that says in which boot of the host autostarts were done."""

    def __init__(self, context: Context, run: Run, *, marker: Path) -> None:
        self._context = context
        self._run = run
        self._marker = marker
        self._starting = False

    def changed(self, _old: Domain | None, new: Domain | None) -> None:
        """A domain is another than it was, or was found."""
        if new is not None and not new.active and not new.persistent and not self._context.has_turn(new.uuid):
            self._context.spawn(self._reap(new.uuid), f"removal of the transient domain '{new.name}'")

    def synced(self) -> None:
        """vmand is there, and all its partitions are known."""
        if not self._starting and self._due():
            self._starting = True
            self._context.spawn(self._autostart(), "autostart")

    async def _reap(self, uuid: bytes) -> None:
        async with self._context.turn(uuid):
            await self._run.reap(uuid)

    def _due(self) -> bool:
        try:
            return self._marker.read_text() != boot_id()
        except OSError:
            return True

    async def _autostart(self) -> None:
        try:
            slots = asyncio.Semaphore(_AT_ONCE)
            wanted = [one for one in self._context.mirror.all() if one.autostart and one.persistent and not one.active]
            await asyncio.gather(*(self._start(one.uuid, slots) for one in wanted))
            # After them: what a kill of ours cut off is started by the next of us.
            self._marker.write_text(boot_id())
        except OSError as error:
            log.warning("%s: %s; a restart of virtvmand starts autostarted domains again", self._marker, error.strerror)
        finally:
            self._starting = False

    async def _start(self, uuid: bytes, slots: asyncio.Semaphore) -> None:
        async with slots, self._context.turn(uuid):
            one = self._context.mirror.by_uuid(uuid)
            try:
                if not one.active:
                    await self._run.start(one, one.config, paused=False)
                    log.info("domain %s was started with the host", one.name)
            except (EdgeholdError, LibvirtError) as error:
                fields = {"message_id": AUTOSTART_ID, "domain": one.name}
                log.error("domain %s can't be started with the host: %s", one.name, error, extra=fields)  # noqa: TRY400
