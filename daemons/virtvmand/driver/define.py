"""Definitions: made, changed, removed, as annotations of partitions that hold the share of the host they ask for."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from edgehold.api.vmand import State
from edgehold.errors import BadRequestError, EdgeholdError, NoCapacityError
from virtvmand import domedit, domxml
from virtvmand.call import Client
from virtvmand.domain import AUTOSTART, LIVE, TRANSIENT, XML, YES, Domain
from virtvmand.domxml import Definition
from virtvmand.driver.context import Context
from virtvmand.driver.look import CONFIG, must_be_active
from virtvmand.driver.look import LIVE as LIVE_FLAG
from virtvmand.driver.run import GIB, Run, about, differences, note, start_paused
from virtvmand.errors import Code, LibvirtError
from virtvmand.xdr import Domain as Named

_VALIDATE = 1
# Of an undefine: saved guests, snapshots, variables of a firmware, checkpoints, a TPM's state: there are none.
_UNDEFINE_IDLE = 0x7F
_MAXIMUM = 4
# Characters of two texts that go into one request of 64 KiB, whatever JSON makes of them.
_ONE_REQUEST = 30_000


class Define:
    """Calls that change what a domain is."""

    def __init__(self, context: Context, run: Run) -> None:
        self._context = context
        self._find = context.find
        self._run = run

    async def domain_define_xml(self, client: Client, xml: str) -> bytes:
        return await self.domain_define_xml_flags(client, xml, 0)

    async def domain_define_xml_flags(self, client: Client, xml: str, flags: int) -> bytes:
        if flags & ~_VALIDATE:
            raise LibvirtError(Code.ARGUMENT_UNSUPPORTED, f"flags {flags:#x}: only validate is known here")
        definition = self._read(xml)
        uuid = _bytes(definition)
        async with self._context.turn(uuid):
            known = self._known(definition)
            if known is None:
                await self._create(definition, {XML: definition.xml})
            else:
                await self.redefine(known, definition)
            note(client, "define", definition.plan.name)
            return self._context.mirror.by_uuid(uuid).ref

    async def domain_create_xml(self, client: Client, xml: str, flags: int) -> bytes:
        paused = start_paused(flags)
        definition = self._read(xml)
        uuid = _bytes(definition)
        async with self._context.turn(uuid):
            known = self._known(definition)
            if known is not None and known.active:
                raise LibvirtError(Code.OPERATION_INVALID, f"domain '{known.name}' is already running")
            if known is not None and known.persistent:  # for this run with this definition, its own one stays
                await self._run.start(known, definition, paused=paused, live=True)
            else:
                await self._create(definition, {XML: definition.xml, TRANSIENT: YES})
                try:
                    await self._run.start(self._context.mirror.by_uuid(uuid), definition, paused=paused)
                except (EdgeholdError, LibvirtError):
                    await self._run.reap(uuid)
                    raise
            note(client, "create", definition.plan.name)
            return self._context.mirror.by_uuid(uuid).ref

    async def domain_undefine(self, client: Client, dom: Named) -> None:
        await self.domain_undefine_flags(client, dom, 0)

    async def domain_undefine_flags(self, client: Client, dom: Named, flags: int) -> None:
        if flags & ~_UNDEFINE_IDLE:
            raise LibvirtError(Code.ARGUMENT_UNSUPPORTED, f"flags {flags:#x}: not known here")
        async with self._context.turn(dom.uuid):
            one = self._find(dom)
            if not one.persistent:
                raise LibvirtError(Code.OPERATION_INVALID, f"domain '{one.name}' is transient: it has no definition")
            if one.active:
                kept = {TRANSIENT: YES, XML: None, LIVE: one.current.xml, AUTOSTART: None}
                await self.annotate(one, kept)
            else:
                with about(one):
                    await self._context.mirror.vmand.destroy_partition(one.partition.id)
            note(client, "undefine", one.name)

    async def domain_rename(self, client: Client, dom: Named, name: str | None, flags: int) -> tuple[int]:
        if flags or not name:
            raise LibvirtError(Code.INVALID_ARG, "a new name is needed, and no flags")
        async with self._context.turn(dom.uuid):
            one = self._find(dom)
            if one.active:
                raise LibvirtError(Code.OPERATION_INVALID, f"domain '{one.name}' is running; shut it down first")
            if any(each.name == name and each is not one for each in self._context.mirror.all()):
                raise LibvirtError(Code.OPERATION_FAILED, f"domain '{name}' already exists")
            await self.redefine(one, domxml.read_definition(domedit.with_name(one.config.xml, name)))
            note(client, "rename", name)
            return (0,)

    async def domain_set_autostart(self, client: Client, dom: Named, autostart: int) -> None:
        async with self._context.turn(dom.uuid):
            one = self._find(dom)
            if not one.persistent:
                raise LibvirtError(Code.OPERATION_INVALID, f"domain '{one.name}' is transient: it can't start again")
            await self.annotate(one, {AUTOSTART: YES if autostart else None})
            note(client, "autostart" if autostart else "no autostart", one.name)

    async def domain_set_memory(self, client: Client, dom: Named, memory_kib: int) -> None:
        await self.domain_set_memory_flags(client, dom, memory_kib, LIVE_FLAG)

    async def domain_set_memory_flags(self, client: Client, dom: Named, memory_kib: int, flags: int) -> None:
        def edit(one: Domain) -> str:
            return domedit.with_memory(one.config.xml, memory_kib=memory_kib, current_kib=memory_kib)

        await self.edit(client, dom, flags & ~_MAXIMUM, edit, "memory")

    async def domain_set_vcpus(self, client: Client, dom: Named, count: int) -> None:
        await self.domain_set_vcpus_flags(client, dom, count, LIVE_FLAG)

    async def domain_set_vcpus_flags(self, client: Client, dom: Named, count: int, flags: int) -> None:
        def edit(one: Domain) -> str:
            return domedit.with_vcpus(one.config.xml, count)

        await self.edit(client, dom, flags & ~_MAXIMUM, edit, "vCPUs")

    async def redefine(self, one: Domain, definition: Definition, *, live: str | None = None) -> None:
        """Give a domain another definition; asked for with its turn. All of it or nothing.

        ``live``: what its guest has from now on, where that changes too.
        """
        if one.active:
            changes_live = {LIVE: live or one.current.xml}
            changes_next = {XML: definition.xml, TRANSIENT: None}
            if len(definition.xml) + len(changes_live[LIVE]) < _ONE_REQUEST:
                await self.annotate(one, changes_live | changes_next)
            else:  # the first alone changes nothing of what the next start takes
                await self.annotate(one, changes_live)
                await self.annotate(one, changes_next)
            return
        vmand, partition = self._context.mirror.vmand, one.partition.id
        changes = differences(one, definition.plan)
        annotations = {XML: definition.xml, TRANSIENT: None, LIVE: None}
        if not changes:
            await self.annotate(one, annotations)
            return
        if one.partition.state is State.FAILED:
            await vmand.shutdown(partition, force=True)
        await _asked(vmand.change_partition, partition, annotations=_present(annotations, one), **changes)
        await self._context.mirror.refresh(partition)

    async def edit(self, client: Client, dom: Named, flags: int, edit: Callable[[Domain], str], what: str) -> None:
        """Change the text of a persistent definition. ``what``: which part of it, for people.

        ``flags``: `CONFIG`; `LIVE_FLAG`, which is refused; neither means the guest where one runs.
        """
        if flags & ~(LIVE_FLAG | CONFIG):
            raise LibvirtError(Code.ARGUMENT_UNSUPPORTED, f"flags {flags:#x}: live and config are known")
        async with self._context.turn(dom.uuid):
            one = self._find(dom)
            if flags & LIVE_FLAG or (not flags & CONFIG and one.active):
                must_be_active(one)
                raise LibvirtError(
                    Code.OPERATION_UNSUPPORTED,
                    f"domain '{one.name}': the {what} that a guest has can't change; --config is for its next start",
                )
            if not one.persistent:
                raise LibvirtError(Code.OPERATION_INVALID, f"domain '{one.name}' is transient: it has no definition")
            await self.redefine(one, domxml.read_definition(edit(one)))
            note(client, f"change {what} of", one.name)

    def _read(self, xml: str) -> Definition:
        """A client's document. One that does not say how it uses cores gets the settings' answer written into it."""
        definition = domxml.read_definition(xml)
        mode = self._context.config.mode
        if definition.plan.mode is not mode and not domedit.says(definition.xml, "mode"):
            return domxml.read_definition(domedit.with_options(definition.xml, {"mode": mode.value}))
        return definition

    def _known(self, definition: Definition) -> Domain | None:
        """The domain that a document means.

        Raises:
            LibvirtError: it names one domain and has the uuid of another, or the name of one and not its uuid.
        """
        plan, uuid = definition.plan, _bytes(definition)
        for one in self._context.mirror.all():
            if one.uuid == uuid:
                if one.name != plan.name:
                    raise LibvirtError(
                        Code.OPERATION_FAILED, f"uuid: {plan.uuid} is that of domain '{one.name}', not of '{plan.name}'"
                    )
                return one
        for one in self._context.mirror.all():
            if one.name == plan.name:
                raise LibvirtError(
                    Code.OPERATION_FAILED,
                    f"domain '{plan.name}' already exists with uuid {one.partition.uuid}; put that into the document "
                    "to define it anew",
                )
        return None

    async def _create(self, definition: Definition, annotations: Mapping[str, str]) -> None:
        plan = definition.plan
        mirror = self._context.mirror
        partition = await _asked(
            mirror.vmand.create_partition,
            cores=plan.cores,
            memsize_gb=plan.memory_bytes / GIB,
            secure=plan.secure,
            mode=plan.mode,
            name=plan.name,
            strict=plan.strict,
            uuid=plan.uuid,
            annotations=annotations,
        )
        await mirror.refresh(partition)

    async def annotate(self, one: Domain, annotations: Mapping[str, str | None]) -> None:
        """Change annotations of a domain; asked for with its turn."""
        present = _present(annotations, one)
        if present:
            await _asked(self._context.mirror.vmand.annotate, one.partition.id, present)
            await self._context.mirror.refresh(one.partition.id)


def _present(annotations: Mapping[str, str | None], one: Domain) -> dict[str, str | None]:
    """Those that change something."""
    return {key: text for key, text in annotations.items() if one.annotations.get(key) != text}


async def _asked(call: Callable[..., Awaitable[Any]], *args: Any, **options: Any) -> Any:
    """What vmand says of a share of the host is said of a definition."""
    try:
        return await call(*args, **options)
    except (BadRequestError, NoCapacityError) as error:
        code = Code.OPERATION_FAILED if isinstance(error, NoCapacityError) else Code.CONFIG_UNSUPPORTED
        raise LibvirtError(code, error.message) from error


def _bytes(definition: Definition) -> bytes:
    return bytes.fromhex(definition.plan.uuid.replace("-", ""))
