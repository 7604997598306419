"""deadlined as a whole: opens the journal, puts right what was left behind, runs the cycle, carries out requests.

Everything that changes a policy runs on the event loop's thread and without a wait in the middle, so that requests and
cycles never mix. What waits is asking others (vmand, libvirt, systemd) and the capacity's probe in a child process.
"""

import asyncio
import contextlib
import logging
import os
import resource
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from deadlined import api, leftovers, shortage
from deadlined.cgroups import open_cgroup
from deadlined.config import Settings, policy_of, policy_problem
from deadlined.deny import Deny
from deadlined.domains import LibvirtLink
from deadlined.engine import Engine
from deadlined.held import Attached
from deadlined.keep import Keep, Kept
from deadlined.partitions import VmandLink
from deadlined.standing import PendingSource, open_in_time
from deadlined.targets import Source, open_local
from deadlined.trees import open_tree
from deadlined.units import Units, full_name
from edgehold.api.deadlined import (
    DURABLE,
    Attachment,
    AttachmentDetail,
    AttachRequest,
    Capacity,
    Policy,
    Target,
    TargetKind,
)
from edgehold.clock import NS_PER_MS, NS_PER_S
from edgehold.errors import (
    BadRequestError,
    BadStateError,
    EdgeholdError,
    FailedError,
    NoCapacityError,
    NotFoundError,
    UnavailableError,
)
from edgehold.service import Runtime
from edgehold.systemd.activation import listen_sockets
from edgehold.wire.http import MAX_CONNECTIONS, application, serve
from edgehold.wire.peer import Roles, socket_mode

log = logging.getLogger(__name__)

# In one answer: more would keep the cycle waiting.
_MOST_SAMPLES = 10_000
# Descriptors for everything that is not a held thread: the API's connections, and sockets, the journal, a child.
_SPARE_DESCRIPTORS = MAX_CONNECTIONS + 256


