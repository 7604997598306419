"""The cycle: look who is there, sample everybody, let the rules decide, set what changed, watch for the stuck.

Nothing here waits, so nothing of the API happens in the middle of a cycle. What a cycle does for a thread to which
nothing happens is C (ext/held.c); here is only what somebody must do.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator

from deadlined import shortage, watchdog
from deadlined.cgroups import CgroupSource
from deadlined.changes import Changes, origin
from deadlined.deny import Deny
from deadlined.grants import Entry, Grants
from deadlined.groups import Groups
from deadlined.held import Attached, Thread, sample_of
from deadlined.holder import Holder
from deadlined.metrics import Metrics
from deadlined.rules import RuleConfig, rule_config
from deadlined.shortage import is_short
from deadlined.targets import Source, ThreadSource, why_not
from deadlined.tasks import Tasks
from edgehold.api.deadlined import Actuator, Attachment, Policy, Sample, Target, ThreadState
from edgehold.clock import NS_PER_S, Clock
from edgehold.errors import DeniedError, EdgeholdError
from edgehold.kernel import procfs
from edgehold.kernel.native_held import CHANGE, ERROR, GONE, LOOK, TAKEN, RawTodo
from edgehold.kernel.procfs import GoneError

log = logging.getLogger(__name__)

# So many threads have as long a history as is set; with more, all share so many times that.
FULL_HISTORIES = 32
# Events and counters tell what changes; this only heals what they could miss.
_RESCAN_NS = 30 * NS_PER_S


class Monitor:
    """Owns the attachments and what is done with them in every cycle."""

    def __init__(
        self,
        *,
        clock: Clock,
        holder: Holder,
        metrics: Metrics,
        tasks: Tasks,
        groups: Groups,
        history: int,
        max_threads: int,
        deny: Deny | None = None,
    ) -> None:
        self.attachments: dict[int, Attached] = {}
        self.cycles = 0
        self.before_setting: Callable[[], None] = lambda: None
        """Called before budgets are set."""
        self.on_over: Callable[[Attached], None] = lambda _one: None
        """Told of an attachment that ended by itself."""
        self.grants = Grants(clock=clock, holder=holder, everybody=self._entries)
        self.groups = groups
        self._owners: dict[int, Attached] = {}
        self._tids: frozenset[int] | None = None
        self._targets: dict[Target, Attached] = {}
        self.auto: dict[int, Attached] = {}
        """Whose threads' periods are to be found."""
        self._polled: dict[int, Attached] = {}
        """Whose source must be asked in every cycle; a single thread's end is noticed by the sampler."""
        self._waiting: dict[int, Attached] = {}
        """Who has threads that are to be tried."""
        self._over: list[Attached] = []
        self._changes = Changes(holder=holder, grants=self.grants, lost=self._waits)
        self._clock = clock
        self._holder = holder
        self._table = holder.table
        self._metrics = metrics
        self._tasks = tasks
        self._history = history
        self._max_threads = max_threads
        self._deny = deny
        self._rescan_at_ns = 0

    def owner(self, tid: int) -> Attached | None:
        """The attachment that has this thread."""
        return self._owners.get(tid)

    def of_target(self, target: Target) -> Attached | None:
        """The attachment that has this target."""
        return self._targets.get(target)

    def tids(self) -> frozenset[int]:
        """Every thread that an attachment has; the same object while nothing changed."""
        if self._tids is None:
            self._tids = frozenset(self._owners)
        return self._tids

    def held_cpus(self) -> float:
        """The sum of all reservations that are in force, in CPUs."""
        return sum(
            thread.budget_ns / thread.config.period_ns
            for one in self.attachments.values()
            for thread in one.threads.values()
        )

    def message(self, one: Attached) -> Attachment:
        """As the API tells it."""
        return one.message(self.cycles, self.groups.status(one.id))

    def history(self, one: Attached, last: int | None = None) -> tuple[Sample, ...]:
        """The kept samples of an attachment, oldest first; all, or only the last ones."""
        most = self._history * max(len(one.threads), 1)
        return tuple(
            sample_of(raw) for raw in self._table.history(one.id, most=most if last is None else min(last, most))
        )

    def adopt(
        self, number: int, target: Target, policy: Policy, source: Source
    ) -> tuple[Attached, dict[int, EdgeholdError]]:
        """Begin to hold a target. Returns it, and why threads of it could not be attached (they wait).

        Owns the source once it returns. Raises `OSError` (no descriptor is left); nothing is held then.
        """
        one = Attached(
            id=number, target=target, policy=policy, config=rule_config(policy), source=source, begun=self.cycles
        )
        self.attachments[number] = one
        self._targets[target] = one
        try:
            refused = self.follow(one, source)
        except BaseException:
            # The caller still owns the source.
            self._forget(one)
            with contextlib.ExitStack() as all_of_them:
                all_of_them.callback(self.groups.release, one.id)
                self._drop_all(one, all_of_them)
            raise
        return one, refused

    def follow(self, one: Attached, source: Source) -> dict[int, EdgeholdError]:
        """Take an attachment's threads from this source from now on. Returns and raises as `adopt`."""
        one.source = source
        one.suspended = source.suspended
        if one.policy.period_ns == "auto":
            self.auto[one.id] = one
        if isinstance(source, ThreadSource):
            self._polled.pop(one.id, None)
        else:
            self._polled[one.id] = one
        if one.policy.actuator is not Actuator.DEADLINE:
            if isinstance(source, CgroupSource):
                self.groups.attach(one, source)
            return {}
        refused = self._rescan(one)
        refused |= self._settle([Entry(one.threads[tid], one) for tid in sorted(one.waiting)])
        return refused

    def release(self, one: Attached) -> None:
        """Give every thread its own policy back, whatever fails for one of them, and forget the target."""
        self._forget(one)
        with contextlib.ExitStack() as all_of_them:
            all_of_them.callback(one.source.close)
            all_of_them.callback(self.groups.release, one.id)
            self._drop_all(one, all_of_them)

    def _forget(self, one: Attached) -> None:
        del self.attachments[one.id]
        self._targets.pop(one.target, None)
        self._polled.pop(one.id, None)
        self.auto.pop(one.id, None)
        self._waiting.pop(one.id, None)

    def change(self, one: Attached, policy: Policy) -> None:
        """Size an attachment's budgets by another policy from now on; what was learned stays."""
        self.auto.pop(one.id, None)
        if policy.period_ns == "auto":
            self.auto[one.id] = one
        self._settle(self._changes.policy(one, policy))
        self.groups.change(one.id, policy)

    def reconfigure(self, thread: Thread, one: Attached, config: RuleConfig) -> None:
        """Another rule or period for one thread, from now on. Raises `GoneError`."""
        self._settle(self._changes.thread(thread, one, config))

    def cycle(self) -> None:
        """One monitoring cycle over everything."""
        self.cycles += 1
        now = self._clock.monotonic_ns()
        everything = now >= self._rescan_at_ns
        if everything:
            self._rescan_at_ns = now + _RESCAN_NS
        changed: list[Entry] = []
        for one in list(self._polled.values()):
            changed += self._look_at(one, everything=everything)
        for one in list(self._waiting.values()):
            changed += self._try_again(one)
        changed += self._changes.again()
        tasks, count, tasks_ns = self._tasks.read(len(self._holder.rows))
        changed += self._do(self._table.run(grid=True, tasks=tasks, task_count=count, tasks_ns=tasks_ns))
        self._settle(changed)
        self.groups.cycle()
        self._end()
        self._holder.prune()
        self._metrics.cycles.inc()

    def short(self) -> None:
        """Judge the short windows that are over."""
        self._settle(self._do(self._table.run(grid=False)))

    @property
    def next_due_ns(self) -> int:
        """When the first short window ends (CLOCK_MONOTONIC in ns); 0: there is none."""
        return self._table.next_due_ns

    def _settle(self, changed: list[Entry]) -> dict[int, EdgeholdError]:
        """Set what changed, or everything where it is crowded. Returns why waiting threads could not be taken in."""
        # Who was dropped since it was found that he is to be changed must not be entered again.
        changed = [
            entry
            for entry in changed
            if entry.attached.threads.get(entry.thread.tid) is entry.thread
            and entry.thread.state is not ThreadState.WATCHED
        ]
        if changed:
            self.before_setting()
        elif not self.grants.pending:
            return {}
        refused = self.grants.apply(changed)
        for entry in (*changed, *self.grants.lost):
            thread, one = entry.thread, entry.attached
            if isinstance(refused.get(thread.tid), GoneError):
                if thread.tid in one.threads:
                    self._ended(one, thread)
            elif thread.state is ThreadState.HELD:
                self._held(one, thread)
            else:
                self._waits(one, thread)
        return refused

    def _waits(self, one: Attached, thread: Thread) -> None:
        one.waiting.add(thread.tid)
        self._waiting[one.id] = one

    def _held(self, one: Attached, thread: Thread) -> None:
        one.waiting.discard(thread.tid)
        if not one.waiting:
            self._waiting.pop(one.id, None)

    def _end(self) -> None:
        """Attachments whose target is over and whose last thread ended."""
        over, self._over = self._over, []
        for one in over:
            if one.id in self.attachments and one.source.over and not one.threads:
                log.info("attachment %d is over: %s", one.id, one.source.over)
                self.release(one)
                self.on_over(one)

    def _look_at(self, one: Attached, *, everything: bool) -> list[Entry]:
        """The target's threads as they are now; those of it for whom something is to be set."""
        changed: list[Entry] = []
        if one.source.suspended != one.suspended:
            one.suspended = one.source.suspended
            changed += self.grants.suspend(one)
        if everything or one.source.changed() or one.source.over:
            try:
                self._rescan(one)
            except OSError as error:
                if not is_short(error):
                    raise
                one.trouble = shortage.text(error)  # what is known stays, and is looked at again in the next cycle
            else:
                one.trouble = ""
        if one.source.over:
            self._over.append(one)
        return changed

    def _try_again(self, one: Attached) -> list[Entry]:
        """Those who wait and whose time has come."""
        changed: list[Entry] = []
        for tid in sorted(one.waiting):
            thread = one.threads[tid]
            try:
                if thread.state is ThreadState.HELD:
                    self._held(one, thread)  # taken in when everybody's budget was set
                elif thread.try_at_ns is None:
                    self._holder.check_alive(thread)  # nobody samples one that somebody else took
                elif thread.try_at_ns <= self._clock.monotonic_ns():
                    changed.append(Entry(thread, one))
                    self.grants.count(changed[-1])
            except GoneError:
                self._ended(one, thread)
            except OSError as error:
                if not is_short(error):
                    raise  # else it waits on, and is looked at in the next cycle
        return changed

    def _do(self, todo: list[RawTodo]) -> list[Entry]:
        """What a pass over the table found."""
        changed: list[Entry] = []
        for row, what, error, _ in todo:
            thread = self._holder.rows[row]
            one = self._owners[thread.tid]
            try:
                if what & GONE:
                    self._ended(one, thread)
                elif what & ERROR:
                    raise OSError(error, f"schedstat of thread {thread.tid}")
                elif what & TAKEN:
                    self._taken(one, thread)
                elif what & LOOK and watchdog.is_stuck(thread, self._clock.monotonic_ns()):
                    self._stuck(one, thread)
                elif what & CHANGE and thread.state is ThreadState.HELD:
                    changed.append(Entry(thread, one))
                    self.grants.count(changed[-1])
            except GoneError:
                self._ended(one, thread)
            except OSError as failed:
                if not is_short(failed):
                    raise  # else it stays as it is, and the next pass finds the same
        return changed

    def _rescan(self, one: Attached) -> dict[int, EdgeholdError]:
        """Take note of new threads, and drop those that the target does not have any more."""
        tids = one.source.tids()
        if one.policy.actuator is not Actuator.DEADLINE:
            return {}  # asking keeps the source up to date
        for tid in one.threads.keys() - set(tids):
            self._drop(one, one.threads[tid])
        one.left_out = 0
        one.denied = ""
        refused: dict[int, EdgeholdError] = {}
        for tid in tids:
            if tid in one.threads:
                continue
            try:
                self._found(one, tid)
            except DeniedError as error:
                one.denied = error.message
                refused[tid] = error
            except GoneError as error:
                one.source.forget(tid)
                refused[tid] = error
        return refused

    def _found(self, one: Attached, tid: int) -> None:
        """A thread that the target has and we did not know; not if it is another attachment's, or there is no room."""
        if tid in self._owners:
            return
        if len(self._owners) >= self._max_threads:
            one.left_out += 1
            return
        facts = procfs.stat(tid)
        if facts.ended:
            raise GoneError(f"thread {tid} has ended")
        if why := why_not(facts):
            raise DeniedError(why)
        if self._deny is not None and (why := self._deny.why(tid)):
            raise DeniedError(why)
        thread = Thread(tid, facts.start_ticks, facts.name, one.config, self._table)
        thread.first_ns = one.config.initial_budget_ns
        thread.period_origin = origin(one.policy)
        one.threads[tid] = thread
        self._owners[tid] = one
        self._tids = None
        if one.policy.dry_run:
            try:
                self._holder.watch(thread, one)
            except BaseException:
                self._holder.forget(thread)
                self._forgotten(one, thread)
                raise
        else:
            self._waits(one, thread)
            self.grants.count(Entry(thread, one))

    def _drop(self, one: Attached, thread: Thread) -> None:
        try:
            self._holder.leave(thread)
        finally:
            self._forgotten(one, thread)

    def _drop_all(self, one: Attached, all_of_them: contextlib.ExitStack) -> None:
        """At the block's end; an error of one thread is raised when all had their turn."""
        for thread in one.threads.values():
            all_of_them.callback(self._drop, one, thread)

    def _ended(self, one: Attached, thread: Thread) -> None:
        self._holder.forget(thread)
        self._forgotten(one, thread)
        one.source.forget(thread.tid)
        if one.source.over:
            self._over.append(one)

    def _forgotten(self, one: Attached, thread: Thread) -> None:
        self.grants.without(thread)
        self._changes.forget(thread)
        del one.threads[thread.tid]
        self._held(one, thread)
        del self._owners[thread.tid]
        self._tids = None

    def _taken(self, one: Attached, thread: Thread) -> None:
        self._holder.check_alive(thread)
        self._holder.taken(thread)
        self.grants.without(thread)
        self._waits(one, thread)

    def _stuck(self, one: Attached, thread: Thread) -> None:
        self._holder.revive(thread)
        self.grants.without(thread)
        self._waits(one, thread)

    def _entries(self) -> Iterator[Entry]:
        """Everybody who is held or could be now."""
        now = self._clock.monotonic_ns()
        for tid, one in self._owners.items():
            thread = one.threads[tid]
            if thread.state is ThreadState.HELD or (thread.try_at_ns is not None and thread.try_at_ns <= now):
                yield Entry(thread, one)
