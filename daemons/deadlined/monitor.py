"""The cycle: look who is there, sample everybody, let the rule decide, decreases before increases, watch for the stuck.

Nothing here waits, so nothing of the API happens in the middle of a cycle. The order matters to the kernel's admission
control: what one thread gives up can be another's a moment later.
"""

import contextlib
import errno
import logging
from collections import deque

from deadlined import watchdog
from deadlined.held import Attached, Thread, rule_config
from deadlined.holder import Holder, no_descriptor
from deadlined.metrics import Metrics
from deadlined.rules import ReferenceRule
from deadlined.targets import Source
from deadlined.watchdog import Verdict
from edgehold.api.deadlined import Policy, Sample, Target, ThreadState
from edgehold.clock import Clock
from edgehold.errors import EdgeholdError
from edgehold.kernel import procfs
from edgehold.kernel.procfs import GoneError
from edgehold.kernel.sampler import ThreadSample

log = logging.getLogger(__name__)

# Below this a change is not worth a system call.
_LEAST_CHANGE_NS = 1000
# So many threads have as long a history as is set; with more, each has less, so that the sum stays the same.
_FULL_HISTORIES = 64
Change = tuple[Thread, Attached, int]


class Monitor:
    """Owns the attachments and what is done with them in every cycle."""

    def __init__(
        self, *, clock: Clock, holder: Holder, metrics: Metrics, cycle_ns: int, history: int, max_threads: int
    ) -> None:
        self.attachments: dict[int, Attached] = {}
        self._owners: dict[int, Attached] = {}
        self._clock = clock
        self._holder = holder
        self._metrics = metrics
        self._cycle_ns = cycle_ns
        self._history = history
        self._max_threads = max_threads

    def owner(self, tid: int) -> Attached | None:
        """The attachment that has this thread."""
        return self._owners.get(tid)

    def adopt(
        self, number: int, target: Target, policy: Policy, source: Source
    ) -> tuple[Attached, dict[int, EdgeholdError]]:
        """Begin to hold a target. Returns it, and why threads of it could not be attached (they wait).

        Owns the source once it returns. Raises `OSError` (no descriptor is left); nothing is held then.
        """
        one = Attached(id=number, target=target, policy=policy, config=rule_config(policy), source=source)
        self.attachments[number] = one
        try:
            refused = self._rescan(one)
        except BaseException:
            # The caller still owns the source.
            del self.attachments[number]
            with contextlib.ExitStack() as all_of_them:
                self._drop_all(one, all_of_them)
            raise
        self._metrics.update(self.attachments.values())
        return one, refused

    def release(self, one: Attached) -> None:
        """Give every thread its own policy back, whatever fails for one of them, and forget the target."""
        del self.attachments[one.id]
        with contextlib.ExitStack() as all_of_them:
            all_of_them.callback(one.source.close)
            self._drop_all(one, all_of_them)
        self._metrics.update(self.attachments.values())

    def cycle(self) -> None:
        """One monitoring cycle over everything."""
        for one in list(self.attachments.values()):
            try:
                self._rescan(one)
            except OSError as error:
                if not procfs.is_exhausted(error):
                    raise
                one.trouble = no_descriptor().message  # what is known stays, and is looked at again in the next cycle
            else:
                one.trouble = ""
        # Decreases first; sorting keeps the order of the rest.
        for thread, one, wanted in sorted(self._look(), key=lambda change: change[2] >= change[0].budget_ns):
            self._change(thread, one, wanted)
        for one in list(self.attachments.values()):
            if one.source.over and not one.threads:
                log.info("attachment %d is over: %s", one.id, one.source.over)
                self.release(one)
        self._holder.prune()
        self._metrics.cycles.inc()
        self._metrics.update(self.attachments.values())

    def _look(self) -> list[Change]:
        """Sample every held thread, care for the ended and the stuck, and ask the rules of the others."""
        samples = self._holder.sampler.sample()
        changes: list[Change] = []
        room = max(self._history * _FULL_HISTORIES // max(len(self._owners), _FULL_HISTORIES), 1)
        for one in self.attachments.values():
            one.cycles += 1
            for thread in list(one.threads.values()):
                while len(thread.history) > room:
                    thread.history.popleft()
                sample = samples.get(thread.tid)
                if sample is None:
                    continue  # only held ones are sampled
                gone = sample.errno == errno.ESRCH
                verdict = Verdict.ENDED if gone else watchdog.judge(thread, sample, period_ns=one.config.period_ns)
                if verdict is Verdict.ENDED:
                    self._ended(one, thread)
                elif verdict is Verdict.STUCK:
                    self._holder.revive(thread, one)
                elif (wanted := self._measure(thread, one, sample)) is not None:
                    changes.append((thread, one, wanted))
        return changes

    def _rescan(self, one: Attached) -> dict[int, EdgeholdError]:
        """Take in new threads, try those that wait, drop those that the target does not have any more."""
        now = self._clock.monotonic_ns()
        tids = one.source.tids()
        for tid in one.threads.keys() - set(tids):
            self._drop(one, one.threads[tid])
        one.left_out = 0
        refused: dict[int, EdgeholdError] = {}
        for tid in tids:
            try:
                thread = one.threads.get(tid) or self._found(one, tid)
                if thread is not None and thread.try_at_ns is None and thread.state is ThreadState.WAITING:
                    self._holder.check_alive(thread)  # nobody samples one that somebody else took
                if thread is not None and thread.try_at_ns is not None and thread.try_at_ns <= now:
                    error = self._holder.enter(thread, one)
                    if error is not None:
                        refused[tid] = error
            except GoneError as error:
                if tid in one.threads:
                    self._ended(one, one.threads[tid])
                else:
                    one.source.forget(tid)
                refused[tid] = error
        return refused

    def _found(self, one: Attached, tid: int) -> Thread | None:
        """A thread that the target has and we did not know. None: it is another attachment's, or there is no room."""
        if tid in self._owners:
            return None
        if len(self._owners) >= self._max_threads:
            one.left_out += 1
            return None
        facts = procfs.stat(tid)
        if facts.ended:
            raise GoneError(f"thread {tid} has ended")
        thread = Thread(tid, facts.start_ticks, facts.name, ReferenceRule(one.config), deque())
        one.threads[tid] = thread
        self._owners[tid] = one
        return thread

    def _drop(self, one: Attached, thread: Thread) -> None:
        try:
            self._holder.leave(thread, one)
        finally:
            del one.threads[thread.tid]
            del self._owners[thread.tid]

    def _drop_all(self, one: Attached, all_of_them: contextlib.ExitStack) -> None:
        """At the block's end; an error of one thread is raised when all had their turn."""
        for thread in one.threads.values():
            all_of_them.callback(self._drop, one, thread)

    def _ended(self, one: Attached, thread: Thread) -> None:
        self._holder.forget(thread)
        del one.threads[thread.tid]
        del self._owners[thread.tid]
        one.source.forget(thread.tid)

    def _measure(self, thread: Thread, one: Attached, sample: ThreadSample) -> int | None:
        """What the rule wants after this window; None while the window is too short to say anything."""
        base = thread.base
        if base is None:
            thread.base = sample
            return None
        elapsed = sample.time_ns - base.time_ns
        period = one.config.period_ns
        if elapsed < max(period, self._cycle_ns // 2):
            return None
        thread.base = sample
        thread.executed_ns = (sample.executed_ns - base.executed_ns) * period // elapsed
        thread.run_delay_ns = (sample.run_delay_ns - base.run_delay_ns) * period // elapsed
        return thread.rule.step(thread.executed_ns)

    def _change(self, thread: Thread, one: Attached, wanted: int) -> None:
        try:
            if abs(wanted - thread.budget_ns) < _LEAST_CHANGE_NS:
                thread.reason = ""
                self._holder.check_ours(thread, one)
            else:
                self._holder.change(thread, one, wanted)
        except GoneError:
            self._ended(one, thread)
            return
        thread.history.append(
            Sample(
                time_ns=thread.base.time_ns if thread.base else self._clock.monotonic_ns(),
                tid=thread.tid,
                budget_ns=thread.budget_ns,
                executed_ns=thread.executed_ns,
                run_delay_ns=thread.run_delay_ns,
                multiplier=thread.rule.multiplier,
            )
        )
