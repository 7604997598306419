"""Guests: started, stopped, asked to power off, suspended.

libvirt's shutdown and reboot are answered when the guest was asked, not when it is off: vmand goes on asking it.

A domain is started with what its definition says at that moment; the share of the host that its partition holds is made
to fit first, so that a definition that was changed while the guest ran counts now.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from edgehold.api.vmand import State
from edgehold.errors import BadRequestError, EdgeholdError, NoCapacityError, NotFoundError, UnsupportedError
from virtvmand.call import Client
from virtvmand.domain import LIVE, PAUSED, RUNNING, Domain
from virtvmand.domxml import Definition, Plan
from virtvmand.driver.context import Context
from virtvmand.driver.look import must_be_active
from virtvmand.errors import Code, LibvirtError, from_edgehold
from virtvmand.xdr import Domain as Named

log = logging.getLogger(__name__)

COMMAND_ID = "7a0f3f1c5d8e4c1fa2b6d94d0c3e8b52"
"""MESSAGE_ID of the line that each change leaves: who made it. What was refused changed nothing and is not told."""
PAUSED_FLAG = 1
"""Flag of domain_create_with_flags and domain_create_xml (VIR_DOMAIN_START_PAUSED)."""
# What a start may be asked for besides, and means nothing here: a cache, an image of a saved guest, a checked document.
_START_IDLE = 4 | 8 | 16
_ACPI = 1
"""Way of shutdown and reboot: the power button (VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)."""
_DESTROY_KNOWN = 1 | 2
GIB = 1024**3


class Run:
    """Calls that change what a guest does."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._find = context.find

    async def domain_create(self, client: Client, dom: Named) -> None:
        await self.domain_create_with_flags(client, dom, 0)

    async def domain_create_with_flags(self, client: Client, dom: Named, flags: int) -> bytes:
        paused = start_paused(flags)
        async with self._context.turn(dom.uuid):
            one = self._find(dom)
            if one.active:
                raise LibvirtError(Code.OPERATION_INVALID, f"domain '{one.name}' is already running")
            if not one.persistent:  # it has stopped, and is about to be gone
                raise LibvirtError(Code.NO_DOMAIN, f"domain '{one.name}' was transient and has ended")
            await self.start(one, one.config, paused=paused)
            note(client, "start", one.name)
            return self._find(dom).ref

    async def start(self, one: Domain, definition: Definition, *, paused: bool, live: bool = False) -> None:
        """Start a guest; asked for with the domain's turn. ``live``: with another than its persistent definition."""
        plan = definition.plan
        if not plan.kernel:
            raise LibvirtError(
                Code.OPERATION_INVALID,
                f"domain '{one.name}' has no kernel to start: give its definition os/kernel (partitions have no "
                "firmware that boots from a disk)",
            )
        vmand, partition = self._context.mirror.vmand, one.partition.id
        with about(one, wrong=Code.CONFIG_UNSUPPORTED):  # an argument of the deploy is of the definition, here
            if one.partition.state is State.FAILED:
                await vmand.shutdown(partition, force=True)
            await self.fit(one, plan)
            if live or LIVE in one.annotations:
                await vmand.annotate(partition, {LIVE: definition.xml if live else None})
            await vmand.deploy(
                partition,
                kernel=_path(plan.kernel),
                initrd=_path(plan.initrd),
                dtb=_path(plan.dtb),
                cmdline=plan.cmdline,
                disks=plan.disks,
                nics=plan.nics,
                vsock=plan.vsock,
                agent=plan.agent,
                paused=paused,
            )
        await self._context.mirror.refresh(partition)

    async def fit(self, one: Domain, plan: Plan) -> None:
        """Make the partition hold what a definition says; nothing where it does. The guest is off."""
        if changes := differences(one, plan):
            await self._context.mirror.vmand.change_partition(one.partition.id, **changes)

    async def domain_destroy(self, client: Client, dom: Named) -> None:
        await self.domain_destroy_flags(client, dom, 0)

    async def domain_destroy_flags(self, client: Client, dom: Named, flags: int) -> None:
        _only(flags, _DESTROY_KNOWN)
        one = self._find(dom)
        if not one.active and self._context.has_turn(one.uuid):  # it is about to be started, or gone
            async with self._context.turn(one.uuid):
                one = self._find(dom)
        must_be_active(one)
        # Not in turn: it must not wait for a change or a shutdown that hangs.
        mirror = self._context.mirror
        mirror.intend_destroy(one.uuid)
        try:
            with about(one):
                await mirror.vmand.shutdown(one.partition.id, force=True)
        except LibvirtError:
            mirror.forget_destroy(one.uuid)
            raise
        note(client, "destroy", one.name)
        if not one.persistent:
            async with self._context.turn(one.uuid):
                await self.reap(one.uuid)

    async def reap(self, uuid: bytes) -> None:
        """Remove a transient domain that has ended; asked for with its turn."""
        try:
            one = self._context.mirror.by_uuid(uuid)
            if not one.active and not one.persistent:
                await self._context.mirror.vmand.destroy_partition(one.partition.id)
        except NotFoundError:
            return
        except LibvirtError as error:
            if error.code is not Code.NO_DOMAIN:
                raise

    async def domain_shutdown(self, client: Client, dom: Named) -> None:
        await self.domain_shutdown_flags(client, dom, 0)

    async def domain_shutdown_flags(self, client: Client, dom: Named, flags: int) -> None:
        _only_acpi(flags)
        one = self._find(dom)
        must_be_active(one)
        if one.in_shutdown:
            return  # it is being asked already
        limit_s = self._context.config.shutdown_timeout_s
        with about(one):
            await self._context.mirror.vmand.shutdown(one.partition.id, timeout_s=limit_s, leave=True, wait=False)
        note(client, "shutdown", one.name)

    async def domain_reboot(self, client: Client, dom: Named, flags: int) -> None:
        _only_acpi(flags)
        one = self._find(dom)
        must_be_active(one)
        mirror = self._context.mirror
        graceful = "shutdown" in (await mirror.host()).supports
        limit_s = self._context.config.reboot_timeout_s if graceful else None
        with about(one):
            await mirror.vmand.reboot(one.partition.id, graceful=graceful, timeout_s=limit_s, wait=False)
        note(client, "reboot", one.name)

    async def domain_reset(self, client: Client, dom: Named, _flags: int) -> None:
        one = self._find(dom)
        must_be_active(one)
        with about(one):
            await self._context.mirror.vmand.reboot(one.partition.id)
        note(client, "reset", one.name)

    async def domain_suspend(self, client: Client, dom: Named) -> None:
        one = self._find(dom)
        must_be_active(one)
        if one.state[0] != PAUSED:
            with about(one):
                await self._context.mirror.vmand.suspend(one.partition.id)
            note(client, "suspend", one.name)

    async def domain_resume(self, client: Client, dom: Named) -> None:
        one = self._find(dom)
        must_be_active(one)
        if one.state[0] == RUNNING:
            raise LibvirtError(Code.OPERATION_INVALID, f"domain '{one.name}' is already running")
        with about(one):
            await self._context.mirror.vmand.restore(one.partition.id)
        note(client, "resume", one.name)


