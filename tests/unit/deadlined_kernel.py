"""A host for the core of deadlined that a test can steer: its threads, its clock, what the kernel admits and refuses.

It stands in for what `Holder` and `Monitor` ask of the kernel, and no further: the journal, the table in C, the rules
and all that is deadlined's own are real. No policy of any thread is ever changed.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from deadlined import reservation
from deadlined.groups import Groups
from deadlined.held import Attached, Thread
from deadlined.holder import Holder
from deadlined.journal import Journal
from deadlined.metrics import Metrics
from deadlined.monitor import Monitor
from deadlined.reservation import Left
from deadlined.tasks import Read, Tasks
from edgehold.api.deadlined import Policy, Target, TargetKind
from edgehold.errors import BadStateError, FailedError
from edgehold.kernel import procfs, sched
from edgehold.kernel.native_bpf import TaskRecords
from edgehold.kernel.native_held import HeldTable
from edgehold.kernel.procfs import GoneError, ThreadStat
from edgehold.kernel.sched import SchedAttr

MS = 1_000_000
S = 1_000 * MS
CYCLE_NS = 500 * MS
# Above every pid_max (2^22): nobody's threads.
TIDS = tuple(range(2**30, 2**30 + 128))
TARGET = Target(kind=TargetKind.PROCESS, id=TIDS[0])
EMPTY = OSError(errno.EMFILE, "Too many open files")
START_TICKS = 5
_ENDED = 0x80


@dataclass
class Task:
    """One thread."""

    executed_ns: int = 0
    run_delay_ns: int = 0
    state: str = "S"
    reservation: tuple[int, int] | None = None
    """Budget and period of the SCHED_DEADLINE that it is in, whoever put it there."""
    dl_runtime_ns: int = MS
    start_ticks: int = START_TICKS


@dataclass
class Kernel:
    """The host."""

    directory: Path
    cpus: float = 1.8
    now_ns: int = 1000 * S
    tasks: dict[int, Task] = field(default_factory=lambda: {tid: Task() for tid in TIDS})
    calls: list[tuple[str, int]] = field(default_factory=list)
    """``enter`` (also a change) and ``leave``, with the thread."""
    refused: dict[int, OSError] = field(default_factory=dict)
    """Whose reservation is refused, and how."""
    stays: dict[int, OSError] = field(default_factory=dict)
    """Whose leaving is refused, and how."""
    processes: dict[int, int] = field(default_factory=dict)
    """Whose thread each is; its own where nothing else is said."""
    exhausted: bool = False
    """No descriptor is left."""
    open_files: dict[int, int] = field(default_factory=dict)
    """Whose schedstat each descriptor is, or was."""

    def monotonic_ns(self) -> int:
        return self.now_ns

    def wall_s(self) -> float:
        return self.now_ns / 1e9

    @property
    def held(self) -> float:
        """What is admitted, in CPUs."""
        return sum(one.reservation[0] / one.reservation[1] for one in self.tasks.values() if one.reservation)

    def _of(self, tid: int) -> Task:
        if tid not in self.tasks:
            raise GoneError(f"thread {tid} does not exist (any more)")
        return self.tasks[tid]

    def stat(self, tid: int) -> ThreadStat:
        if self.exhausted:
            raise EMPTY
        task = self._of(tid)
        return ThreadStat(tid, "x", task.state, False, task.start_ticks)

    def open_thread(self, tid: int, _file: str) -> int:
        self.stat(tid)
        (self.directory / "schedstat").write_text("0 0 0\n")
        fd = os.open(self.directory / "schedstat", os.O_RDONLY)
        self.open_files[fd] = tid
        return fd

    def schedstat(self, fd: int) -> tuple[int, int]:
        task = self._of(self.open_files[fd])
        return task.executed_ns, task.run_delay_ns

    def check_free(self, tid: int) -> SchedAttr:
        if self._of(tid).reservation is not None:
            raise BadStateError(f"thread {tid} is in SCHED_DEADLINE already")
        return SchedAttr()

    def process_of(self, tid: int) -> int:
        self._of(tid)
        return self.processes.get(tid, tid)

    def get(self, tid: int = 0) -> SchedAttr:
        budget, period = self._of(tid).reservation or (0, 0)
        return SchedAttr.deadline(runtime_ns=budget, period_ns=period) if budget else SchedAttr()

    def enter(self, tid: int, *, budget_ns: int, period_ns: int) -> None:
        task = self._of(tid)
        self.calls.append(("enter", tid))
        if tid in self.refused:
            raise self.refused[tid]
        budget, period = task.reservation or (0, 1)
        if self.held - budget / period + budget_ns / period_ns > self.cpus:
            raise OSError(errno.EBUSY, "Device or resource busy")
        task.reservation = budget_ns, period_ns

    def is_held(self, tid: int, *, period_ns: int) -> bool:
        task = self._of(tid)
        return task.reservation is not None and task.reservation[1] == period_ns

    def leave(
        self,
        tid: int,
        _original: SchedAttr,
        *,
        period_ns: int,
        max_budget_ns: int,
        grow: bool = True,
        anyway: bool = False,
    ) -> Left:
        task = self._of(tid)
        assert 0 < max_budget_ns <= period_ns
        assert task.reservation is not None
        if tid in self.stays and not anyway:
            raise self.stays[tid]
        self.calls.append(("leave", tid) if grow else ("revive", tid))
        task.reservation = None
        return Left(gap_ns=S, asleep=True, fallback=False, refused_errno=0)

    def dl_runtime(self, tid: int) -> int | None:
        if self.exhausted:
            raise EMPTY
        return self._of(tid).dl_runtime_ns

    def run(
        self, cycles: float = 1, *, executed_ms: float = 0, waited_ms: float = 0, tids: tuple[int, ...] = TIDS
    ) -> None:
        """Time goes by, in which these threads executed and waited so much of each 100 ms."""
        self.now_ns += round(cycles * CYCLE_NS)
        for tid in tids:
            if tid in self.tasks:
                self.tasks[tid].executed_ns += round(cycles * 5 * executed_ms * MS)
                self.tasks[tid].run_delay_ns += round(cycles * 5 * waited_ms * MS)

    def leaked(self) -> set[int]:
        """Descriptors that were opened for threads and are open still."""
        mine = str(self.directory / "schedstat")
        found = set()
        for fd in self.open_files:
            with suppress(FileNotFoundError):  # closed; or a number that something else has by now
                if str(Path(f"/proc/self/fd/{fd}").readlink()) == mine:
                    found.add(fd)
        return found


class Records(Tasks):
    """The kernel's list of deadline threads, of this host."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self._kernel = kernel
        self._records = TaskRecords(len(TIDS))

    def read(self, threads: int) -> Read:  # noqa: ARG002 - it is always worth it here
        count = 0
        for tid, task in self._kernel.tasks.items():
            if task.reservation is not None:
                one = self._records.pointer[count]
                one.tid, one.state = tid, _ENDED if task.state == "Z" else 0 if task.state == "R" else 1
                one.start_boottime_ns = task.start_ticks * 10 * MS
                one.executed_ns, one.run_delay_ns = task.executed_ns, task.run_delay_ns
                one.period_ns = task.reservation[1]
                one.dl_runtime_ns, one.throttled = task.dl_runtime_ns, task.dl_runtime_ns <= 0
                count += 1
        return self._records.pointer, count, self._kernel.now_ns


