"""From what the rules want to what is in force: the host's capacity, the cgroups' limits, suspended guests.

Decreases come before increases, because what one thread gives up can be another's a moment later. Nothing here waits;
measuring the capacity is the service's work, told to it by `probe_wanted`.
"""

import errno
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deadlined.held import Attached, Thread
from deadlined.holder import Holder
from deadlined.share import Group, Member, share_groups
from edgehold.api.deadlined import ThreadState
from edgehold.clock import NS_PER_S, Clock
from edgehold.errors import EdgeholdError, NoCapacityError
from edgehold.kernel import capacity
from edgehold.kernel.limits import DL_MIN_RUNTIME_NS
from edgehold.kernel.native_held import FROZEN
from edgehold.kernel.procfs import GoneError

if TYPE_CHECKING:
    from deadlined.ceilings import Limit

log = logging.getLogger(__name__)

# Below this a change is not worth a system call.
_LEAST_CHANGE_NS = 1000
# What a leaving thread gives back comes within about its period; a probe before that would find too little.
_SETTLED_NS = 2 * NS_PER_S
# A probe takes all that others could want for a moment: while refusals go on, each comes after twice the time, to this.
_PROBE_SELDOM_NS = 120 * NS_PER_S
# So long without a refusal for want of capacity: the last probe has helped. More than any sensible cycle.
_CALM_NS = 15 * NS_PER_S
# While not everybody has what he wants: others on the host may have given something up.
_PROBE_AGAIN_NS = 30 * NS_PER_S
# Who does not fit at all asks again so seldom: each time everybody's share is worked out anew.
_TRY_AGAIN_NS = 2 * NS_PER_S
# A change refused for another reason than capacity (pinned, a full journal): nothing of ours will cure it.
_ASK_AGAIN_NS = 5 * NS_PER_S
_TELL_AGAIN_NS = 60 * NS_PER_S
_MESSAGE_FULL = "2f6d9f7a61a74ef2b7d1a4c85f3b9e03"


@dataclass(frozen=True, slots=True)
class Entry:
    """One thread that takes part."""

    thread: Thread
    attached: Attached

    @property
    def wanted_ns(self) -> int:
        """What it should have, as far as it alone is concerned."""
        return self.thread.config.min_budget_ns if self.attached.suspended else self.thread.wanted_ns


class _Part:
    """What one thread gets, while that is worked out."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.wanted = self.cpus = entry.wanted_ns / entry.thread.config.period_ns
        self.why = ""

    @property
    def budget_ns(self) -> int:
        period_ns = self.entry.thread.config.period_ns
        # A little up: a floor that is granted must not come out as a nanosecond less than itself.
        return self.entry.wanted_ns if self.cpus >= self.wanted else int(self.cpus * period_ns + 0.001)

    def member(self) -> Member:
        """As the division knows it."""
        thread = self.entry.thread
        return Member(
            wanted=self.cpus,
            floor=thread.config.min_budget_ns / thread.config.period_ns,
            least=DL_MIN_RUNTIME_NS / thread.config.period_ns,
            joins=thread.state is not ThreadState.HELD,
        )


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A change that was refused."""

    entry: Entry
    again_at_ns: int
    reason: str


def _compress(parts: "Sequence[_Part]", cpus: float, text: str) -> None:
    """Let them get no more than this together."""
    if sum(part.cpus for part in parts) <= cpus:
        return
    of: dict[int, list[_Part]] = {}
    for part in parts:
        of.setdefault(part.entry.attached.id, []).append(part)
    groups = [Group(some[0].entry.attached.policy.weight, [part.member() for part in some]) for some in of.values()]
    for some, granted in zip(of.values(), share_groups(groups, cpus), strict=True):
        for part, got in zip(some, granted, strict=True):
            if got < part.cpus:
                part.cpus, part.why = got, text


