"""deadlined as a whole: opens the journal, puts right what was left behind, runs the cycle, carries out requests.

Everything that changes a policy runs on the event loop's thread and without a wait in the middle, so that requests and
cycles never mix. Only two things wait: asking vmand, and the probe of the capacity in a child process.
"""

import asyncio
import contextlib
import logging
import os
import resource
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from deadlined import api
from deadlined.config import Settings
from deadlined.held import Attached, rule_config
from deadlined.holder import Holder, no_descriptor
from deadlined.journal import Journal
from deadlined.metrics import Metrics
from deadlined.monitor import Monitor
from deadlined.partitions import VmandLink
from deadlined.targets import Source, open_local
from edgehold.api.deadlined import Attachment, AttachmentDetail, AttachRequest, Capacity, Target, TargetKind
from edgehold.clock import NS_PER_MS, NS_PER_S
from edgehold.errors import BadRequestError, BadStateError, NoCapacityError, NotFoundError, UnavailableError
from edgehold.kernel import capacity, procfs, sched
from edgehold.kernel.capacity import Found
from edgehold.kernel.sched import Flag, Policy, SchedAttr
from edgehold.service import Runtime
from edgehold.systemd.activation import listen_sockets
from edgehold.wire.http import application, serve
from edgehold.wire.peer import Roles, socket_mode

log = logging.getLogger(__name__)

# Descriptors for everything that is not a held thread: sockets, the journal, a child.
_SPARE_DESCRIPTORS = 256
# A younger result of the capacity probe is as good as a new one.
_PROBE_KEPT_NS = NS_PER_S


def become_real_time() -> str:
    """Put this process above ordinary load, so that a busy host does not blur the samples. Returns what it is now.

    The lowest real-time priority is enough; children (the capacity probe) begin as ordinary processes.
    """
    try:
        sched.set_attr(0, SchedAttr(policy=Policy.FIFO, priority=1, flags=Flag.RESET_ON_FORK))
    except OSError as error:
        why = "it lacks CAP_SYS_NICE, or its cgroup has no real-time share" if error.errno == 1 else str(error)
        return f"{sched.get()}: SCHED_FIFO was refused ({why}); samples are less exact on a busy host"
    return str(sched.get())


