"""vmand's partitions in memory, as domains: what every question of a client is answered from.

It follows vmand's events and comes back when vmand does. While vmand is away nothing is answered: what was known then
may be wrong by now. It must not change anything in vmand.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn
from uuid import UUID

from edgehold.api.vmand import Capabilities, Partition, VmandClient
from edgehold.errors import EdgeholdError
from virtvmand import events
from virtvmand.domain import Domain
from virtvmand.errors import Code, LibvirtError
from virtvmand.events import Happening
from virtvmand.following import ENDS, Following, Known

log = logging.getLogger(__name__)

_RETRY_S, _RETRY_MAX_S = 0.1, 5.0
# A conversation that lasts longer is no sign of a vmand that ends each of them at once.
_STEADY_S = 5.0

Changed = Callable[[Domain | None, Domain | None], None]


class Mirror:
    """All domains. `run` is the task that keeps them right.

    ``tell``: what clients are to hear, in order; not of what was there when vmand was met first. ``changed``: each
    domain's old and new view, before ``tell``; None where it was not or is not there, so also of each that is found
    first. ``synced``: vmand is there (again) and all is known; after those. None of them may raise.
    """

    def __init__(
        self,
        path: Path,
        *,
        tell: Callable[[Happening], None],
        changed: Changed = lambda _old, _new: None,
        synced: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = path
        self._tell = tell
        self._changed = changed
        self._synced = synced
        self._domains: dict[int, Domain] = {}
        self._by_uuid: dict[bytes, Domain] = {}
        self._by_name: dict[str, Domain] = {}
        self._to_destroy: set[bytes] = set()
        self._following: Following | None = None
        """The conversation that is in sync."""
        self._next: Following | None = None
        self._ready = asyncio.Event()
        self._reason = "it was not asked yet"
        self._told_away = False
        self._met = False

    # For the driver

    @property
    def in_sync(self) -> bool:
        """Whether vmand is there and all is known."""
        return self._following is not None and not self._following.over

    @property
    def vmand(self) -> VmandClient:
        """The open conversation with vmand. What it answers, the mirror knows already; but see `refresh`.

        Raises:
            LibvirtError: SYSTEM_ERROR; vmand is away.
        """
        return self._there().vmand

    @property
    def known_host(self) -> Capabilities | None:
        """What the host could give when vmand was met; None where vmand has not found out yet (`host` waits for that).

        Raises:
            LibvirtError: SYSTEM_ERROR; vmand is away.
        """
        host = self._there().host
        return host.result() if host.done() else None

    async def host(self) -> Capabilities:
        """What the host could give when vmand was met, when vmand has found out: seconds at its first start on a host.

        Raises:
            LibvirtError: SYSTEM_ERROR; vmand is away.
        """
        host = self._there().host
        await asyncio.wait({host})
        if host.cancelled():
            raise self._away()
        return host.result()

    async def ready(self, timeout_s: float) -> None:
        """Wait until everything is known.

        Raises:
            LibvirtError: SYSTEM_ERROR; vmand is away, and was for ``timeout_s`` seconds.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            raise self._away() from None

    async def refresh(self, partition: int) -> Domain:
        """The domain of a partition with all that vmand did before this call; to be awaited after create, annotate
        and change, whose annotations no event brings.

        Raises:
            LibvirtError: SYSTEM_ERROR: vmand is away. NO_DOMAIN: the partition is gone.
        """
        await self._there().refresh(partition)
        self._there()
        domain = self._domains.get(partition)
        return domain or _no_domain(f"the partition {partition} is gone")

    def all(self) -> list[Domain]:
        """All domains, by partition id.

        Raises:
            LibvirtError: SYSTEM_ERROR; vmand is away.
        """
        self._there()
        return [self._domains[one] for one in sorted(self._domains)]

    def by_uuid(self, uuid: bytes) -> Domain:
        """The domain with this uuid (16 bytes).

        Raises:
            LibvirtError: SYSTEM_ERROR: vmand is away. NO_DOMAIN: there is none.
        """
        self._there()
        return self._by_uuid.get(uuid) or _no_domain(f"none has the uuid {UUID(bytes=uuid)}")

    def by_name(self, name: str) -> Domain:
        """The domain with this name.

        Raises:
            LibvirtError: SYSTEM_ERROR: vmand is away. NO_DOMAIN: there is none.
        """
        self._there()
        return self._by_name.get(name) or _no_domain(f"none has the name {name[:100]!r}")

    def by_id(self, domain_id: int) -> Domain:
        """The active domain with this id.

        Raises:
            LibvirtError: SYSTEM_ERROR: vmand is away. NO_DOMAIN: there is none, or it is not active.
        """
        self._there()
        domain = self._domains.get(domain_id)
        if domain is None or not domain.active:
            _no_domain(f"no active one has the id {domain_id}")
        return domain

    def intend_destroy(self, uuid: bytes) -> None:
        """The next end of this domain's guest is by force. Said before vmand is asked for it."""
        self._to_destroy.add(uuid)

    def forget_destroy(self, uuid: bytes) -> None:
        """vmand has refused to end it."""
        self._to_destroy.discard(uuid)

    # With vmand

    async def run(self) -> NoReturn:
        """For ever: follow vmand, come back when it does."""
        loop = asyncio.get_running_loop()
        pause_s = _RETRY_S
        while True:
            begun_s = loop.time()
            self._next = Following(self._path, begin=self._begin, put=self._put, remove=self._remove)
            try:
                await self._next.run()
            except ENDS as error:
                self._lost(error)
            finally:
                self._following = None
                self._ready.clear()
            if loop.time() - begun_s > _STEADY_S:
                pause_s = _RETRY_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RETRY_MAX_S)

    def _there(self) -> Following:
        following = self._following
        if following is None or following.over:
            raise self._away()
        return following

    def _away(self) -> LibvirtError:
        return LibvirtError(Code.SYSTEM_ERROR, f"vmand is not reachable at {self._path}: {self._reason}")

    def _lost(self, error: Exception) -> None:
        text = error.message if isinstance(error, EdgeholdError) else f"its answer can't be understood: {error}"
        self._reason = text.removeprefix(f"{self._path}: ")
        if not self._told_away:  # once an outage, however often it is tried
            log.warning("vmand is away: %s", self._reason)
            self._told_away = True

    def _begin(self, found: Sequence[Known]) -> None:
        before = self._domains
        self._domains = {one.id: self._view(before.get(one.id), one, annotations) for one, annotations in found}
        self._by_uuid = {one.uuid: one for one in self._domains.values()}
        self._by_name = {one.name: one for one in self._domains.values()}
        self._to_destroy.clear()
        self._following = self._next
        first, self._met, self._told_away = not self._met, True, False
        log.info("vmand is there, domains: %d", len(found))
        for number, old in before.items():
            now = self._domains.get(number)
            if now is None or now.uuid != old.uuid:  # ids begin anew where vmand's journal was removed
                self._report(old, None)
        for number, now in self._domains.items():
            earlier = before.get(number)
            self._report(earlier if earlier is not None and earlier.uuid == now.uuid else None, now, silent=first)
        self._ready.set()
        self._synced()

    def _view(self, old: Domain | None, partition: Partition, annotations: Mapping[str, str]) -> Domain:
        if old is None or old.partition.uuid != partition.uuid:
            return Domain(partition, annotations)
        return old.successor(partition, annotations, destroyed=old.uuid in self._to_destroy)

    def _put(self, partition: Partition, annotations: Mapping[str, str]) -> None:
        old = self._domains.get(partition.id)
        now = self._view(old, partition, annotations)
        if now is old:
            return
        if old is not None and old.name != now.name and self._by_name.get(old.name) is old:
            del self._by_name[old.name]
        self._domains[partition.id] = self._by_uuid[now.uuid] = self._by_name[now.name] = now
        if not now.active:
            self._to_destroy.discard(now.uuid)
        self._report(old, now)

    def _remove(self, partition: int) -> None:
        old = self._domains.pop(partition, None)
        if old is None:
            return
        del self._by_uuid[old.uuid]
        if self._by_name.get(old.name) is old:
            del self._by_name[old.name]
        self._to_destroy.discard(old.uuid)
        self._report(old, None)

    def _report(self, old: Domain | None, new: Domain | None, *, silent: bool = False) -> None:
        if old is new:
            return
        self._changed(old, new)
        if not silent:
            for happening in events.changes(old, new):
                self._tell(happening)


def _no_domain(why: str) -> NoReturn:
    raise LibvirtError(Code.NO_DOMAIN, f"Domain not found: {why}")
