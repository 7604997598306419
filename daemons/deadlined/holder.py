"""Takes threads into reservations and out of them, with the journal always one step ahead. No rule, no cycle.

Every system call that changes a policy goes through here, so that three promises hold in one place: what to restore is
on disk before a policy changes; nobody is attached before the safe gap is over; what somebody else has changed since
is left alone.
"""

import contextlib
import errno
import logging

from deadlined import reservation, watchdog
from deadlined.held import Attached, Thread
from deadlined.journal import Journal, Row
from deadlined.metrics import Metrics
from edgehold.api.deadlined import ThreadState
from edgehold.clock import NS_PER_S, Clock
from edgehold.errors import BadStateError, EdgeholdError, FailedError
from edgehold.kernel import procfs, sched
from edgehold.kernel.procfs import GoneError
from edgehold.kernel.sampler import Sampler
from edgehold.kernel.sched import Policy, SchedAttr

log = logging.getLogger(__name__)

# How often a held thread whose budget does not change is asked whether it still is in our reservation.
_CHECK_NS = 2 * NS_PER_S
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
    """Attaches, changes and detaches single threads; owns the sampler's descriptors and the gaps."""

    def __init__(self, *, clock: Clock, journal: Journal, metrics: Metrics) -> None:
        self.sampler = Sampler()
        self._clock = clock
        self._journal = journal
        self._metrics = metrics
        self._gaps = journal.gaps(clock.monotonic_ns())
        self._behind = False
        """The journal refused a row's end; told once."""

    def recover(self) -> int:
        """Put right what a killed predecessor left behind. Returns how many threads got their policy back."""
        restored = 0
        for row in self._journal.held():
            until_ns = 0
            try:
                alive = procfs.stat(row.tid)
                if alive.start_ticks == row.start_ticks and not alive.ended:
                    gap_ns = self._recover_thread(row)
                    until_ns = self._clock.monotonic_ns() + (gap_ns or _gap_ns(row.period_ns, row.max_budget_ns))
                    restored += gap_ns is not None
            except GoneError:
                pass
            except OSError as error:
                log.error("can't restore thread %d: %s", row.tid, error)  # noqa: TRY400 - the text is the message
                continue  # the row stays for the next start
            key = (row.tid, row.start_ticks)
            self._forget_row(key, until_ns)
        if restored:
            log.warning(
                "restored %s that a deadlined which was killed had left in SCHED_DEADLINE; attachments are not kept "
                "over a restart: attach again what is to be held",
                threads_text(restored),
                extra={"message_id": _MESSAGE_RECOVERED},
            )
        return restored

    @staticmethod
    def _recover_thread(row: Row) -> int | None:
        """Take the row's living thread out of what was ours. Returns the gap in ns, or None: there was nothing of ours.

        A row may be of a thread whose policy was never changed (it is written before), of one that has left (it is
        erased after), or of one that somebody else has put into a reservation of his own since.
        """
        now = sched.get(row.tid)
        halfway = (now.runtime_ns, now.period_ns) == (sched.SMALLEST.runtime_ns, sched.SMALLEST.period_ns)
        if now.policy is not Policy.DEADLINE or not (now.period_ns == row.period_ns or halfway):
            return None
        left = reservation.leave(row.tid, row.original, period_ns=row.period_ns, max_budget_ns=row.max_budget_ns)
        return left.gap_ns

    def enter(self, thread: Thread, attached: Attached) -> EdgeholdError | None:
        """Try to take a thread into its reservation, with the budget that its rule wants.

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
        self._gaps.pop(thread.key, None)
        wanted = SchedAttr.deadline(runtime_ns=thread.rule.budget_ns, period_ns=attached.config.period_ns)
        try:
            self.check_alive(thread)
            thread.original = reservation.check_free(thread.tid)
            self._journal.hold([self._row(thread, attached, thread.original)])
            base = self.sampler.add(thread.tid)
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
        thread.check_at_ns = 0
        thread.base = base
        watchdog.begin(thread, base)
        return None

    @staticmethod
    def check_alive(thread: Thread) -> None:
        """Raises `GoneError` where the thread has ended, and its id may be another's."""
        facts = procfs.stat(thread.tid)
        if facts.ended or facts.start_ticks != thread.start_ticks:
            raise GoneError(f"thread {thread.tid} has ended")

    def check_ours(self, thread: Thread, attached: Attached) -> None:
        """Notice that somebody else changed the policy of a thread whose budget stays. Raises `GoneError`.

        Not in every cycle: a system call a thread, for what seldom happens.
        """
        now = self._clock.monotonic_ns()
        if now >= thread.check_at_ns:
            thread.check_at_ns = now + _CHECK_NS
            if not reservation.is_held(thread.tid, period_ns=attached.config.period_ns):
                self._taken(thread, attached)

    def change(self, thread: Thread, attached: Attached, budget_ns: int) -> None:
        """Set another budget. A refusal keeps the old one, which stays in force, and is told in the reason.

        Raises:
            GoneError: it ended.
        """
        period_ns = attached.config.period_ns
        if not reservation.is_held(thread.tid, period_ns=period_ns):
            self._taken(thread, attached)
            return
        try:
            self._metrics.setattr_calls.inc()
            reservation.enter(thread.tid, budget_ns=budget_ns, period_ns=period_ns)
        except OSError as error:
            self._metrics.refused(reservation.errno_name(error))
            wanted = SchedAttr.deadline(runtime_ns=budget_ns, period_ns=period_ns)
            why = sched.explain(error, thread.tid, wanted).message
            thread.reason = f"stays at {thread.budget_ns / 1e6:g} ms, asked for again in every cycle: {why}"
            return
        thread.budget_ns = budget_ns
        thread.reason = ""

    def leave(self, thread: Thread, attached: Attached, *, grow: bool = True) -> int:
        """Give a thread its own policy back, if it is held. Returns when it may be attached again (0: it is gone)."""
        until_ns = 0
        try:
            if thread.budget_ns and thread.original is not None:
                if not reservation.is_held(thread.tid, period_ns=attached.config.period_ns):
                    self._taken(thread, attached)
                    return self._gaps[thread.key]
                self._metrics.setattr_calls.inc()
                self.sampler.discard(thread.tid)  # frees the descriptor that leaving needs
                left = reservation.leave(
                    thread.tid,
                    thread.original,
                    period_ns=attached.config.period_ns,
                    max_budget_ns=attached.config.max_budget_ns,
                    grow=grow,
                )
                until_ns = self._clock.monotonic_ns() + left.gap_ns * (2 ** min(thread.stuck, 6))
                if left.fallback:
                    log.warning(
                        "thread %d is in SCHED_OTHER: the kernel refused its own policy (%s, %s)",
                        thread.tid, thread.original, errno.errorcode.get(left.refused_errno, "?"),
                    )  # fmt: skip
        except GoneError:
            pass
        except OSError as error:
            # Not even SCHED_OTHER: nothing more can be done here; the row stays for the next start.
            log.error("can't take thread %d out of its reservation: %s", thread.tid, error)  # noqa: TRY400
            self._unheld(thread)
            return 0
        self._left(thread, until_ns)
        return until_ns

    def revive(self, thread: Thread, attached: Attached) -> None:
        """Take out a thread that the kernel left throttled for ever; it is attached again when that is safe."""
        thread.stuck += 1
        log.warning(
            "thread %d (%s) was left throttled by the kernel; taken out, attached again later",
            thread.tid, thread.name, extra={"message_id": _MESSAGE_STUCK},
        )  # fmt: skip
        self._metrics.stuck.inc()
        until_ns = self.leave(thread, attached, grow=False)
        if thread.state is ThreadState.WAITING:
            return  # somebody else had taken it out meanwhile
        thread.state = ThreadState.STUCK
        thread.try_at_ns = until_ns
        thread.reason = "the kernel left it throttled; it runs under its own policy until it is safe to attach it again"

    def forget(self, thread: Thread) -> None:
        """The thread ended: its bandwidth went with it."""
        self._left(thread, 0)

    def prune(self) -> None:
        """Forget the gaps that are over."""
        now = self._clock.monotonic_ns()
        if any(until <= now for until in self._gaps.values()):
            # Not read anew: the journal may be behind.
            self._gaps = {key: until for key, until in self._gaps.items() if until > now}
            with contextlib.suppress(FailedError):  # they are over on disk as well, and are not read
                self._journal.prune(now)

    def _unheld(self, thread: Thread) -> None:
        self.sampler.discard(thread.tid)
        thread.budget_ns = 0
        thread.base = None

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

    def _taken(self, thread: Thread, attached: Attached) -> None:
        """Somebody else changed the policy: his will stands. When he did is unknown, so the gap begins now."""
        gap_ns = _gap_ns(attached.config.period_ns, attached.config.max_budget_ns)
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
        if isinstance(error, FailedError):  # the journal's: there is no row to forget
            self._unheld(thread)
            thread.reason = error.message
            return error
        self._left(thread, 0)
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
    def _row(thread: Thread, attached: Attached, original: SchedAttr) -> Row:
        return Row(
            tid=thread.tid,
            start_ticks=thread.start_ticks,
            original=original,
            period_ns=attached.config.period_ns,
            max_budget_ns=attached.config.max_budget_ns,
        )
