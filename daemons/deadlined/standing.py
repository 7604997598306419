"""What is attached at every start: the settings' targets, and those that were attached before the last stop.

Each is in the list of attachments from the start on, with the reason while its target is not there; one is never
refused for good, because what it waits for (vmand, libvirt, a unit) may come later.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from deadlined.held import Attached
from deadlined.targets import Source
from edgehold.api.deadlined import Target
from edgehold.errors import EdgeholdError

log = logging.getLogger(__name__)

_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 30.0


class PendingSource:
    """The source of a target that could not be opened yet."""

    over = ""
    suspended = False

    def __init__(self, target: Target) -> None:
        self.reason = f"{target} is being looked for"

    def changed(self) -> bool:
        return False

    def tids(self) -> tuple[int, ...]:
        return ()

    def forget(self, tid: int) -> None:
        """It has none."""

    def close(self) -> None:
        """Nothing is open."""


async def open_in_time(
    one: Attached, opened: Callable[[], Awaitable[Source]], follow: Callable[[Attached, Source], None]
) -> None:
    """Try to open a pending attachment's target until that works or somebody detaches it."""
    wait_s = _FIRST_RETRY_S
    while isinstance(pending := one.source, PendingSource):
        try:
            source = await opened()
        except (EdgeholdError, OSError) as error:
            if pending.reason != str(error):
                log.warning("attachment %d, %s, has to wait: %s", one.id, one.target, error)
            pending.reason = str(error)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _LAST_RETRY_S)
            continue
        follow(one, source)
        return
