"""``deadlined run``: holds a command and its descendants by reservations for as long as it runs, without the daemon.

It answers as the command does. Whatever goes wrong with holding it never ends the command; only what can be known
before it begins (no privilege, a wrong policy) is refused.
"""

import asyncio
import contextlib
import logging
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from deadlined import leftovers
from deadlined.command import Command, block_signals
from deadlined.engine import Engine
from deadlined.held import Attached, sample_of
from deadlined.trees import open_tree
from edgehold.api.deadlined import Policy, Sample, Target, TargetKind, ThreadState
from edgehold.clock import NS_PER_S, Clock, SystemClock
from edgehold.errors import DeniedError, EdgeholdError
from edgehold.kernel import procfs, sched
from edgehold.kernel.limits import DL_MIN_PERIOD_NS
from edgehold.kernel.procfs import GoneError
from edgehold.kernel.sched import SchedAttr
from edgehold.service import take_descriptors

log = logging.getLogger(__name__)

# As the daemon's defaults.
_CYCLE_MS = 500
_FAST_CYCLE_MS = 100
_HISTORY = 600
_MAX_THREADS = 5000


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One thread of the command. Times in nanoseconds; executed times are per period."""

    tid: int
    name: str
    state: ThreadState
    """The last one that was seen."""
    period_ns: int
    budget_ns: int
    """The last one in force."""
    wanted_ns: int
    """The last one that its rule wanted: what a dry run is for."""
    mean_executed_ns: int
    peak_executed_ns: int
    """Of the window with the most."""
    windows: int
    reason: str = ""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured while a command ran."""

    status: int
    """As a shell has it: the exit status, or 128 and the signal's number."""
    elapsed_ns: int
    threads: tuple[Measured, ...]
    """Those that lived long enough to be seen, by id."""


def check_privilege() -> None:
    """That this process may make reservations: tried on a thread of its own, which ends at once.

    Raises:
        DeniedError: it may not, or it is pinned; the text has the cure.
    """
    refused: list[EdgeholdError] = []
    # More than the thread can use before it leaves again: it never waits for its next period.
    tried = SchedAttr.deadline(runtime_ns=10 * DL_MIN_PERIOD_NS, period_ns=NS_PER_S)

    def attempt() -> None:
        try:
            sched.set_attr(0, tried)
            sched.set_attr(0, SchedAttr())
        except OSError as error:
            refused.append(sched.explain(error, threading.get_native_id(), tried))

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    # No capacity at the moment is no reason: the command's threads wait for some.
    if refused and isinstance(refused[0], DeniedError):
        raise DeniedError(f"{refused[0].message}. Nothing was started; --dry-run measures without")


def run(argv: Sequence[str], policy: Policy) -> Report:
    """Run a command to its end. Blocks; the calling thread's signals are the command's from now on.

    Raises:
        CommandError: it can't be run.
        EdgeholdError: it can't be held, and was not started.
    """
    caught, mask = block_signals()
    if not policy.dry_run:
        check_privilege()

    async def work() -> Report:
        clock = SystemClock()
        with _engine(clock, dry_run=policy.dry_run) as engine:
            command = Command(argv, caught=caught, mask=mask)
            engine.begin()
            return await _Run(engine, command, policy).to_its_end()

    return asyncio.run(work())


@contextlib.contextmanager
def _engine(clock: Clock, *, dry_run: bool) -> Iterator[Engine]:
    """A private journal for the block. What a killed run has left is put right first."""
    with contextlib.ExitStack() as stack:
        if dry_run:  # changes nothing, so anybody may, and nothing is to be restored
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deadlined-")))
        else:
            where = leftovers.base()
            where.mkdir(parents=True, exist_ok=True)
            directory = leftovers.own(where)
        engine = Engine(
            clock, directory,
            cycle_ms=_CYCLE_MS, fast_cycle_ms=_FAST_CYCLE_MS, history=_HISTORY, max_threads=_MAX_THREADS,
        )  # fmt: skip
        stack.callback(engine.close)
        if not dry_run:
            stack.callback(leftovers.remove, engine.journal, directory)
            leftovers.adopt(engine.journal, clock, where)
            engine.recover()
        stack.callback(engine.release_all)
        yield engine


class _Run:
    def __init__(self, engine: Engine, command: Command, policy: Policy) -> None:
        self._engine = engine
        self._command = command
        self._policy = policy
        self._begun_ns = time.monotonic_ns()
        self._seen: dict[int, tuple[str, ThreadState, str]] = {}
        """Name, state and reason of each thread, as of the last cycle that found it."""
        self._number = 0

    async def to_its_end(self) -> Report:
        take_descriptors()  # after the command began, whose limits stay its own
        holding = asyncio.create_task(self._hold(), name="hold")
        try:
            status = await self._command.wait()
        finally:
            holding.cancel()
            await asyncio.gather(holding, return_exceptions=True)
        self._note()
        return Report(status=status, elapsed_ns=time.monotonic_ns() - self._begun_ns, threads=self._measured())

    async def _hold(self) -> None:
        """Until the command has ended; a fault leaves the command alone, with its own policies."""
        try:
            self._adopt()
            await self._engine.run(after_cycle=self._note)
        except GoneError:
            pass  # the command has ended already
        except EdgeholdError as error:
            log.error("the command goes on without reservations: %s", error)  # noqa: TRY400 - the text is the message
        except Exception:
            log.exception("the command goes on without reservations")
        self._engine.release_all()

    def _adopt(self) -> None:
        monitor, pid = self._engine.monitor, self._command.pid
        self._number = self._engine.journal.number()
        source = open_tree(pid, births=self._engine.births)
        target = Target(kind=TargetKind.TREE, id=pid)
        _, refused = monitor.adopt(self._number, target, self._policy, source)
        self._engine.soon()
        self._note()
        for tid, error in refused.items():
            if not isinstance(error, GoneError):  # a command that is over at once is no fault
                log.warning("thread %d is not held yet: %s", tid, error)

    def _note(self) -> None:
        """What is known of the threads now: who ends is forgotten by the monitor."""
        one: Attached | None = self._engine.monitor.attachments.get(self._number)
        for thread in one.threads.values() if one is not None else ():
            with contextlib.suppress(GoneError):  # the name may be another one since: exec(2), prctl(2)
                self._seen[thread.tid] = procfs.stat(thread.tid).name, thread.state, thread.reason

    def _measured(self) -> tuple[Measured, ...]:
        samples: dict[int, list[Sample]] = {}
        if self._number:
            for raw in self._engine.table.history(self._number, most=self._engine.history_size):
                samples.setdefault(raw.tid, []).append(sample_of(raw))
        return tuple(measured(tid, *seen, samples.get(tid, [])) for tid, seen in sorted(self._seen.items()))


def measured(tid: int, name: str, state: ThreadState, reason: str, samples: Sequence[Sample]) -> Measured:
    """A thread's windows in one line. Pure."""
    last = samples[-1] if samples else None
    per_period = [(one.executed_ns * one.period_ns) // max(one.elapsed_ns, 1) for one in samples]
    elapsed_ns = sum(one.elapsed_ns for one in samples)
    mean_ns = sum(one.executed_ns for one in samples) * (last.period_ns if last else 0) // max(elapsed_ns, 1)
    return Measured(
        tid=tid,
        name=name,
        state=state,
        period_ns=last.period_ns if last else 0,
        budget_ns=last.budget_ns if last else 0,
        wanted_ns=last.wanted_ns if last else 0,
        mean_executed_ns=mean_ns,
        peak_executed_ns=max(per_period, default=0),
        windows=len(samples),
        reason=reason,
    )
