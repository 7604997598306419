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
from deadlined.deny import Deny
from deadlined.groups import Groups
from deadlined.guard import Guard
from deadlined.holder import Holder, no_descriptor
from deadlined.journal import Journal
from deadlined.metrics import Metrics
from deadlined.monitor import FULL_HISTORIES, Monitor
from deadlined.observer import Observer
from deadlined.tasks import Tasks
from edgehold.clock import NS_PER_MS, NS_PER_S, Clock
from edgehold.errors import EdgeholdError
from edgehold.kernel import capacity, procfs
from edgehold.kernel.births import Births
from edgehold.kernel.capacity import Found
from edgehold.kernel.native_held import HeldTable
from edgehold.kernel.timer import Timer

log = logging.getLogger(__name__)

# A younger result of the capacity probe is as good as a new one.
_PROBE_KEPT_NS = NS_PER_S


@dataclass(frozen=True, slots=True)
class Recovered:
    """What got its own back."""

    threads: int
    groups: int


class Engine:
    """One journal and all that is held by it. `close` it."""

    def __init__(
        self,
        clock: Clock,
        state_dir: Path,
        *,
        cycle_ms: int,
        fast_cycle_ms: int,
        history: int,
        max_threads: int,
        deny: Deny | None = None,
    ) -> None:
        """Changes no thread's policy, not even its own; see `begin`.

        Raises:
            UnavailableError: another deadlined uses the directory.
            FailedError: the journal can't be used.
        """
        self.clock = clock
        self._cycle_ns, short_ns = cycle_ms * NS_PER_MS, fast_cycle_ms * NS_PER_MS
        self._timer: Timer | None = None
        self._measure = asyncio.Event()
        self.probing = asyncio.Lock()
        """A probe takes the host's bandwidth for some milliseconds; an attach in that moment would be refused."""
        self._probed: Found | None = None
        self._probed_at_ns = 0
        self.last_cycle_ns = clock.monotonic_ns()
        self.guard: Guard | None = None
        self.metrics = Metrics()
        self.history_size = history * FULL_HISTORIES
        self.table = HeldTable(history=self.history_size, cycle_ns=self._cycle_ns, short_ns=short_ns)
        self.tasks = Tasks(clock)
        self.births = Births(clock=clock)
        self.journal = Journal(state_dir, boot_id=procfs.boot_id())
        self.holder = Holder(
            clock=clock, journal=self.journal, metrics=self.metrics, table=self.table, short_ns=short_ns
        )
        groups = Groups(clock=clock, journal=self.journal, table=self.table, cycle_ns=self._cycle_ns, deny=deny)
        self.ceilings = Ceilings(ours=groups)
        self.monitor = Monitor(
            clock=clock,
            holder=self.holder,
            metrics=self.metrics,
            tasks=self.tasks,
            groups=groups,
            history=history,
            max_threads=max_threads,
            deny=deny,
        )
        self.monitor.before_setting = self._look_at_limits
        self.periods = Periods(self.monitor, Observer(clock=clock))

    def recover(self) -> Recovered:
        """Put right what a killed predecessor left behind. Raises `EdgeholdError`."""
        return Recovered(threads=self.holder.recover(), groups=self.monitor.groups.recover())

    def begin(self) -> None:
        """Put this process above ordinary load: what it starts from now on is an ordinary process."""
        self.guard = Guard(self.clock, self.metrics)
        self.monitor.grants.probe_soon()
        self._measure.set()

    def _look_at_limits(self) -> None:
        """What the cgroups above held threads allow now: before any budget is set, a new thread's too."""
        self.ceilings.refresh(self.clock.monotonic_ns(), self.monitor.tids())
        self.monitor.grants.limits = self.ceilings.limits()

    def soon(self) -> None:
        """Something was attached: a window may end earlier than the cycle's task thinks."""
        if self._timer is not None:
            self._timer.wake()

    async def run(self, *, after_cycle: Callable[[], None]) -> None:
        """For ever: cycles, and the capacity's probe."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.cycles(after_cycle), name="cycles")
            tasks.create_task(self.measure(), name="capacity")

    async def cycles(self, after_cycle: Callable[[], None] = lambda: None) -> None:
        """For ever: a cycle at each multiple of T since the start, short windows in between when they end.

        A cycle that comes too late leaves out what it missed.
        """
        due = self.clock.monotonic_ns() + self._cycle_ns
        try:
            with Timer() as self._timer:
                while True:
                    short_ns = self.monitor.next_due_ns
                    await self._timer.wait_until(min(due, short_ns) if short_ns else due)
                    begin = self.clock.monotonic_ns()
                    if begin >= due:
                        due = self._cycle(begin, due, after_cycle)
                    elif (short_ns := self.monitor.next_due_ns) and begin >= short_ns:
                        self.monitor.short()
        finally:
            self._timer = None
            await self.periods.close()

    def _cycle(self, begin: int, due: int, after_cycle: Callable[[], None]) -> int:
        """One cycle, and when the next one is due."""
        self._look_at_limits()
        self.monitor.cycle()
        self.periods.look()
        after_cycle()
        if self.guard is not None:
            self.guard.check()
        if self.monitor.grants.probe_wanted():
            self._measure.set()
        self.last_cycle_ns = self.clock.monotonic_ns()
        self.metrics.busy.inc((self.last_cycle_ns - begin) / NS_PER_S)
        due += self._cycle_ns
        if (missed := (self.last_cycle_ns - due) // self._cycle_ns + 1) > 0:
            self.metrics.overruns.inc(missed)
            due += missed * self._cycle_ns
        return due

    async def measure(self) -> None:
        """For ever: probe the capacity when the monitor wants to know it."""
        while True:
            await self._measure.wait()
            self._measure.clear()
            try:
                await self.probe()
            except EdgeholdError as error:
                log.warning("the capacity can't be measured, so the kernel alone refuses what does not fit: %s", error)
                self.monitor.grants.measured(None)

    async def probe(self) -> Found:
        """What is left, one probe a second at most, for all who wait: it takes what everybody on the host could want.

        Raises:
            EdgeholdError: it can't be probed.
        """
        async with self.probing:
            if self._probed is None or self.clock.monotonic_ns() - self._probed_at_ns >= _PROBE_KEPT_NS:
                grants = self.monitor.grants
                before = self.monitor.held_cpus()
                grants.probing = True
                try:
                    self._probed = await capacity.probe_in_child()
                except OSError as error:
                    if procfs.is_exhausted(error):
                        raise no_descriptor() from error
                    raise
                finally:
                    grants.probing = False
                self._probed_at_ns = self.clock.monotonic_ns()
                grants.measured(self._probed.available + min(before, self.monitor.held_cpus()))
            return self._probed

    def release_all(self) -> None:
        """Give everything back, whatever fails; the journal stays open."""
        with contextlib.ExitStack() as whatever_fails:
            whatever_fails.callback(self.holder.finish)  # the last one
            for one in list(self.monitor.attachments.values()):
                whatever_fails.callback(self.monitor.release, one)

    def close(self) -> None:
        """Give everything back, and let another have the journal."""
        with contextlib.ExitStack() as whatever_fails:
            whatever_fails.callback(self.journal.close)
            whatever_fails.callback(self.births.close)
            whatever_fails.callback(self.tasks.close)
            whatever_fails.callback(self.release_all)
