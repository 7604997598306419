"""What leaves a reservation of ours after the fact: because its daemon was killed, because leaving failed, because its
thread goes on as another one.

Only the journal's row tells what to restore then. Nothing is taken out that somebody else has put in meanwhile.
"""

from dataclasses import dataclass

from deadlined import reservation
from deadlined.held import Thread
from deadlined.journal import Row
from deadlined.reservation import Left
from edgehold.kernel import procfs, sched
from edgehold.kernel.procfs import GoneError
from edgehold.kernel.sched import Policy


@dataclass(frozen=True, slots=True)
class Late:
    """A thread that is still to leave."""

    row: Row
    grow: bool = True
    """See `reservation.leave`."""
    factor: int = 1
    """By which its safe gap is longer."""

    @property
    def key(self) -> tuple[int, int]:
        """As `Thread.key`."""
        return self.row.tid, self.row.start_ticks


def take_out(late: Late, *, anyway: bool = False) -> Left | None:
    """Take the row's thread out of what was ours. Returns how, or None: there was nothing of ours.

    A row may be of a thread whose policy was never changed (it is written before), of one that has left (it is erased
    after), or of one that somebody else has put into a reservation of his own since.

    Raises:
        GoneError: it ended.
        OSError: it is in our reservation still.
    """
    row = late.row
    alive = procfs.stat(row.tid)
    if alive.ended or alive.start_ticks != row.start_ticks:
        raise GoneError(f"thread {row.tid} has ended")
    now = sched.get(row.tid)
    halfway = (now.runtime_ns, now.period_ns) == (sched.SMALLEST.runtime_ns, sched.SMALLEST.period_ns)
    if now.policy is not Policy.DEADLINE or not (now.period_ns in {row.period_ns, row.also_period_ns} or halfway):
        return None
    return reservation.leave(
        row.tid,
        row.original,
        period_ns=row.period_ns,
        max_budget_ns=row.max_budget_ns,
        grow=late.grow,
        anyway=anyway,
    )


def heir(thread: Thread) -> Row | None:
    """Who has the reservation of a held thread that is gone: execve(2) makes the thread that calls it the process'
    first one, with that one's id and start and with its own policy.

    None: nobody, or it can't be known. Whoever asks must know by himself whether the heir is held.
    """
    if thread.process in {0, thread.tid} or thread.original is None:
        return None
    try:
        now = sched.get(thread.process)
        mine = now.policy is Policy.DEADLINE and thread.budget_ns > 0
        if not mine or (now.runtime_ns, now.period_ns) != (thread.budget_ns, thread.config.period_ns):
            return None
        first = procfs.stat(thread.process)
    except (GoneError, OSError):
        return None
    return Row(
        tid=thread.process,
        start_ticks=first.start_ticks,
        original=thread.original,
        period_ns=thread.config.period_ns,
        max_budget_ns=thread.config.max_budget_ns,
    )