def descriptor_room(wanted_threads: int) -> int:
    """Raise the soft limit of descriptors to the hard one. Returns how many threads there is room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:  # the kernel's own is fs.nr_open, which soft can't pass
        hard = max(soft, wanted_threads + _SPARE_DESCRIPTORS)
    if soft < hard:
        soft = hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    room = max(min(wanted_threads, soft - _SPARE_DESCRIPTORS), 1)
    if room < wanted_threads:
        log.warning("room for %d threads only: RLIMIT_NOFILE is %d (LimitNOFILE=)", room, hard)
    return room


class Service:
    """What the API calls."""

    def __init__(self, runtime: Runtime, settings: Settings) -> None:
        self._runtime = runtime
        self._settings = settings
        self._opening: dict[int, asyncio.Task[None]] = {}
        self._closing = False
        self.engine = Engine(
            runtime.clock,
            Path(settings.state_dir),
            cycle_ms=settings.cycle_ms,
            fast_cycle_ms=settings.fast_cycle_ms,
            history=settings.history,
            max_threads=descriptor_room(settings.max_threads),
            deny=Deny(settings.deny),
        )
        self.monitor = self.engine.monitor
        self.monitor.on_over = self._over
        self.metrics = self.engine.metrics
        self.metrics.tell(self.monitor.attachments.values, lambda: self.monitor.grants.total)
        self.keep = Keep(Path(settings.state_dir) / "attachments.json")
        self.vmand = VmandLink(Path(settings.vmand_socket))
        self.libvirt = LibvirtLink(self.vmand, vmand_socket=Path(settings.vmand_socket))
        self.units = Units(self.engine.births)

    def recover(self) -> None:
        """Put right what a killed predecessor, or a killed `deadlined run`, left behind. Raises `EdgeholdError`."""
        leftovers.adopt(self.engine.journal, self._runtime.clock)
        self.engine.recover()

    def begin(self) -> None:
        """Attach what is to be attached at every start; it waits where its target is not there."""
        self.engine.begin()
        configured = [(one.target, policy_of(one.policy, self._settings.policy)) for one in self._settings.attach]
        targets = [_in_full(target) for target, _ in configured]
        for one in self.keep.all():
            if _in_full(one.target) not in targets:
                self._stand(one.id, one.target, one.policy)
        for target, policy in configured:
            self._stand(self._number(), target, policy)

    async def attach(self, request: AttachRequest) -> Attachment:
        """Hold a target from now on; see `DeadlinedClient.attach` for what it raises."""
        target, policy = _in_full(request.target), api.policy(request.policy, self._settings.policy)
        self._check_policy(target, policy)
        self._check_new(target)
        source = await self._open(target)
        try:
            async with self.engine.probing:
                self._check_new(target)  # the waits above let others in
                number = self._number()
                with _descriptors():
                    one, refused = self.monitor.adopt(number, target, policy, source)
        except BaseException:
            source.close()
            raise
        self.engine.soon()
        held_or_waiting = [tid for tid in one.threads if tid not in refused]
        if refused and not held_or_waiting and not all(isinstance(why, NoCapacityError) for why in refused.values()):
            self.monitor.release(one)
            raise next(iter(refused.values()))
        if target.kind in DURABLE:
            try:
                self.keep.put(Kept(id=one.id, target=target, policy=policy))
            except EdgeholdError:
                self.monitor.release(one)
                raise
        log.info("attached %s", one.target, extra={"attachment": one.id})
        return self.monitor.message(one)

    def change(self, number: int, given: dict[str, Any]) -> Attachment:
        """Size an attachment's budgets by another policy from now on.

        Raises:
            NotFoundError: no such attachment.
            BadRequestError: the policy can't be, or not without attaching anew.
        """
        one = self._one(number)
        policy = api.policy(given, one.policy)
        self._check_policy(one.target, policy)
        for name in ("actuator", "dry_run"):
            if getattr(policy, name) != getattr(one.policy, name):
                raise BadRequestError(f"policy: {name} can't be changed in place; detach {number} and attach it anew")
        if one.target.kind in DURABLE and any(kept.id == number for kept in self.keep.all()):
            self.keep.put(Kept(id=number, target=one.target, policy=policy))
        self.monitor.change(one, policy)
        log.info("changed the policy of %s", one.target, extra={"attachment": number})
        return self.monitor.message(one)

    def detach(self, number: int) -> None:
        """Give every thread its own policy back. Raises `NotFoundError`, `FailedError`: it would be back."""
        one = self._one(number)
        self.keep.drop(number)
        self._stop_opening(number)
        self.monitor.release(one)
        log.info("detached %s", one.target, extra={"attachment": number})

    def attachments(self) -> list[Attachment]:
        """All of them, by id."""
        return [self.monitor.message(one) for _, one in sorted(self.monitor.attachments.items())]

    def detail(self, number: int, last: int | None = None) -> AttachmentDetail:
        """One with its history, all or the last samples of it. Raises `NotFoundError`."""
        one = self._one(number)
        history = self.monitor.history(one, _MOST_SAMPLES if last is None else min(last, _MOST_SAMPLES))
        return AttachmentDetail(attachment=self.monitor.message(one), history=history)

    async def capacity(self) -> Capacity:
        """Probe what is left, in a child process. Raises `EdgeholdError`."""
        found = await self.engine.probe()
        return Capacity(
            cpus=found.cpus,
            available=found.available,
            held=self.monitor.held_cpus(),
            wanted=self.monitor.grants.wanted,
            resolution=found.resolution,
            monitor_policy=str(self.engine.guard),
            sampler=str(self.engine.tasks),
        )

    def health(self) -> None:
        """Raises `UnavailableError` when the cycle does not turn."""
        late = self._runtime.clock.monotonic_ns() - self.engine.last_cycle_ns
        if late > max(10 * self._settings.cycle_ms * NS_PER_MS, 5 * NS_PER_S):
            raise UnavailableError(f"the last monitoring cycle was {late / NS_PER_S:.0f} s ago")

    def close(self) -> None:
        """Restore everything; nothing is attached any more after that."""
        if self._closing:
            return
        self._closing = True
        with contextlib.ExitStack() as whatever_fails:
            whatever_fails.callback(self.engine.close)
            for number in list(self._opening):
                whatever_fails.callback(self._stop_opening, number)

    def _number(self) -> int:
        """A new number; above all that are kept, whatever the journal remembers."""
        number = self.engine.journal.number()
        while number <= max((one.id for one in self.keep.all()), default=0):
            number = self.engine.journal.number()
        return number

    def _one(self, number: int) -> Attached:
        one = self.monitor.attachments.get(number)
        if one is None:
            raise NotFoundError(f"no attachment {number}; it was detached, or its target ended")
        return one

    def _over(self, one: Attached) -> None:
        """An attachment ended by itself."""
        try:
            self.keep.drop(one.id)
        except EdgeholdError as error:
            log.error("attachment %d is over and will be looked for after a restart: %s", one.id, error)  # noqa: TRY400

    def _stand(self, number: int, target: Target, policy: Policy) -> None:
        """Attach a target as soon as it can be opened."""
        target = _in_full(target)
        one, _ = self.monitor.adopt(number, target, policy, PendingSource(target))
        work = open_in_time(one, lambda: self._open(target, must_exist=False), self._follow)
        self._opening[number] = asyncio.create_task(work, name=f"attachment {number}")

    def _follow(self, one: Attached, source: Source) -> None:
        try:
            with _descriptors():
                self.monitor.follow(one, source)
        except EdgeholdError as error:
            log.error("attachment %d, %s: %s", one.id, one.target, error)  # noqa: TRY400
            one.trouble = error.message
        self.engine.soon()

    def _stop_opening(self, number: int) -> None:
        task = self._opening.pop(number, None)
        if task is not None:
            task.cancel()

    @staticmethod
    def _check_policy(target: Target, policy: Policy) -> None:
        if problem := policy_problem(target, policy):
            raise BadRequestError(f"policy: {problem}")

    def _check_new(self, target: Target) -> None:
        if self._closing:
            raise UnavailableError("deadlined is stopping")
        if len(self.monitor.attachments) >= self._settings.max_attachments:
            raise NoCapacityError(
                f"{self._settings.max_attachments} targets are attached (max_attachments); detach one"
            )
        if (same := self.monitor.of_target(target)) is not None:
            raise BadStateError(f"{target} is attached already, as attachment {same.id}")
        if target.kind is TargetKind.THREAD and (owner := self.monitor.owner(target.id)) is not None:
            raise BadStateError(f"thread {target.id} is held already: attachment {owner.id} has the {owner.target}")

    async def _open(self, target: Target, *, must_exist: bool = True) -> Source:
        with _descriptors():
            match target.kind:
                case TargetKind.PARTITION:
                    return await self.vmand.open(target.id)
                case TargetKind.DOMAIN:
                    return await self.libvirt.open(target.name, target.uri)
                case TargetKind.UNIT:
                    return await self.units.open(target.name, must_exist=must_exist)
                case TargetKind.CGROUP:
                    return open_cgroup(target.name, births=self.engine.births, must_exist=must_exist)
                case TargetKind.TREE:
                    return open_tree(target.id, births=self.engine.births)
                case _:
                    return open_local(target)


def _in_full(target: Target) -> Target:
    """A unit by its whole name, so that ``nginx`` and ``nginx.service`` are one target; who opens it refuses others."""
    if target.kind is TargetKind.UNIT:
        with contextlib.suppress(EdgeholdError):
            return Target(kind=target.kind, name=full_name(target.name))
    return target


@contextlib.contextmanager
def _descriptors() -> Iterator[None]:
    """Answer `FailedError` where no file descriptor or no memory is left."""
    try:
        yield
    except OSError as error:
        if shortage.is_short(error):
            raise FailedError(shortage.text(error), retryable=True) from error
        raise


@contextlib.asynccontextmanager
async def lifespan(runtime: Runtime, settings: Settings) -> AsyncIterator[None]:
    """The daemon's life: restore what was left, then serve; at the end stop serving, then restore everything.

    Raises:
        EdgeholdError: it can't start.
    """
    roles = Roles.from_groups(read=settings.access.read, operate=settings.access.operate)
    service = Service(runtime, settings)
    try:
        service.recover()
        app = application(api.routes(service), roles=roles, registry=service.metrics.registry, health=service.health)
        passed = next((sockets[0] for sockets in listen_sockets().values() if sockets), None)
        async with serve(app, passed or _socket_path(settings), mode=socket_mode(roles)):
            runtime.spawn(service.engine.cycles(), name="cycles")
            runtime.spawn(service.engine.measure(), name="capacity")
            runtime.spawn(service.vmand.run(), name="vmand")
            runtime.spawn(service.libvirt.run(), name="libvirt")
            runtime.spawn(service.units.run(), name="units")
            service.begin()
            log.info("monitoring every %d ms as %s (pid %d)", settings.cycle_ms, service.engine.guard, os.getpid())
            yield
            await runtime.cancel_tasks()
    finally:
        service.close()


def _socket_path(settings: Settings) -> Path:
    path = Path(settings.socket)
    with contextlib.suppress(OSError):  # what is wrong with the directory, listening tells better
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    return path