class Grants:
    """Sets budgets. Asks the monitor for everybody only when not everybody can have what he wants."""

    def __init__(self, *, clock: Clock, holder: Holder, everybody: Callable[[], Iterable[Entry]]) -> None:
        self._clock = clock
        self._holder = holder
        self._everybody = everybody
        self.wanted = 0.0
        """The sum of what takes part and is wanted, in CPUs."""
        self.total: float | None = None
        """What there is for deadlined's threads, in CPUs, as the last probe found it; None: not known yet."""
        self.limits: Sequence[Limit] = ()
        """The cgroups whose quota binds held threads."""
        self.probing = False
        """A probe holds the host's bandwidth: a refusal says nothing."""
        self.compressed = False
        self.lost: list[Entry] = []
        """Of the last `apply`: who turned out to be in nobody's reservation or in somebody else's."""
        self._probe_at_ns: int | None = None
        self._tell_at_ns = 0
        self._refused = False
        self._probe_wait_ns = _SETTLED_NS
        self._refused_at_ns = 0
        self._waits_for_probe = False
        """A refusal has asked for a probe since the last one."""
        self._again: dict[Thread, _Refusal] = {}
        """Whose last change was refused."""
        self._stale = False
        """What is wanted, or what there is, has changed since the last `apply`."""
        self._kept_to: Sequence[Limit] = ()
        """The limits as the last `apply` kept to them."""

    def count(self, entry: Entry) -> None:
        """What this thread wants has changed; threads that end or are given up count `without`."""
        thread = entry.thread
        takes_part = thread.state is ThreadState.HELD or thread.try_at_ns is not None
        wanted = entry.wanted_ns / thread.config.period_ns if takes_part else 0.0
        self._stale |= wanted != thread.counted
        self.wanted += wanted - thread.counted
        thread.counted = wanted

    def without(self, thread: Thread) -> None:
        """This thread takes part no more."""
        self._stale |= bool(thread.counted)
        self.wanted -= thread.counted
        thread.counted = 0.0
        self._again.pop(thread, None)

    def measured(self, total: float | None) -> None:
        """A probe's result: what is left and what deadlined's threads hold, together; None: it failed."""
        self._probe_at_ns = None
        self._waits_for_probe = False
        if total is not None:
            # Two steps of the probe for its rounding; one more so that the next probe finds something at all.
            self.total = max(total - 3 * capacity.RESOLUTION, 0.0)
            self._stale = True
        else:
            self._probe_at_ns = self._clock.monotonic_ns() + _PROBE_AGAIN_NS

    def probe_wanted(self) -> bool:
        """Whether the capacity should be measured now."""
        return self._probe_at_ns is not None and self._clock.monotonic_ns() >= self._probe_at_ns

    def probe_soon(self, after_ns: int = 0) -> None:
        """Measure the capacity, unless that is about to happen anyway."""
        at_ns = self._clock.monotonic_ns() + after_ns
        self._probe_at_ns = at_ns if self._probe_at_ns is None else min(self._probe_at_ns, at_ns)

    @property
    def crowded(self) -> bool:
        """Whether not everybody can have what he wants."""
        return self.total is not None and self.wanted > self.total

    @property
    def pending(self) -> bool:
        """Whether there is something to `apply` even if no thread's need has changed."""
        unshared = self._stale and (self.crowded or self.compressed)
        return unshared or bool(self._due()) or self.limits != self._kept_to

    def _due(self) -> list[Entry]:
        """Whose refused change is to be asked for again."""
        if not self._again:
            return []
        now = self._clock.monotonic_ns()
        return [one.entry for one in self._again.values() if one.again_at_ns <= now]

    def suspend(self, one: Attached) -> list[Entry]:
        """A guest was suspended or resumed: its rules stand still, its budgets go to the floor and come back."""
        entries = [Entry(thread, one) for thread in one.threads.values()]
        for entry in entries:
            if entry.thread.row >= 0:
                cells = entry.thread.cells
                cells.flags = cells.flags | FROZEN if one.suspended else cells.flags & ~FROZEN
            self.count(entry)
        return entries

    def apply(self, changed: Iterable[Entry]) -> dict[int, EdgeholdError]:
        """Set what has changed, or all anew where it is crowded. Returns why a waiting thread could not be taken in.

        A thread that ended in the middle is found by the next sample.
        """
        due = self._due()
        entries = {one.thread: one for one in (*due, *changed)}
        for entry in due:
            entry.thread.reason = ""  # told anew where it is refused anew
            del self._again[entry.thread]
        self._refused = self._stale = False
        self.lost = []
        if not (self.crowded or self.compressed or self.limits or self._kept_to):
            refused = self._set([(one, one.wanted_ns) for one in entries.values()])
        else:
            refused = self._set(self._shared())
        self._kept_to = self.limits
        if self._refused and not self.probing:
            self._probe_for_refusal()
        return refused

    def _probe_for_refusal(self) -> None:
        """Known capacity and yet refused: somebody else took some, or what was given up is still on its way."""
        now = self._clock.monotonic_ns()
        if now - self._refused_at_ns > _CALM_NS:
            self._probe_wait_ns = _SETTLED_NS
        self._refused_at_ns = now
        if not self._waits_for_probe:
            self._waits_for_probe = True
            first = self.total is None and self._probe_wait_ns == _SETTLED_NS
            self.probe_soon(0 if first else self._probe_wait_ns)
            self._probe_wait_ns = min(2 * self._probe_wait_ns, _PROBE_SELDOM_NS)

    def _shared(self) -> list[tuple[Entry, int]]:
        """What everybody gets: first within each limited cgroup, then within the host. Sets the reasons."""
        parts = [_Part(one) for one in self._everybody() if one.thread.state is not ThreadState.WATCHED]
        of = {part.entry.thread.tid: part for part in parts}
        for limit in sorted(self.limits, key=lambda one: -one.path.count("/")):
            members = [of[tid] for tid in limit.tids if tid in of]
            wanted = sum(part.cpus for part in members)
            text = (
                f"the quota of cgroup {limit.path} is {limit.cpus:g} CPUs and its held threads want {wanted:.2f}: "
                "deadlined keeps to it, as the kernel would not; raise it (CPUQuota=) to give them more"
            )
            _compress(members, limit.cpus, text)
        self._compress_all(parts)
        for part in parts:
            if part.entry.thread.state is ThreadState.HELD:
                part.entry.thread.reason = part.why
        return [(part.entry, part.budget_ns) for part in parts]

    def _compress_all(self, parts: "list[_Part]") -> None:
        """Within the host's capacity, as far as that is known."""
        whole = sum(part.cpus for part in parts)
        before, self.compressed = self.compressed, self.total is not None and whole > self.total
        if self.total is not None and self.compressed:
            text = (
                f"the host has {self.total:.2f} CPUs for reservations and {whole:.2f} are wanted: shared by weight "
                "(detach or limit others, lower their cap, or raise this one's weight)"
            )
            _compress(parts, self.total, text)
            self.probe_soon(_PROBE_AGAIN_NS)
        now = self._clock.monotonic_ns()
        if self.compressed and now >= self._tell_at_ns:
            log.warning(
                "%.3f CPUs of reservations are wanted and the host has %.3f: budgets are shared by weight",
                whole, self.total, extra={"message_id": _MESSAGE_FULL},
            )  # fmt: skip
        if self.compressed or before:
            self._tell_at_ns = now + _TELL_AGAIN_NS  # not each time that somebody's need rises and falls

    def _set(self, wanted: list[tuple[Entry, int]]) -> dict[int, EdgeholdError]:
        refused: dict[int, EdgeholdError] = {}
        now = self._clock.monotonic_ns()
        for entry, budget_ns in sorted(wanted, key=lambda one: one[1] >= one[0].thread.budget_ns):
            thread = entry.thread
            try:
                if thread.state is ThreadState.HELD:
                    # Not even the floor fits: it stays at the kernel's least until somebody gives something up.
                    self._change(entry, max(budget_ns, DL_MIN_RUNTIME_NS))
                elif thread.try_at_ns is not None and thread.try_at_ns <= now:
                    error = self._enter(entry, budget_ns)
                    if error is not None:
                        refused[thread.tid] = error
            except GoneError as error:
                refused[thread.tid] = error
        return refused

    def _change(self, entry: Entry, budget_ns: int) -> None:
        thread = entry.thread
        now = self._clock.monotonic_ns()
        before = self._again.pop(thread, None)
        if before is not None and thread.reason == before.reason:
            thread.reason = ""
        if abs(budget_ns - thread.budget_ns) < _LEAST_CHANGE_NS:
            return
        if before is not None and before.again_at_ns > now:
            self._again[thread] = before  # what it is refused for does not go by how much it wants
            thread.reason = before.reason
            return
        reason = thread.reason
        if self._holder.change(thread, budget_ns):
            thread.reason = reason
        elif thread.state is ThreadState.HELD:
            full = self._holder.refused_errno == errno.EBUSY
            self._refused |= full
            self._again[thread] = _Refusal(entry, now if full else now + _ASK_AGAIN_NS, thread.reason)
        else:
            self.without(thread)
            self.lost.append(entry)

    def _enter(self, entry: Entry, budget_ns: int) -> EdgeholdError | None:
        thread = entry.thread
        if budget_ns < min(thread.config.min_budget_ns, entry.wanted_ns):
            thread.try_at_ns = self._clock.monotonic_ns() + _TRY_AGAIN_NS
            thread.reason = "not even its smallest budget fits beside the others; it waits until one of them leaves"
            return NoCapacityError(thread.reason)
        error = self._holder.enter(thread, entry.attached, budget_ns)
        if isinstance(error, NoCapacityError):
            self._refused = True
        return error
