"""The vCPU threads of libvirt's domains of this host: asked twice a second, one child process for each URI.

A poll and not libvirt's events: one question answers for all domains of a URI, costs a domain half a millisecond of the
child's, and heals whatever was missed. While libvirt is away, the last threads stay known and held: a guest outlives
its libvirtd, and so must its reservation. A domain that is shut off, or unknown for now, is waited for by its name.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from deadlined import shortage
from deadlined.domainask import ANSWER_S, Conversation, Seen, check_uri
from deadlined.partitions import VmandLink
from deadlined.shortage import belongs, is_short
from deadlined.targets import Source
from edgehold.api.deadlined import DEFAULT_URI
from edgehold.api.vmand import VmandClient
from edgehold.errors import EdgeholdError, NoCapacityError, NotFoundError

log = logging.getLogger(__name__)

# Twice in a cycle of 1 s, once in the usual one: a resume is answered within two cycles.
_LOOK_S = 0.5
_RETRY_S = 1.0
# Each has a child process of nearly 30 MB. A host has one or two.
_URIS_MAX = 8


class DomainSource:
    """One domain's vCPU threads, as libvirt and /proc had them last."""

    over = ""

    def __init__(self, name: str, uri: str, link: "LibvirtLink") -> None:
        self.name = name
        self.uri = uri
        self.reason = ""
        self.suspended = False
        self._tids: tuple[int, ...] = ()
        self._changed = True
        self._link = link

    def changed(self) -> bool:
        return self._changed

    def tids(self) -> tuple[int, ...]:
        self._changed = False
        return self._tids

    def forget(self, tid: int) -> None:
        self._tids = tuple(one for one in self._tids if one != tid)

    def close(self) -> None:
        self._link.drop(self)

    def told(self, seen: Seen) -> None:
        """libvirt answered. Raises `OSError`: its threads can't be looked at for the moment; what was known stays."""
        tids = tuple(tid for tid in seen.tids if tid in self._tids or belongs(tid, seen.pid))
        if tids != self._tids:
            self._tids = tids
            self._changed = True
        self.suspended = seen.suspended
        if not seen.known:
            self.reason = f"libvirt ({self.uri}) knows no domain {self.name} any more; held again when it is back"
        elif tids:
            self.reason = f"the domain is {seen.state}" if seen.suspended else ""
        else:
            self.reason = f"the domain is {seen.state}" + (f": {seen.reason}" if seen.reason else "; no vCPU runs")

    def away(self, error: EdgeholdError) -> None:
        """libvirt can't tell."""
        kept = "its last known threads are kept" if self._tids else "no thread is known"
        self.reason = f"{error.message}; {kept} until libvirt is back"

    def unseen(self, error: OSError) -> None:
        """Its threads can't be looked at for the moment."""
        self.reason = f"{shortage.text(error)}; its last known threads are kept"