@contextlib.contextmanager
def about(one: Domain, *, wrong: Code = Code.INVALID_ARG) -> Iterator[None]:
    """What vmand says of a partition is said of the domain, by its name. ``wrong``: for what it calls a bad request."""
    try:
        yield
    except EdgeholdError as error:
        code = wrong if isinstance(error, BadRequestError) else from_edgehold(error).code
        if isinstance(error, UnsupportedError) and wrong is Code.INVALID_ARG:
            code = Code.OPERATION_UNSUPPORTED
        # Room comes back when somebody gives it back, which may be never.
        later = error.retryable and not isinstance(error, NoCapacityError)
        raise LibvirtError(code, f"domain '{one.name}': {error.message}", retryable=later) from error


def start_paused(flags: int) -> bool:
    """Whether these flags of a start want the guest to wait before its first instruction.

    Raises:
        LibvirtError: they want something else that can't be done.
    """
    _only(flags, PAUSED_FLAG | _START_IDLE)
    return bool(flags & PAUSED_FLAG)


def differences(one: Domain, plan: Plan) -> dict[str, Any]:
    """What of a partition is another than a definition says, as arguments of `VmandClient.change_partition`."""
    now = one.partition
    pairs: tuple[tuple[str, object, object], ...] = (
        ("name", now.name, plan.name),
        ("cores", now.cores, plan.cores),
        ("memsize_gb", now.memory_bytes / GIB, plan.memory_bytes / GIB),
        ("mode", now.mode, plan.mode),
        ("secure", now.secure, plan.secure),
        ("strict", now.strict, plan.strict),
    )
    return {key: wanted for key, is_now, wanted in pairs if is_now != wanted}


def note(client: Client, command: str, name: str) -> None:
    """A line in the journal of what somebody changed: vmand knows us alone."""
    fields = {"message_id": COMMAND_ID, "command": command, "domain": name, "peer_uid": client.peer.uid}
    log.info("%s %s by %s", command, name, client.peer, extra=fields)


def _path(text: str) -> Any:
    return text or None


def _only(flags: int, known: int) -> None:
    if flags & ~known:
        raise LibvirtError(Code.ARGUMENT_UNSUPPORTED, f"flags {flags & ~known:#x}: vman:///system can't do that")


def _only_acpi(flags: int) -> None:
    if flags & ~_ACPI:
        raise LibvirtError(
            Code.ARGUMENT_UNSUPPORTED, "mode: only acpi, the power button; partitions are reached no other way"
        )
