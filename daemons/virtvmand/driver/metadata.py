"""Title, description and elements of other tools in a domain's metadata."""

from virtvmand import domedit, domxml
from virtvmand.call import Client
from virtvmand.domain import LIVE, XML, Domain
from virtvmand.driver.context import Context
from virtvmand.driver.define import Define
from virtvmand.driver.look import CONFIG, must_be_active
from virtvmand.driver.look import LIVE as LIVE_FLAG
from virtvmand.driver.run import note
from virtvmand.errors import Code, LibvirtError
from virtvmand.xdr import Domain as Named


class Metadata:
    """What a definition says that changes nothing in the guest: it may change while it runs."""

    def __init__(self, context: Context, define: Define) -> None:
        self._context = context
        self._define = define

    def domain_get_metadata(self, _client: Client, dom: Named, kind: int, uri: str | None, flags: int) -> tuple[str]:
        one = self._context.find(dom)
        live, config = _affected(one, flags)
        if live and config:
            raise LibvirtError(Code.INVALID_ARG, "live or config: one of them is read")
        return (one.metadata(kind, uri, live=live),)

    async def domain_set_metadata(
        self, client: Client, dom: Named, kind: int, value: str | None, key: str | None, uri: str | None, flags: int
    ) -> None:
        async with self._context.turn(dom.uuid):
            one = self._context.find(dom)
            live, config = _affected(one, flags)
            edited = {
                name: domedit.with_metadata(definition.xml, kind, value, key, uri)
                for name, definition in ((LIVE, one.current), (XML, one.config))
                if (live if name == LIVE else config)
            }
            if config and live:
                await self._define.redefine(one, domxml.read_definition(edited[XML]), live=edited[LIVE])
            elif config:
                await self._define.redefine(one, domxml.read_definition(edited[XML]))
            else:
                await self._define.annotate(one, {LIVE: edited[LIVE]})
            note(client, "change metadata of", one.name)


def _affected(one: Domain, flags: int) -> tuple[bool, bool]:
    """Whether the guest's and the persistent definition are meant."""
    if flags & ~(LIVE_FLAG | CONFIG):
        raise LibvirtError(Code.INVALID_ARG, f"flags {flags:#x}: live and config are known")
    live = bool(flags & LIVE_FLAG) or (not flags & CONFIG and one.active)
    config = bool(flags & CONFIG) or not live
    if live:
        must_be_active(one)
    if config and not one.persistent:
        raise LibvirtError(Code.OPERATION_INVALID, f"domain '{one.name}' is transient: it has no definition")
    return live, config