def descriptor_room(wanted_threads: int) -> int:
    """Raise the soft limit of descriptors as far as needed. Returns how many threads there is room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted_threads + _SPARE_DESCRIPTORS
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
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
        # A probe holds the host's bandwidth for some milliseconds; an attach in that moment would be refused for it.
        self._probing = asyncio.Lock()
        self._probed: Found | None = None
        self._probed_at_ns = 0
        self._closing = False
        self.metrics = Metrics()
        self.policy = become_real_time()
        self.journal = Journal(Path(settings.state_dir), boot_id=procfs.boot_id())
        self.holder = Holder(clock=runtime.clock, journal=self.journal, metrics=self.metrics)
        self.monitor = Monitor(
            clock=runtime.clock,
            holder=self.holder,
            metrics=self.metrics,
            cycle_ns=settings.cycle_ms * NS_PER_MS,
            history=settings.history,
            max_threads=descriptor_room(settings.max_threads),
        )
        self.vmand = VmandLink(Path(settings.vmand_socket))
        self._last_cycle_ns = runtime.clock.monotonic_ns()

    async def attach(self, request: AttachRequest) -> Attachment:
        """Hold a target from now on; see `DeadlinedClient.attach` for what it raises."""
        config = rule_config(request.policy)
        if problem := config.problem():
            raise BadRequestError(f"policy: {problem}")
        self._check_new(request.target)
        source = await self._open(request.target)
        try:
            async with self._probing:
                self._check_new(request.target)  # the waits above let others in
                with _descriptors():
                    one, refused = self.monitor.adopt(self.journal.number(), request.target, request.policy, source)
        except BaseException:
            source.close()
            raise
        held_or_waiting = [tid for tid in one.threads if tid not in refused]
        if refused and not held_or_waiting:
            self.monitor.release(one)
            raise next(iter(refused.values()))
        log.info("attached %s %d", one.target.kind.value, one.target.id, extra={"attachment": one.id})
        return one.message()

    def detach(self, number: int) -> None:
        """Give every thread its own policy back. Raises `NotFoundError`."""
        one = self._one(number)
        self.monitor.release(one)
        log.info("detached %s %d", one.target.kind.value, one.target.id, extra={"attachment": number})

    def attachments(self) -> list[Attachment]:
        """All of them, by id."""
        return [one.message() for _, one in sorted(self.monitor.attachments.items())]

    def detail(self, number: int, last: int | None = None) -> AttachmentDetail:
        """One with its history, all or the last samples of it. Raises `NotFoundError`."""
        one = self._one(number)
        return AttachmentDetail(attachment=one.message(), history=one.history(last))

    async def capacity(self) -> Capacity:
        """Probe what is left, in a child process. Raises `EdgeholdError`."""
        found = await self._probe()
        held = sum(
            thread.budget_ns / one.config.period_ns
            for one in self.monitor.attachments.values()
            for thread in one.threads.values()
        )
        return Capacity(
            cpus=found.cpus,
            available=found.available,
            held=held,
            resolution=found.resolution,
            monitor_policy=self.policy,
        )

    async def _probe(self) -> Found:
        """One probe a second at most, for all who wait: it takes what everybody on the host could want."""
        async with self._probing:
            now = self._runtime.clock.monotonic_ns()
            if self._probed is None or now - self._probed_at_ns >= _PROBE_KEPT_NS:
                with _descriptors():
                    self._probed = await capacity.probe_in_child()
                self._probed_at_ns = self._runtime.clock.monotonic_ns()
            return self._probed

    def health(self) -> None:
        """Raises `UnavailableError` when the cycle does not turn."""
        late = self._runtime.clock.monotonic_ns() - self._last_cycle_ns
        if late > max(10 * self._settings.cycle_ms * NS_PER_MS, 5 * NS_PER_S):
            raise UnavailableError(f"the last monitoring cycle was {late / NS_PER_S:.0f} s ago")

    async def cycles(self) -> None:
        """For ever: a cycle at each multiple of T since the start; a late one leaves out what it missed."""
        period = self._settings.cycle_ms * NS_PER_MS
        clock = self._runtime.clock
        due = clock.monotonic_ns() + period
        while True:
            await asyncio.sleep(max(due - clock.monotonic_ns(), 0) / NS_PER_S)
            begin = clock.monotonic_ns()
            self.monitor.cycle()
            self._last_cycle_ns = clock.monotonic_ns()
            self.metrics.busy.inc((self._last_cycle_ns - begin) / NS_PER_S)
            due += period
            if (missed := (self._last_cycle_ns - due) // period + 1) > 0:
                self.metrics.overruns.inc(missed)
                due += missed * period

    def close(self) -> None:
        """Restore everything; nothing is attached any more after that."""
        if self._closing:
            return
        self._closing = True
        with contextlib.ExitStack() as whatever_fails:
            whatever_fails.callback(self.journal.close)
            whatever_fails.callback(self.holder.sampler.close)
            for one in self.monitor.attachments.values():
                whatever_fails.callback(self.monitor.release, one)

    def _one(self, number: int) -> Attached:
        one = self.monitor.attachments.get(number)
        if one is None:
            raise NotFoundError(f"no attachment {number}; it was detached, or its target ended")
        return one

    def _check_new(self, target: Target) -> None:
        if self._closing:
            raise UnavailableError("deadlined is stopping")
        if len(self.monitor.attachments) >= self._settings.max_attachments:
            raise NoCapacityError(
                f"{self._settings.max_attachments} targets are attached (max_attachments); detach one"
            )
        same = [one.id for one in self.monitor.attachments.values() if one.target == target]
        if same:
            raise BadStateError(f"{target.kind.value} {target.id} is attached already, as attachment {same[0]}")
        if target.kind is TargetKind.THREAD and (owner := self.monitor.owner(target.id)) is not None:
            raise BadStateError(
                f"thread {target.id} is held already: attachment {owner.id} has the {owner.target.kind.value} "
                f"{owner.target.id}"
            )

    async def _open(self, target: Target) -> Source:
        if target.kind is TargetKind.PARTITION:
            return await self.vmand.open(target.id)
        with _descriptors():
            return open_local(target)


@contextlib.contextmanager
def _descriptors() -> Iterator[None]:
    """Answer `FailedError` where no file descriptor is left."""
    try:
        yield
    except OSError as error:
        if procfs.is_exhausted(error):
            raise no_descriptor() from error
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
        service.holder.recover()
        app = application(api.routes(service), roles=roles, registry=service.metrics.registry, health=service.health)
        passed = next((sockets[0] for sockets in listen_sockets().values() if sockets), None)
        async with serve(app, passed or _socket_path(settings), mode=socket_mode(roles)):
            runtime.spawn(service.cycles(), name="cycles")
            runtime.spawn(service.vmand.run(), name="vmand")
            log.info("monitoring every %d ms as %s (pid %d)", settings.cycle_ms, service.policy, os.getpid())
            yield
            await runtime.cancel_tasks()
    finally:
        service.close()


def _socket_path(settings: Settings) -> Path:
    path = Path(settings.socket)
    with contextlib.suppress(OSError):  # what is wrong with the directory, listening tells better
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    return path