class LibvirtLink:
    """Keeps every `DomainSource` up to date. `run` is the task that does it; nothing is started before it is needed."""

    def __init__(self, vmand: VmandLink, *, vmand_socket: Path, answer_s: float = ANSWER_S) -> None:
        self._vmand = vmand
        self._vmand_socket = vmand_socket
        self._answer_s = answer_s
        self._sources: dict[str, set[DomainSource]] = {}
        self._conversations: dict[str, tuple[Conversation, int]] = {}
        """By URI, with how many use it."""
        self._wanted = asyncio.Event()

    async def open(self, name: str, uri: str = "") -> Source:
        """A source for a domain, by name or uuid; a partition's domain (``vman:``) becomes the partition's source.

        Raises:
            NotFoundError: libvirt has no such domain.
            BadRequestError: no such URI.
            UnavailableError: libvirt (or vmand) is away or does not answer in time.
            DeniedError: libvirt lets nobody like us in; a dedicated partition's domain.
            NoCapacityError: too many different URIs.
            UnsupportedError: libvirt-python is not installed; not a driver whose guests have threads here.
        """
        uri = uri or DEFAULT_URI
        check_uri(uri)
        others = (self._conversations.keys() | self._sources.keys()) - {uri}
        if len(others) >= _URIS_MAX:
            raise NoCapacityError(f"deadlined asks libvirt at {_URIS_MAX} URIs at most, and does already; detach one")
        async with self._conversation(uri) as conversation:
            seen = (await conversation.ask([name]))[name]
            if not seen.known:
                raise NotFoundError(f"libvirt ({uri}) has no domain {name}; virsh -c {uri} list --all has them")
            if uri.startswith("vman"):
                return await self._partition(name, uri, seen.uuid)
        source = DomainSource(name, uri, self)
        source.told(seen)
        self._sources.setdefault(uri, set()).add(source)
        self._wanted.set()
        return source

    async def _partition(self, name: str, uri: str, uuid: str) -> Source:
        """virtvmand's domains have their partitions' uuids; who has the threads is vmand."""
        async with await VmandClient.connect(self._vmand_socket) as vmand:
            found = [one.id for one in await vmand.list_partitions() if one.uuid == uuid]
        if not found:
            raise NotFoundError(
                f"domain {name} ({uuid}) of {uri} is no partition of the vmand at {self._vmand_socket}: "
                "does virtvmand speak for another one? Attach there, or by --partition"
            )
        return await self._vmand.open(found[0])

    def drop(self, source: DomainSource) -> None:
        """Not needed any more."""
        sources = self._sources.get(source.uri, set())
        sources.discard(source)
        if not sources:
            self._sources.pop(source.uri, None)

    @staticmethod
    def tell(source: DomainSource, seen: Seen) -> None:
        """As `DomainSource.told`, where a shortage is a reason to look again."""
        try:
            source.told(seen)
        except OSError as error:
            if not is_short(error):
                raise
            source.unseen(error)

    async def run(self) -> None:
        """For ever: one task for each URI that somebody is interested in; one that hangs keeps no other waiting."""
        followers: dict[str, asyncio.Task[None]] = {}
        waiter: asyncio.Task[bool] | None = None
        try:
            while True:
                self._wanted.clear()
                for uri in self._sources.keys() - followers.keys():
                    followers[uri] = asyncio.create_task(self._follow(uri), name=f"libvirt {uri}")
                waiter = asyncio.create_task(self._wanted.wait(), name="libvirt")
                await asyncio.wait({waiter, *followers.values()}, return_when=asyncio.FIRST_COMPLETED)
                waiter.cancel()
                for uri in [uri for uri, task in followers.items() if task.done()]:
                    followers.pop(uri).result()
        finally:
            left = [*followers.values(), *([waiter] if waiter is not None else [])]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _follow(self, uri: str) -> None:
        """Until nobody is interested in the URI."""
        away = False
        async with self._conversation(uri) as conversation:
            while sources := self._sources.get(uri):
                asked = {source: source.name for source in sources}
                try:
                    seen = await conversation.ask(sorted(set(asked.values())))
                except EdgeholdError as error:
                    if not away:
                        log.warning("libvirt can't tell: %s", error)
                        away = True
                    for source in sources:
                        source.away(error)
                    await asyncio.sleep(_RETRY_S)
                    continue
                if away:
                    log.info("libvirt is back (%s)", uri)
                    away = False
                for source, name in asked.items():
                    self.tell(source, seen[name])
                await asyncio.sleep(_LOOK_S)

    @contextlib.asynccontextmanager
    async def _conversation(self, uri: str) -> AsyncIterator[Conversation]:
        """The conversation with one URI; its child is ended when nobody uses it any more."""
        conversation, users = self._conversations.get(uri) or (Conversation(uri, answer_s=self._answer_s), 0)
        self._conversations[uri] = conversation, users + 1
        try:
            yield conversation
        finally:
            users = self._conversations[uri][1] - 1
            if users:
                self._conversations[uri] = conversation, users
            else:
                del self._conversations[uri]
                await conversation.close()
