"""Takes threads into reservations and out of them, with the journal always one step ahead. No rule, no cycle.

Every system call that changes a policy goes through here, so that three promises hold in one place: what to restore is
on disk before a policy changes; nobody is attached before the safe gap is over; what somebody else has changed since
is left alone.
"""

import contextlib
import errno
import logging
import os

from deadlined import reservation
from deadlined.held import Attached, Thread
from deadlined.journal import Journal, Row
from deadlined.late import Late, heir, take_out
from deadlined.metrics import Metrics
from deadlined.reservation import Left
from edgehold.api.deadlined import Rule, ThreadState
from edgehold.clock import NS_PER_S, Clock
from edgehold.errors import BadStateError, EdgeholdError, FailedError
from edgehold.kernel import procfs, sched
from edgehold.kernel.native_held import FROZEN, HELD, PHASE_BEGIN, PLACE_SHORT, HeldTable
from edgehold.kernel.procfs import GoneError
from edgehold.kernel.sched import SchedAttr

log = logging.getLogger(__name__)

# A refusal that time alone does not cure (privilege, pinning) is tried again so seldom; EBUSY in the next cycle.
_RETRY_NS = 5 * NS_PER_S
_MESSAGE_RECOVERED = "5a1f0e5ad36c4d4f9f0f4c7a8e8f2d11"
_MESSAGE_STUCK = "0b6c52d1c5b34f1db3c6d2a64c1f6a02"


def threads_text(number: int) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{number} thread" if number == 1 else f"{number} threads"


def no_descriptor() -> FailedError:
    """EMFILE and ENFILE in the user's terms."""
    return FailedError("deadlined has no file descriptor left; raise LimitNOFILE= or lower max_threads", retryable=True)


def _gap_ns(period_ns: int, budget_ns: int) -> int:
    """For a thread of which nobody knows when it left, nor by how much it had overrun."""
    return reservation.safe_gap_ns(period_ns=period_ns, budget_ns=budget_ns, overrun_ns=0)


