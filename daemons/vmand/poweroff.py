"""How a guest is asked to power off: the button, pressed until it obeys, the time is over, or somebody is in a hurry.

It must not end a guest, nor write anything down.
"""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from edgehold.api.vmand import State
from edgehold.clock import NS_PER_S, Clock
from edgehold.errors import BadStateError, FailedError, TimedOutError, UnavailableError
from vmand.backend import Backend, Finding
from vmand.model import Found, Record

T = TypeVar("T")
log = logging.getLogger(__name__)

HURRIED = "it was asked for"
"""Why a guest is not waited for any longer: somebody wants it to be ended by force."""
_PRESS_EVERY_S = 2.0
# A firmware is busy with a press for that long, and says nothing else meanwhile.
_LOOK_FOR_S, _LOOK_EVERY_S = 3.0, 0.1


class PowerOff:
    """The guests that are being asked."""

    def __init__(self, backend: Backend, clock: Clock) -> None:
        self._backend = backend
        self._clock = clock
        self._hurry: dict[int, asyncio.Event] = {}

    def hurry(self, partition: int) -> bool:
        """Whoever waits for this guest shall not any longer. Returns whether somebody waited."""
        if (waiting := self._hurry.get(partition)) is not None:
            waiting.set()
        return waiting is not None

    async def ask(self, record: Record, limit_s: float) -> str:
        """Press until the guest is off; why it is not. One press is lost where nobody in it reads the button yet."""
        deadline = self._clock.monotonic_ns() + int(limit_s * NS_PER_S)
        hurry = self._hurry[record.id] = asyncio.Event()
        suspended = record.state is State.SUSPENDED
        try:
            while not hurry.is_set() and (left_s := (deadline - self._clock.monotonic_ns()) / NS_PER_S) > 0:
                await _unless(hurry, self._press(record, suspended=suspended), left_s)
                left_s = max((deadline - self._clock.monotonic_ns()) / NS_PER_S, 0.001)
                wait_s = min(_PRESS_EVERY_S, left_s)
                if await _unless(hurry, self._backend.wait_off(record, wait_s), 2 * wait_s):
                    return ""
            return HURRIED if hurry.is_set() else f"the guest did not power off within {limit_s:g} s"
        finally:
            self._hurry.pop(record.id, None)

    async def leave(self, record: Record) -> Finding:
        """What a guest does that did not power off. One that was suspended and went on for the button is again.

        Raises:
            TimedOutError: it can't be known.
        """
        deadline = self._clock.monotonic_ns() + int(_LOOK_FOR_S * NS_PER_S)
        while True:
            try:
                finding = await self._backend.look(record)
                if record.state is State.SUSPENDED and finding.found is Found.RUNNING:
                    await self._backend.suspend(record)
                    finding = await self._backend.look(record)
            except (BadStateError, TimedOutError):
                if self._clock.monotonic_ns() > deadline:
                    raise
                await asyncio.sleep(_LOOK_EVERY_S)
            else:
                return finding

    async def _press(self, record: Record, *, suspended: bool) -> None:
        try:
            if suspended:
                await self._backend.restore(record)
            await self._backend.press_power(record)
        except (TimedOutError, UnavailableError, FailedError) as error:
            log.warning("partition %d: the power button: %s", record.id, error)


async def _unless(hurry: asyncio.Event, work: Coroutine[Any, Any, T], timeout_s: float) -> T | None:
    """What it comes to; None where somebody is in a hurry, or the time is over, before it does."""
    doing = asyncio.create_task(work, name="part of a power-off")
    hurried = asyncio.create_task(hurry.wait(), name="wait for somebody in a hurry")
    try:
        await asyncio.wait({doing, hurried}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return doing.result() if doing.done() else None
    finally:
        for task in (doing, hurried):
            task.cancel()
        await asyncio.gather(doing, hurried, return_exceptions=True)
