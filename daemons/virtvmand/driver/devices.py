"""Devices attached to a definition, detached from it and changed in it: what a guest has stays until its next start."""

from collections.abc import Callable

from virtvmand import devedit
from virtvmand.call import Client
from virtvmand.driver.define import Define
from virtvmand.driver.look import CONFIG, LIVE
from virtvmand.errors import Code, LibvirtError
from virtvmand.xdr import Domain as Named

_FORCE = 4
"""Flag of an update: also where the guest holds a medium. There are none."""


class Devices:
    """Calls that change one device. Whatever would change a running guest's is refused as a whole."""

    def __init__(self, define: Define) -> None:
        self._define = define

    async def domain_attach_device(self, client: Client, dom: Named, xml: str) -> None:
        await self._change(client, dom, xml, LIVE, devedit.with_device)

    async def domain_attach_device_flags(self, client: Client, dom: Named, xml: str, flags: int) -> None:
        await self._change(client, dom, xml, flags, devedit.with_device)

    async def domain_detach_device(self, client: Client, dom: Named, xml: str) -> None:
        await self._change(client, dom, xml, LIVE, devedit.without_device)

    async def domain_detach_device_flags(self, client: Client, dom: Named, xml: str, flags: int) -> None:
        await self._change(client, dom, xml, flags, devedit.without_device)

    async def domain_update_device_flags(self, client: Client, dom: Named, xml: str, flags: int) -> None:
        await self._change(client, dom, xml, flags & ~_FORCE, devedit.with_device_changed)

    async def _change(self, client: Client, dom: Named, xml: str, flags: int, edit: Callable[[str, str], str]) -> None:
        if flags & ~(LIVE | CONFIG):
            raise LibvirtError(Code.INVALID_ARG, f"flags {flags:#x}: live and config are known")
        await self._define.edit(client, dom, flags, lambda one: edit(one.config.xml, xml), "devices")