class Holder:
    """Attaches, changes and detaches single threads; owns their rows in the table, their descriptors and the gaps."""

    def __init__(self, *, clock: Clock, journal: Journal, metrics: Metrics, table: HeldTable, short_ns: int) -> None:
        self.table = table
        self.rows: dict[int, Thread] = {}
        """Whose each row of the table is."""
        self.refused_errno = 0
        """Why the kernel refused the last `change`; 0: it did not."""
        self._short_ns = short_ns
        self._clock = clock
        self._journal = journal
        self._metrics = metrics
        self._gaps = journal.gaps(clock.monotonic_ns())
        self._late: dict[tuple[int, int], Late] = {}
        """Who is in a reservation of ours still and belongs to nobody; their rows in the journal stay so long."""
        self._behind = False
        """The journal refused a row's end; told once."""

    def recover(self) -> int:
        """Put right what a killed predecessor left behind. Returns how many threads got their policy back."""
        restored = sum(self._finish(Late(row)) for row in self._journal.held())
        if restored:
            log.warning(
                "restored %s that a deadlined which was killed had left in SCHED_DEADLINE; of threads, processes and "
                "trees attachments are not kept over a restart: attach again what is to be held",
                threads_text(restored),
                extra={"message_id": _MESSAGE_RECOVERED},
            )
        return restored

    def _finish(self, late: Late, *, anyway: bool = False) -> bool:
        """Take out one that is late, and forget its row. Returns whether it was still in our reservation and left.

        One that can't leave stays late, and is told once.
        """
        row, until_ns = late.row, 0
        left = None
        try:
            left = take_out(late, anyway=anyway)
            gap_ns = _gap_ns(row.period_ns, row.max_budget_ns) if left is None else left.gap_ns * late.factor
            until_ns = self._clock.monotonic_ns() + gap_ns
        except GoneError:
            pass
        except OSError as error:
            self._stays(late, error)
            return False
        if left is not None:
            self._metrics.setattr_calls.inc()
            self._tell(row, left)
        self._late.pop(late.key, None)
        self._forget_row(late.key, until_ns)
        return left is not None

    def _stays(self, late: Late, error: OSError) -> None:
        if late.key not in self._late:
            log.error(
                "can't take thread %d out of its reservation, tries again in every cycle: %s",
                late.row.tid, error.strerror or error,
            )  # fmt: skip
        self._late[late.key] = late

    @staticmethod
    def _tell(row: Row, left: Left) -> None:
        """What a person should know of how a thread left."""
        if left.fallback:
            log.warning(
                "thread %d is in SCHED_OTHER: the kernel refused its own policy (%s, %s)",
                row.tid, row.original, errno.errorcode.get(left.refused_errno, "?"),
            )  # fmt: skip
        if left.leaked:
            log.warning(
                "thread %d slept and could not be shrunk when it had to leave; the kernel keeps %.3f CPUs for nobody: "
                "see docs/troubleshooting.md, Admission bandwidth that nobody holds",
                row.tid, left.leaked,
            )  # fmt: skip

    def finish(self) -> None:
        """The end: who could not leave so far leaves whatever it costs. The rows of those who can't stay."""
        for late in list(self._late.values()):
            self._finish(late, anyway=True)

    def enter(self, thread: Thread, attached: Attached, budget_ns: int) -> EdgeholdError | None:
        """Try to take a thread into its reservation, with this budget.

        Returns why not, if the kernel, the journal or the facts refuse; the thread then waits and says so. In the safe
        gap it waits too, which is no refusal.

        Raises:
            GoneError: it ended.
        """
        now = self._clock.monotonic_ns()
        if (until_ns := self._gaps.get(thread.key, 0)) > now:
            thread.try_at_ns = until_ns
            thread.reason = (
                f"left a reservation a moment ago; the kernel would leave it throttled for ever if it was attached "
                f"again at once: waits for {(until_ns - now) / 1e9:.1f} s"
            )
            return None
        if thread.key in self._late:
            thread.try_at_ns = now
            thread.reason = (
                "can't leave a reservation of before at the moment (see the daemon's log): waits until it has"
            )
            return None
        self._gaps.pop(thread.key, None)
        thread.original = None
        wanted = SchedAttr.deadline(runtime_ns=budget_ns, period_ns=thread.config.period_ns)
        try:
            self.check_alive(thread)
            original = reservation.check_free(thread.tid)
            thread.process = thread.process or procfs.process_of(thread.tid)
            self._journal.hold([self._row(thread, original)])
            thread.original = original
            thread.fd = procfs.open_thread(thread.tid, "schedstat")
            self._metrics.setattr_calls.inc()
            reservation.enter(thread.tid, budget_ns=wanted.runtime_ns, period_ns=wanted.period_ns)
        except GoneError:
            self.forget(thread)
            raise
        except (BadStateError, FailedError, OSError) as error:
            return self._refused(thread, error, wanted, now)
        thread.state = ThreadState.HELD
        thread.reason = ""
        thread.budget_ns = wanted.runtime_ns
        thread.try_at_ns = None
        self._sample(thread, attached, flags=HELD)
        return None

    def watch(self, thread: Thread, attached: Attached) -> None:
        """Measure a thread and leave it as it is: a dry run. Raises `GoneError`, and `OSError` (EMFILE)."""
        self.check_alive(thread)
        thread.fd = procfs.open_thread(thread.tid, "schedstat")
        thread.state = ThreadState.WATCHED
        thread.reason = ""
        thread.try_at_ns = None
        self._sample(thread, attached, flags=0)

    def _sample(self, thread: Thread, attached: Attached, *, flags: int) -> None:
        """Give it a row; the first window begins now, so that what it executes from now on counts."""
        thread.row = self.table.add(
            tid=thread.tid,
            fd=thread.fd,
            owner=attached.id,
            start_ticks=thread.start_ticks,
            rule=thread.config.raw(),
            budget_ns=thread.first_ns,
        )
        self.rows[thread.row] = thread
        cells = thread.cells
        cells.flags = flags | (FROZEN if attached.suspended else 0)
        cells.budget_ns = thread.budget_ns
        now = self._clock.monotonic_ns()
        executed_ns, run_delay_ns = procfs.schedstat(thread.fd)
        cells.base_ns, cells.base_executed_ns, cells.base_run_delay_ns = now, executed_ns, run_delay_ns
        cells.executed_total_ns, cells.progress_ns = executed_ns, now
        thread.entered_ns = now
        if flags & HELD and self._short_ns and thread.config.rule is Rule.FAST:
            # The first window is a short look: a first budget that is far too small is seen at once.
            cells.sizing.phase = PHASE_BEGIN
            cells.place = PLACE_SHORT
            cells.due_ns = now + max(self._short_ns, thread.config.period_ns)
            self.table.expect(cells.due_ns)

    @staticmethod
    def check_alive(thread: Thread) -> None:
        """Raises `GoneError` where the thread has ended, and its id may be another's."""
        facts = procfs.stat(thread.tid)
        if facts.ended or facts.start_ticks != thread.start_ticks:
            raise GoneError(f"thread {thread.tid} has ended")

    def change(self, thread: Thread, budget_ns: int, period_ns: int | None = None) -> bool:
        """Set another budget, and another period where one is given. Returns whether it is in force.

        A refusal keeps what was in force, and is told in the reason.

        Raises:
            GoneError: it ended.
        """
        before_ns = thread.config.period_ns
        wanted = SchedAttr.deadline(runtime_ns=budget_ns, period_ns=period_ns or before_ns)
        self.refused_errno = 0
        if not reservation.is_held(thread.tid, period_ns=before_ns):
            self.taken(thread)
            return False
        try:
            if wanted.period_ns != before_ns and thread.original is not None:
                self._journal.hold([self._row(thread, thread.original, also_period_ns=wanted.period_ns)])
            self._metrics.setattr_calls.inc()
            reservation.enter(thread.tid, budget_ns=wanted.runtime_ns, period_ns=wanted.period_ns)
        except FailedError as error:
            thread.reason = error.message
            return False
        except OSError as error:
            self._metrics.refused(reservation.errno_name(error))
            self.refused_errno = error.errno or 0
            why = sched.explain(error, thread.tid, wanted).message
            thread.reason = f"stays at {thread.budget_ns / 1e6:g} ms, asked for again: {why}"
            return False
        thread.budget_ns = wanted.runtime_ns
        thread.cells.budget_ns = wanted.runtime_ns
        thread.reason = ""
        return True

    def leave(self, thread: Thread, *, grow: bool = True) -> int:
        """Give a thread its own policy back, if it is held. Returns when it may be attached again (0: it is gone)."""
        until_ns = 0
        factor = 2 ** min(thread.stuck, 6)
        try:
            if thread.budget_ns and thread.original is not None:
                if not reservation.is_held(thread.tid, period_ns=thread.config.period_ns):
                    self.taken(thread)
                    return self._gaps[thread.key]
                self._metrics.setattr_calls.inc()
                self._close(thread)  # frees the descriptor that leaving needs
                left = reservation.leave(
                    thread.tid,
                    thread.original,
                    period_ns=thread.config.period_ns,
                    max_budget_ns=thread.config.max_budget_ns,
                    grow=grow,
                )
                until_ns = self._clock.monotonic_ns() + left.gap_ns * factor
                self._tell(self._row(thread, thread.original), left)
        except GoneError:
            pass
        except OSError as error:
            if thread.original is not None:
                self._stays(Late(self._row(thread, thread.original), grow=grow, factor=factor), error)
            self._unheld(thread)
            return 0
        self._left(thread, until_ns)
        return until_ns

    def revive(self, thread: Thread) -> None:
        """Take out a thread that the kernel left throttled for ever; it is attached again when that is safe."""
        if thread.cells.progress_ns > thread.entered_ns:
            thread.stuck = 0  # it has executed since: not the same fault again
        thread.stuck += 1
        log.warning(
            "thread %d (%s) was left throttled by the kernel; taken out, attached again later",
            thread.tid, thread.name, extra={"message_id": _MESSAGE_STUCK},
        )  # fmt: skip
        self._metrics.stuck.inc()
        until_ns = self.leave(thread, grow=False)
        if thread.state is ThreadState.WAITING:
            return  # somebody else had taken it out meanwhile
        thread.state = ThreadState.STUCK
        thread.try_at_ns = until_ns
        thread.reason = "the kernel left it throttled; it runs under its own policy until it is safe to attach it again"

    def forget(self, thread: Thread) -> None:
        """The thread ended: its bandwidth went with it, unless another thread has it now."""
        row = heir(thread)
        if row is not None and not any(one.tid == row.tid and one.budget_ns for one in self.rows.values()):
            with contextlib.suppress(FailedError):  # it leaves all the same
                self._journal.hold([row])
            self._finish(Late(row))
        self._left(thread, 0)

    def prune(self) -> None:
        """Forget the gaps that are over, and take out who could not leave so far."""
        for late in list(self._late.values()):
            self._finish(late)
        now = self._clock.monotonic_ns()
        if any(until <= now for until in self._gaps.values()):
            # Not read anew: the journal may be behind.
            self._gaps = {key: until for key, until in self._gaps.items() if until > now}
            with contextlib.suppress(FailedError):  # they are over on disk as well, and are not read
                self._journal.prune(now)

    def _close(self, thread: Thread) -> None:
        """It is not sampled any more; what its rule had learned is where it begins again."""
        if thread.row >= 0:
            thread.first_ns = min(max(thread.wanted_ns, thread.config.min_budget_ns), thread.config.max_budget_ns)
            self.table.remove(thread.row)
            del self.rows[thread.row]
            thread.row = -1
        if thread.fd >= 0:
            os.close(thread.fd)
            thread.fd = -1

    def _unheld(self, thread: Thread) -> None:
        self._close(thread)
        thread.budget_ns = 0
        thread.suspect_ns = 0

    def _left(self, thread: Thread, until_ns: int) -> None:
        self._unheld(thread)
        self._forget_row(thread.key, until_ns)

    def _forget_row(self, key: tuple[int, int], until_ns: int) -> None:
        """The thread left. A row that stays because the journal refuses does no harm: see `recover`."""
        if until_ns:
            self._gaps[key] = until_ns
        try:
            self._journal.release([(*key, until_ns)])
        except FailedError as error:
            if not self._behind:
                log.error("the journal keeps threads that have left: %s", error)  # noqa: TRY400
            self._behind = True
        else:
            self._behind = False

    def taken(self, thread: Thread) -> None:
        """Somebody else changed the policy: his will stands. When he did is unknown, so the gap begins now."""
        gap_ns = _gap_ns(thread.config.period_ns, thread.config.max_budget_ns)
        self._left(thread, self._clock.monotonic_ns() + gap_ns)
        thread.state = ThreadState.WAITING
        thread.try_at_ns = None
        thread.reason = (
            "somebody else changed its scheduling policy, and deadlined leaves that alone; detach and attach it again"
        )

    def _refused(
        self, thread: Thread, error: BadStateError | FailedError | OSError, wanted: SchedAttr, now: int
    ) -> EdgeholdError:
        thread.state = ThreadState.WAITING
        thread.try_at_ns = now + _RETRY_NS
        if thread.original is None:  # no row was written; one that is there is of before, and stays
            self._unheld(thread)
        else:
            self._left(thread, 0)
        if isinstance(error, FailedError):
            thread.reason = error.message
            return error
        if isinstance(error, BadStateError):
            told: EdgeholdError = error
        elif procfs.is_exhausted(error):
            told = no_descriptor()
        else:
            self._metrics.refused(reservation.errno_name(error))
            told = sched.explain(error, thread.tid, wanted)
            if error.errno == errno.EBUSY:
                thread.try_at_ns = now
        thread.reason = told.message
        return told

    @staticmethod
    def _row(thread: Thread, original: SchedAttr, *, also_period_ns: int = 0) -> Row:
        return Row(
            tid=thread.tid,
            start_ticks=thread.start_ticks,
            original=original,
            period_ns=thread.config.period_ns,
            max_budget_ns=thread.config.max_budget_ns,
            also_period_ns=also_period_ns,
        )