@dataclass
class Scripted:
    """A source that says what it is told to say."""

    wanted: tuple[int, ...] = TIDS
    error: OSError | None = None
    over: str = ""
    reason: str = ""
    suspended: bool = False
    closed: int = 0
    forgotten: list[int] = field(default_factory=list)

    def changed(self) -> bool:
        return True

    def tids(self) -> tuple[int, ...]:
        if self.error is not None:
            raise self.error
        return self.wanted

    def forget(self, tid: int) -> None:
        self.forgotten.append(tid)
        self.wanted = tuple(one for one in self.wanted if one != tid)

    def close(self) -> None:
        self.closed += 1


@dataclass
class Core:
    """The monitor and what it stands on."""

    kernel: Kernel
    journal: Journal
    holder: Holder
    monitor: Monitor
    metrics: Metrics

    def cycle(self, cycles: float = 1, *, executed_ms: float = 0, waited_ms: float = 0) -> None:
        """Time goes by, then one cycle."""
        self.kernel.run(cycles, executed_ms=executed_ms, waited_ms=waited_ms)
        self.monitor.cycle()

    def nothing_is_left(self) -> None:
        """Every thread is free, no row, no descriptor, no counted bandwidth and no row of the journal is left."""
        assert [tid for tid, one in self.kernel.tasks.items() if one.reservation] == []
        assert (len(self.holder.table), self.holder.rows) == (0, {})
        assert self.kernel.leaked() == set()
        assert self.monitor.grants.wanted == pytest.approx(0)
        assert self.monitor.tids() == frozenset()
        assert self.journal.held() == []


@contextmanager
def core_on(
    directory: Path, patch: pytest.MonkeyPatch, *, short_ns: int = 0, max_threads: int = 1000
) -> Iterator[Core]:
    """A monitor over a host of its own."""
    kernel = Kernel(directory)
    for name in ("stat", "open_thread", "schedstat", "dl_runtime"):
        patch.setattr(procfs, name, getattr(kernel, name))
    patch.setattr(procfs, "process_of", kernel.process_of)
    patch.setattr(sched, "get", kernel.get)
    for name in ("check_free", "enter", "is_held", "leave"):
        patch.setattr(reservation, name, getattr(kernel, name))
    journal = Journal(directory / "state", boot_id="a")
    metrics = Metrics()
    table = HeldTable(history=640, cycle_ns=CYCLE_NS, short_ns=short_ns)
    holder = Holder(clock=kernel, journal=journal, metrics=metrics, table=table, short_ns=short_ns)
    monitor = Monitor(
        clock=kernel,
        holder=holder,
        metrics=metrics,
        tasks=Records(kernel),
        groups=Groups(clock=kernel, journal=journal, table=table, cycle_ns=CYCLE_NS),
        history=10,
        max_threads=max_threads,
    )
    yield Core(kernel, journal, holder, monitor, metrics)
    for fd in kernel.leaked():
        os.close(fd)
    journal.close()


SMALL = Policy(initial_budget_ns=MS)
"""Of so small a budget that all the threads of a host fit."""


def held(core: Core, policy: Policy | None = None, *, number: int = 1, threads: int = 1) -> tuple[Thread, Attached]:
    """An attachment of so many threads; its first one."""
    source = Scripted(wanted=TIDS[:threads])
    one, _ = core.monitor.adopt(number, TARGET, policy or Policy(), source)
    return one.threads[TIDS[0]], one


def script(one: Attached) -> Scripted:
    assert isinstance(one.source, Scripted)
    return one.source


def hold_fails(_rows: object) -> None:
    """A journal that can't be written."""
    raise FailedError("the disk is full")
