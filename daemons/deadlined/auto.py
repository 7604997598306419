"""Finds the periods of threads whose policy says ``auto``: looks when they get enough CPU, and again when they did not.

A thread is held with the default period from the start on, so that nobody waits for an answer that may never come. Its
switches are recorded once it is no longer saturated: before, they show the reservation and not the thread.
"""

import asyncio
import logging

from deadlined.held import Attached, Thread
from deadlined.monitor import Monitor
from deadlined.observer import Observer
from deadlined.periods import Inference
from deadlined.shortage import is_short
from edgehold.api.deadlined import PeriodOrigin, ThreadState
from edgehold.clock import NS_PER_MS
from edgehold.errors import EdgeholdError
from edgehold.kernel.limits import DL_MAX_PERIOD_NS, DL_MIN_PERIOD_NS
from edgehold.kernel.procfs import GoneError

log = logging.getLogger(__name__)

# What is not seen in so many tries, a person must look at.
_TRIES = 5
# Nearer than this to the present period another one is not worth a change.
_SAME = 0.005
_UNKNOWN = "period unknown"


class Periods:
    """Looks after each cycle who is to be observed; costs nothing where nobody's period is ``auto``."""

    def __init__(self, monitor: Monitor, observer: Observer) -> None:
        self._monitor = monitor
        self._observer = observer
        self._running: dict[tuple[int, int], asyncio.Task[None]] = {}

    def look(self) -> None:
        """Begin to observe whoever can be observed. Raises what an observation that should not fail failed with."""
        for key in [key for key, task in self._running.items() if task.done()]:
            self._running.pop(key).result()
        for one in self._monitor.auto.values():
            if not one.suspended:
                self._begin(one)

    async def close(self) -> None:
        """Give everything up."""
        running, self._running = self._running, {}
        for task in running.values():
            task.cancel()
        await asyncio.gather(*running.values(), return_exceptions=True)

    def _begin(self, one: Attached) -> None:
        for thread in one.threads.values():
            if thread.period_origin is not PeriodOrigin.OBSERVING or thread.key in self._running:
                continue
            if thread.row >= 0 and thread.cells.windows > 10 * thread.tries and not thread.cells.sizing.saturated:
                self._running[thread.key] = asyncio.create_task(self._observe(one, thread), name="period")

    async def _observe(self, one: Attached, thread: Thread) -> None:
        """One try."""
        found = await self._found(thread)
        if (
            found is None
            or one.threads.get(thread.tid) is not thread
            or thread.period_origin is not PeriodOrigin.OBSERVING
        ):
            return  # no answer; or it left, or its policy was changed meanwhile
        if found.period_ns is None:
            self._unknown(thread, found.reason)
            return
        period_ns = min(max(found.period_ns, DL_MIN_PERIOD_NS), DL_MAX_PERIOD_NS)
        if abs(period_ns - thread.config.period_ns) > _SAME * period_ns:
            try:
                self._monitor.reconfigure(thread, one, one.config.with_period(period_ns))
            except GoneError:
                return
            if thread.config.period_ns != period_ns and thread.state is ThreadState.HELD:
                return  # refused for the moment, and told; tried again
        thread.period_origin, thread.confidence = PeriodOrigin.INFERRED, found.confidence
        if thread.reason.startswith(_UNKNOWN):
            thread.reason = ""
        log.info(
            "thread %d (%s): its period is %.2f ms (confidence %.2f)",
            thread.tid, thread.name, period_ns / NS_PER_MS, found.confidence,
        )  # fmt: skip

    async def _found(self, thread: Thread) -> Inference | None:
        """What the observer says, if it can."""
        try:
            return await self._observer.observe(thread.tid)
        except GoneError:
            pass  # the monitor notices
        except EdgeholdError as error:
            self._unknown(thread, error.message, last=not error.retryable)
        except OSError as error:
            if not is_short(error):
                raise  # else it does not count as a try, and is begun anew in the next cycle
        return None

    def _unknown(self, thread: Thread, why: str, *, last: bool = False) -> None:
        if thread.period_origin is not PeriodOrigin.OBSERVING:
            return  # its policy was changed meanwhile
        thread.tries += 1
        if last or thread.tries >= _TRIES:
            thread.period_origin = PeriodOrigin.UNKNOWN
            log.info("thread %d (%s): its period is unknown: %s", thread.tid, thread.name, why)
        thread.reason = thread.reason or f"{_UNKNOWN}: {why}"
