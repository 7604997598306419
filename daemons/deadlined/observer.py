"""Looks at threads for some seconds to find their own periods: records their switches, lets `periods` judge them.

One timer serves everybody who is observed. It changes nothing about a thread: whoever calls decides when a thread
gets enough CPU to be looked at. What the kernel counted meanwhile is checked all the same, or a budget that is used up
would show the period of its reservation.
"""

import asyncio

from deadlined import periods
from deadlined.periods import Inference
from edgehold.clock import NS_PER_MS, Clock
from edgehold.errors import NoCapacityError
from edgehold.kernel import procfs
from edgehold.kernel.procfs import GoneError
from edgehold.kernel.sampler import Sampler
from edgehold.kernel.switches import Activations, SwitchRecorder

# The ring of a thread that runs 2,500 times a second is full after this. Most of a look's cost is waking up for it, so
# a ring that was hardly used is passed over the next time.
_DRAIN_S = 0.2
_FEW = 128
# When to judge, and whether patterns too: ten even periods of 100 ms are seen at the second look.
_LOOKS = ((1000, False), (1200, False), (2000, True), (3000, True))


class Observer:
    """Observes threads, at most ``limit`` at once; who comes later waits for his turn."""

    def __init__(self, *, clock: Clock, limit: int = 64) -> None:
        self._clock = clock
        self._turns = asyncio.Semaphore(limit)
        self._watches: set[_Watch] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def observe(self, tid: int) -> Inference:
        """A thread's own period, after 1 to 3 s. Cancelled, it leaves nothing behind.

        Raises:
            GoneError: the thread does not exist (any more).
            DeniedError: no privilege to record its switches; the text has the cure.
            NoCapacityError: no descriptor, or no lockable memory is left; later it may work.
            UnsupportedError: the kernel does not record switches.
            FailedError: the kernel refused for another reason.
        """
        async with self._turns:
            watch = _Watch(tid, self._clock)
            self._watches.add(watch)
            try:
                if self._timer is None:
                    self._arm()
                return await watch.found
            finally:
                self._watches.discard(watch)
                watch.close()
                if not self._watches and self._timer is not None:
                    self._timer.cancel()
                    self._timer = None

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_DRAIN_S, self._drain)

    def _drain(self) -> None:
        self._arm()
        for watch in self._watches:
            if watch.found.done():
                continue
            try:
                inference = watch.look()
            except Exception as error:  # noqa: BLE001 - whoever waits for this thread gets it, the others go on
                watch.found.set_exception(error)
            else:
                if inference is not None:
                    watch.found.set_result(inference)


class _Watch:
    """One thread that is being observed."""

    def __init__(self, tid: int, clock: Clock) -> None:
        self.found: asyncio.Future[Inference] = asyncio.get_running_loop().create_future()
        self._tid = tid
        self._clock = clock
        self._activations = Activations()
        self._looks = iter(_LOOKS)
        self._sampler = Sampler()
        self._recorder = SwitchRecorder(tid)
        try:
            self._first = self._sampler.add(tid)
        except BaseException as error:
            self._recorder.close()
            if isinstance(error, OSError) and procfs.is_exhausted(error):
                raise NoCapacityError(
                    f"no file descriptor is left to observe thread {tid}: raise LimitNOFILE= of the unit (ulimit -n)"
                ) from None
            raise
        self._begin_ns = clock.monotonic_ns()
        self._next_ms, self._patterns = next(self._looks)
        self._passed_over = False

    def close(self) -> None:
        self._recorder.close()
        self._sampler.close()

    def look(self) -> Inference | None:
        """Take what was recorded; the answer, once it is time for one."""
        due = self._clock.monotonic_ns() - self._begin_ns >= self._next_ms * NS_PER_MS
        if self._passed_over and not due:
            self._passed_over = False
            return None
        switches = self._recorder.drain()
        self._activations.feed(switches)
        self._passed_over = len(switches) < _FEW
        if not due:
            return None
        following = next(self._looks, None)
        found = self._judge(patterns=self._patterns)
        if found.period_ns is not None or following is None:
            return found
        self._next_ms, self._patterns = following
        return None

    def _judge(self, *, patterns: bool) -> Inference:
        """A period, if it can be the thread's own; else why it is unknown, as well as that can be said."""
        found = None if patterns else self._infer(patterns=False)
        if found is not None and found.period_ns is None:
            return found  # what the counters say is not asked for: there is another look
        now, first, stalled_ns = self._sampler.sample()[self._tid], self._first, self._activations.stalled_ns
        if now.errno:
            raise GoneError(f"thread {self._tid} does not exist (any more)")
        elapsed_ns, run_delay_ns = now.time_ns - first.time_ns, now.run_delay_ns - first.run_delay_ns
        executed_ns = now.executed_ns - first.executed_ns
        if why := periods.can_infer(elapsed_ns, executed_ns, run_delay_ns, stalled_ns=stalled_ns):
            return Inference(None, reason=why)
        return found or self._infer(patterns=periods.shows_patterns(elapsed_ns, run_delay_ns))

    def _infer(self, *, patterns: bool) -> Inference:
        seen = self._activations
        found = periods.infer(tuple(seen.times_ns), tuple(seen.stalls_ns), patterns=patterns)
        if found.period_ns is None and self._recorder.lost:
            return Inference(None, reason="it runs too often for its switches to be followed")
        return found
