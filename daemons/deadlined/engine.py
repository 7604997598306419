"""What holds threads, without whoever asks for it: journal, monitor, the cycle, and what the cycle wants to know.

`deadlined run` uses it as it is. It serves nothing and knows no settings file, so it loads neither.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deadlined.auto import Periods
from deadlined.ceilings import Ceilings
from deadlined.groups import Groups
from deadlined.guard import Guard
from deadlined.holder import Holder
from deadlined.journal import Journal
from deadlined.metrics import Metrics
from deadlined.monitor import FULL_HISTORIES, Monitor
from deadlined.observer import Observer
from deadlined.tasks import Tasks
from edgehold.clock import NS_PER_MS, NS_PER_S, Clock
from edgehold.errors import EdgeholdError
from edgehold.kernel import capacity, procfs
from edgehold.kernel.births import Births
from edgehold.kernel.native_held import HeldTable

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What got its own back."""

    threads: int
    groups: int


class Engine:
    """One journal and all that is held by it. `close` it."""

    def __init__(
        self, clock: Clock, state_dir: Path, *, cycle_ms: int, fast_cycle_ms: int, history: int, max_threads: int
    ) -> None:
        """Changes no thread's policy, not even its own; see `begin`.

        Raises:
            UnavailableError: another deadlined uses the directory.
            FailedError: the journal can't be used.
        """
        self.clock = clock
        self._cycle_ns, short_ns = cycle_ms * NS_PER_MS, fast_cycle_ms * NS_PER_MS
        self._soon = asyncio.Event()
        self._measure = asyncio.Event()
        self.guard: Guard | None = None
        self.metrics = Metrics()
        self.history_size = history * FULL_HISTORIES
        self.table = HeldTable(history=self.history_size, cycle_ns=self._cycle_ns, short_ns=short_ns)
        self.tasks = Tasks(clock)
        self.births = Births(clock=clock)
        self.ceilings = Ceilings()
        self.journal = Journal(state_dir, boot_id=procfs.boot_id())
        self.holder = Holder(
            clock=clock, journal=self.journal, metrics=self.metrics, table=self.table, short_ns=short_ns
        )
        self.monitor = Monitor(
            clock=clock,
            holder=self.holder,
            metrics=self.metrics,
            tasks=self.tasks,
            groups=Groups(clock=clock, journal=self.journal, table=self.table, cycle_ns=self._cycle_ns),
            history=history,
            max_threads=max_threads,
        )
        self.periods = Periods(self.monitor, Observer(clock=clock), every_s=cycle_ms / 1000)

    def recover(self) -> Recovered:
        """Put right what a killed predecessor left behind. Raises `EdgeholdError`."""
        return Recovered(threads=self.holder.recover(), groups=self.monitor.groups.recover())

    def begin(self) -> None:
        """Put this process above ordinary load: what it starts from now on is an ordinary process."""
        self.guard = Guard(self.clock, self.metrics)

    def soon(self) -> None:
        """Something was attached: a window may end earlier than the cycle's task thinks."""
        self._soon.set()

    async def run(self, *, after_cycle: Callable[[], None]) -> None:
        """For ever: cycles, the capacity's probe, periods."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._cycles(after_cycle), name="cycles")
            tasks.create_task(self._probes(), name="capacity")
            tasks.create_task(self.periods.run(), name="periods")

    async def _cycles(self, after_cycle: Callable[[], None]) -> None:
        """A cycle at each multiple of T, short windows between when they end; a late one leaves out what was missed."""
        due = self.clock.monotonic_ns() + self._cycle_ns
        while True:
            self._soon.clear()
            short_ns = self.monitor.next_due_ns
            await self._sleep_until(min(due, short_ns) if short_ns else due)
            now = self.clock.monotonic_ns()
            if now < due:
                if (short_ns := self.monitor.next_due_ns) and now >= short_ns:
                    self.monitor.short()
                continue
            self.ceilings.refresh(now, self.monitor.tids())
            self.monitor.grants.limits = self.ceilings.limits()
            self.monitor.cycle()
            after_cycle()
            if self.guard is not None:
                self.guard.check()
            if self.monitor.grants.probe_wanted():
                self._measure.set()
            due += self._cycle_ns * max((self.clock.monotonic_ns() - due) // self._cycle_ns + 1, 1)

    async def _sleep_until(self, due_ns: int) -> None:
        left = (due_ns - self.clock.monotonic_ns()) / NS_PER_S
        if left <= 0:
            await asyncio.sleep(0)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left):
                await self._soon.wait()

    async def _probes(self) -> None:
        """Measure the capacity when the monitor wants to know it."""
        grants = self.monitor.grants
        while True:
            await self._measure.wait()
            self._measure.clear()
            before = self.monitor.held_cpus()
            grants.probing = True
            try:
                found = await capacity.probe_in_child()
            except EdgeholdError as error:
                log.warning("the capacity can't be measured, so the kernel alone refuses what does not fit: %s", error)
                grants.measured(None)
            else:
                grants.measured(found.available + min(before, self.monitor.held_cpus()))
            finally:
                grants.probing = False

    def release_all(self) -> None:
        """Give everything back, whatever fails; the journal stays open."""
        with contextlib.ExitStack() as whatever_fails:
            for one in list(self.monitor.attachments.values()):
                whatever_fails.callback(self.monitor.release, one)

    def close(self) -> None:
        """Give everything back, and let another have the journal."""
        with contextlib.ExitStack() as whatever_fails:
            whatever_fails.callback(self.journal.close)
            whatever_fails.callback(self.births.close)
            whatever_fails.callback(self.tasks.close)
            whatever_fails.callback(self.release_all)
