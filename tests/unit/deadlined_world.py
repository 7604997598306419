"""Grants over a host whose holder writes down what it is told and refuses what does not fit."""

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from deadlined.grants import Entry, Grants
from deadlined.held import Attached, Thread
from deadlined.rules import rule_config
from deadlined.standing import PendingSource
from edgehold.api.deadlined import Policy, Target, TargetKind, ThreadState
from edgehold.errors import EdgeholdError, NoCapacityError
from edgehold.kernel import capacity
from edgehold.kernel.native_held import HeldTable
from edgehold.kernel.procfs import GoneError

if TYPE_CHECKING:
    from deadlined.holder import Holder

MS = 1_000_000
S = 1_000 * MS
P = 100 * MS
LEAST_NS = 1024
TARGET = Target(kind=TargetKind.PROCESS, id=1)


class Host:
    """The kernel's admission, deadlined's holder of threads and the clock."""

    def __init__(self, cpus: float) -> None:
        self.cpus = cpus
        self.now_ns = 1000 * S
        self.calls: list[tuple[int, float]] = []
        """Each thread that was changed or entered, and its new budget in ms."""
        self.highest = 0.0
        self.threads: dict[int, Thread] = {}
        self.gone: set[int] = set()
        self.taken: set[int] = set()
        self.pinned: set[int] = set()
        self.refused_errno = 0
        """As `Holder`'s: why the last change was refused."""

    def monotonic_ns(self) -> int:
        return self.now_ns

    def wall_s(self) -> float:
        raise AssertionError

    @property
    def held(self) -> float:
        return sum(one.budget_ns / one.config.period_ns for one in self.threads.values())

    def _set(self, thread: Thread, budget_ns: int) -> bool:
        assert LEAST_NS <= budget_ns <= thread.config.period_ns
        self.calls.append((thread.tid, round(budget_ns / MS, 3)))
        if thread.tid in self.gone:
            raise GoneError(f"thread {thread.tid} has ended")
        if self.held + (budget_ns - thread.budget_ns) / thread.config.period_ns > self.cpus + 1e-9:
            return False
        thread.budget_ns = budget_ns
        self.highest = max(self.highest, self.held)
        return True

    def change(self, thread: Thread, budget_ns: int) -> bool:
        self.refused_errno = 0
        if thread.tid in self.taken:
            thread.state, thread.budget_ns, thread.try_at_ns = ThreadState.WAITING, 0, None
            return False
        if thread.tid in self.pinned:
            self.calls.append((thread.tid, round(budget_ns / MS, 3)))
            self.refused_errno, thread.reason = errno.EPERM, "EPERM: pinned"
            return False
        if self._set(thread, budget_ns):
            thread.reason = ""
            return True
        self.refused_errno = errno.EBUSY
        thread.reason = f"stays at {thread.budget_ns / MS:g} ms"
        return False

    def enter(self, thread: Thread, _attached: Attached, budget_ns: int) -> EdgeholdError | None:
        if not self._set(thread, budget_ns):
            thread.reason = "EBUSY"
            return NoCapacityError("EBUSY")
        thread.state, thread.try_at_ns, thread.reason = ThreadState.HELD, None, ""
        return None


class World:
    """Grants over a host, with threads of their own."""

    def __init__(self, cpus: float) -> None:
        self.host = Host(cpus)
        self.table = HeldTable(history=1, cycle_ns=S, short_ns=0)
        self.grants = Grants(clock=self.host, holder=cast("Holder", self.host), everybody=self.everybody)
        self.entries: list[Entry] = []

    def everybody(self) -> Iterator[Entry]:
        for one in self.entries:
            if one.thread.state is ThreadState.HELD or (one.thread.try_at_ns or 0) <= self.host.now_ns:
                yield one

    def thread(
        self,
        wanted_ms: float,
        *,
        weight: int = 100,
        held_ms: float | None = None,
        policy: Policy | None = None,
        beside: Entry | None = None,
    ) -> Entry:
        """A thread that wants so much of 100 ms; held with that, or with what is said.

        In an attachment of its own, or in somebody's.
        """
        tid = 2**30 + len(self.entries)
        policy = policy or Policy(weight=weight)
        config = rule_config(policy)
        attached = (
            beside.attached
            if beside
            else Attached(
                id=len(self.entries), target=TARGET, policy=policy, config=config, source=PendingSource(TARGET), begun=0
            )
        )
        thread = Thread(tid, 1, "x", config, self.table)
        thread.row = self.table.add(
            tid=tid, fd=-1, owner=1, start_ticks=1, rule=config.raw(), budget_ns=round(wanted_ms * MS)
        )
        thread.state, thread.try_at_ns = ThreadState.HELD, None
        thread.budget_ns = round((wanted_ms if held_ms is None else held_ms) * MS)
        self.host.threads[tid] = thread
        entry = Entry(thread, attached)
        attached.threads[tid] = thread
        self.entries.append(entry)
        self.grants.count(entry)
        return entry

    def waiting(self, wanted_ms: float, *, weight: int = 100, beside: Entry | None = None) -> Entry:
        """One that is not held yet."""
        entry = self.thread(wanted_ms, held_ms=0, weight=weight, beside=beside)
        entry.thread.state, entry.thread.try_at_ns = ThreadState.WAITING, 0
        self.grants.count(entry)
        return entry

    def wants(self, entry: Entry, wanted_ms: float) -> Entry:
        """Its rule has decided."""
        entry.thread.cells.sizing.wanted_ns = round(wanted_ms * MS)
        self.grants.count(entry)
        return entry

    def budgets(self) -> list[float]:
        return [round(one.thread.budget_ns / MS, 2) for one in self.entries]


def pending(world: World) -> bool:
    return world.grants.pending


def known(world: World, cpus: float) -> None:
    """A probe found so much, to the last step."""
    world.grants.measured(cpus + 3 * capacity.RESOLUTION)
