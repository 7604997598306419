"""Attachments whose actuator is a cgroup's own quota: the same rules, for all threads of the group together.

A group is sized once a cycle. It may want the cap on each of the host's CPUs. Its cgroup may go and come back (a unit
is restarted): the source knows where it is, the quota is set anew there, and what was learned stays.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

from deadlined import quota
from deadlined.cgroups import CgroupSource
from deadlined.deny import Deny
from deadlined.held import Attached
from deadlined.journal import Journal
from deadlined.quota import Group, GroupSample
from deadlined.rules import Sizer, rule_config
from edgehold.api.deadlined import GroupStatus, Policy
from edgehold.clock import Clock
from edgehold.errors import BadStateError, DeniedError, EdgeholdError, FailedError
from edgehold.kernel import procfs
from edgehold.kernel.native_held import HeldTable, RawSample
from edgehold.kernel.procfs import GoneError

log = logging.getLogger(__name__)

# The kernel takes whole microseconds.
_LEAST_CHANGE_NS = 1000


@dataclass(slots=True, eq=False)
class _Held:
    one: Attached
    source: CgroupSource
    sizer: Sizer
    group: Group | None = None
    before: GroupSample | None = None
    reason: str = ""
    executed_ns: int = 0
    throttled_ns: int = 0
    left_alone: bool = False
    """Somebody else has set the quota since."""


class Groups:
    """Owns the groups and what is set for them."""

    def __init__(
        self, *, clock: Clock, journal: Journal, table: HeldTable, cycle_ns: int, deny: Deny | None = None
    ) -> None:
        self._clock = clock
        self._journal = journal
        self._table = table
        self._cycle_ns = cycle_ns
        self._deny = deny
        self._held: dict[int, _Held] = {}

    def attach(self, one: Attached, source: CgroupSource) -> None:
        """Hold a group from now on; one that has no cgroup yet is held when it has.

        Raises:
            EdgeholdError: it can't be held; the text says why. Nothing was changed; tried again in every cycle until it
                is released.
        """
        held = self._held[one.id] = _Held(one, source, Sizer(rule_config(one.policy, cpus=_cpus())))
        if source.here:
            self._open(held)

    def release(self, number: int) -> None:
        """Give a group its own limit back, where it is one of ours."""
        held = self._held.pop(number, None)
        if held is not None:
            self._close(held, restore=True)

    def change(self, number: int, policy: Policy) -> None:
        """Another policy from now on."""
        held = self._held.get(number)
        if held is None:
            return
        held.sizer.change(rule_config(policy, cpus=_cpus()))
        if held.group is not None and policy.first_period_ns != held.group.row.period_ns:
            self._close(held, restore=True)  # opened with the new period in the next cycle

    def status(self, number: int) -> GroupStatus | None:
        """As the API tells it."""
        held = self._held.get(number)
        if held is None:
            return None
        return GroupStatus(
            path=held.source.path,
            budget_ns=held.group.budget_ns if held.group is not None else 0,
            wanted_ns=held.sizer.budget_ns,
            period_ns=held.sizer.config.period_ns,
            executed_ns=held.executed_ns,
            throttled_ns=held.throttled_ns,
            saturated=held.sizer.saturated,
            reason=held.reason or held.source.reason,
        )

    def __contains__(self, path: object) -> bool:
        return path in set(self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[str]:
        """The paths of the cgroups that deadlined limits itself."""
        return (held.group.path for held in self._held.values() if held.group is not None)

    def cycle(self) -> None:
        """Sample each group, let its rule decide, set what it wants."""
        for held in self._held.values():
            try:
                self._step(held)
            except GoneError:
                self._close(held, restore=False)
                held.reason = ""  # the source's says it
            except (EdgeholdError, OSError) as error:
                if isinstance(error, OSError) and not procfs.is_exhausted(error):
                    raise
                held.reason = str(error)

    def recover(self) -> int:
        """Put right what a killed predecessor left limited. Returns how many groups got their limit back."""
        restored = 0
        for row in self._journal.quotas():
            try:
                restored += quota.restore(row)
            except OSError as error:
                log.error("can't restore %s of %s: %s", row.file, row.directory, error)  # noqa: TRY400
                continue  # the row stays for the next start
            with contextlib.suppress(FailedError):
                self._journal.unlimit(row)
        return restored

    def _open(self, held: _Held) -> None:
        policy = held.one.policy
        if self._deny is not None and (why := self._deny.why_group(held.source.path)):
            raise DeniedError(why)
        group = quota.open_group(
            held.source.path, actuator=policy.actuator, period_ns=policy.first_period_ns, clock=self._clock
        )
        if (other := self._of_same(group)) is not None:
            group.close()
            raise BadStateError(
                f"cgroup {group.path} is limited already: attachment {other.id} has it as {other.target}; detach that"
            )
        held.group = group
        try:
            held.before = held.group.sample()
            self._set(held)
        except BaseException:
            self._close(held, restore=True)
            raise

    def _of_same(self, group: Group) -> Attached | None:
        """Who has this cgroup, by whatever name: a second one would take the first one's limit for the group's own."""
        this = group.row.device, group.row.inode
        for held in self._held.values():
            if held.group is not None and (held.group.row.device, held.group.row.inode) == this:
                return held.one
        return None

    def _set(self, held: _Held) -> None:
        group = held.group
        if group is None or held.one.policy.dry_run or held.left_alone:
            return
        wanted_ns = max(held.sizer.budget_ns, quota.QUOTA_MIN_NS)
        # Asked in every cycle: else nobody would notice what others have written while the need stays the same.
        if not group.taken() and group.budget_ns and abs(wanted_ns - group.budget_ns) < _LEAST_CHANGE_NS:
            return
        if not group.taken():
            self._journal.limit(group.plan(held.sizer.budget_ns))
        try:
            group.set(held.sizer.budget_ns)
        except EdgeholdError as error:
            held.left_alone = error.code == "bad-state"
            raise

    def _step(self, held: _Held) -> None:
        if held.group is None:
            if held.source.here and not held.left_alone:
                self._open(held)
                held.reason = ""
            return
        now = held.group.sample()
        before, period_ns = held.before or now, held.sizer.config.period_ns
        elapsed_ns = now.time_ns - before.time_ns
        if elapsed_ns < max(period_ns, self._cycle_ns // 2):
            return
        held.before = now
        budget_ns = held.group.budget_ns
        executed_ns = now.executed_ns - before.executed_ns
        throttled_ns = now.throttled_ns - before.throttled_ns
        saturated = bool(quota.is_saturated(before, now, budget_ns=budget_ns, period_ns=period_ns))
        held.sizer.step(
            elapsed_ns=elapsed_ns,
            executed_ns=executed_ns,
            run_delay_ns=throttled_ns,
            budget_ns=budget_ns,
            saturated=saturated,
        )
        held.executed_ns = executed_ns * period_ns // elapsed_ns
        held.throttled_ns = throttled_ns * period_ns // elapsed_ns
        self._table.remember(
            RawSample(
                time_ns=now.time_ns,
                elapsed_ns=elapsed_ns,
                executed_ns=executed_ns,
                run_delay_ns=throttled_ns,
                budget_ns=budget_ns,
                wanted_ns=held.sizer.budget_ns,
                period_ns=period_ns,
                multiplier=held.sizer.multiplier,
                tid=0,
                owner=held.one.id,
                saturated=int(saturated),
                reserved=0,
            )
        )
        self._set(held)
        if not held.left_alone:
            held.reason = ""

    def _close(self, held: _Held, *, restore: bool) -> None:
        group, held.group, held.before = held.group, None, None
        if group is None:
            return
        try:
            if restore:
                group.restore()
        except (EdgeholdError, OSError) as error:
            # The row stays: the next start tries again.
            log.error("can't give cgroup %s its own limit back: %s", group.path, error)  # noqa: TRY400
        else:
            with contextlib.suppress(FailedError):
                self._journal.unlimit(group.row)
        finally:
            group.close()


def _cpus() -> int:
    return os.cpu_count() or 1
