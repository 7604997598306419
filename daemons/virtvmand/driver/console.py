"""The guest's console as a stream."""

from virtvmand.call import Client, Streamed
from virtvmand.driver.context import Context
from virtvmand.driver.look import must_be_active
from virtvmand.driver.run import about, note
from virtvmand.errors import Code, LibvirtError
from virtvmand.xdr import Domain as Named

# FORCE and SAFE (virDomainConsoleFlags): several may look and type at once, so that nobody has to be thrown out.
_KNOWN = 1 | 2


class Console:
    """Consoles."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def domain_open_console(self, client: Client, dom: Named, device: str | None, flags: int) -> Streamed:
        if flags & ~_KNOWN:
            raise LibvirtError(Code.ARGUMENT_UNSUPPORTED, f"flags {flags:#x}: force and safe are known")
        one = self._context.find(dom)
        must_be_active(one)
        if device and device not in one.current.consoles:
            known = ", ".join(one.current.consoles) or "none"
            raise LibvirtError(Code.INVALID_ARG, f"console: domain '{one.name}' has no {device!r}; it has {known}")
        with about(one):
            stream = await self._context.mirror.vmand.attach_console(one.partition.id)
        note(client, "console of", one.name)
        return Streamed(stream)
