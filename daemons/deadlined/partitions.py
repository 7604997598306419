"""The vCPU threads of vmand's partitions: one conversation for all of them, kept open while any is attached.

While vmand is away the last threads stay known and held: a guest outlives vmand, and so must its reservation. When it
is back, everything is asked anew.
"""

import asyncio
import contextlib
import logging
from pathlib import Path

from deadlined import shortage
from deadlined.shortage import belongs, is_short
from edgehold.api.vmand import Mode, State, VmandClient
from edgehold.errors import DeniedError, EdgeholdError, NotFoundError, UnavailableError

log = logging.getLogger(__name__)

_RETRY_S = 1.0
# Events tell what changes; this only heals what an event could miss.
_REFRESH_S = 5.0
# Longer than this no partition's answer is waited for before events are looked at again.
_ANSWER_S = 1.0


class PartitionSource:
    """One partition's vCPU threads, as vmand told last."""

    def __init__(self, partition: int, link: "VmandLink") -> None:
        self.partition = partition
        self.over = ""
        self.reason = ""
        self.suspended = False
        self._tids: tuple[int, ...] = ()
        self._told: tuple[int, ...] = ()
        self._link = link

    def changed(self) -> bool:
        return self._tids != self._told

    def tids(self) -> tuple[int, ...]:
        self._told = self._tids
        return self._tids

    def forget(self, tid: int) -> None:
        self._tids = tuple(one for one in self._tids if one != tid)

    def close(self) -> None:
        self._link.drop(self)

    async def refresh(self, vmand: VmandClient) -> None:
        """Ask vmand.

        Raises:
            DeniedError: a dedicated partition: its vCPUs are pinned.
            NotFoundError: no such partition (any more).
            EdgeholdError: as vmand answered.
            OSError: its threads can't be looked at for the moment; what was known stays.
        """
        status = await vmand.status(self.partition)
        if status.mode is Mode.DEDICATED:
            raise DeniedError(
                f"partition {self.partition} is dedicated: its vCPUs are pinned to cores of their own, where they need "
                "no reservation, and the kernel gives none to a pinned thread (EPERM). Create it with mode shared to "
                "size it by deadlined"
            )
        vcpus = await vmand.vcpus(self.partition)
        self.suspended = status.state is State.SUSPENDED
        self._tids = tuple(vcpu.tid for vcpu in vcpus if status.pid is None or belongs(vcpu.tid, status.pid))
        self.reason = "" if self._tids else f"partition {self.partition} is {status.state.value}: no vCPU runs"

    def troubled(self, error: EdgeholdError) -> None:
        """vmand can't tell about this partition."""
        kept = "its last known threads are kept" if self._tids else "no thread is known"
        self.reason = f"vmand can't tell about partition {self.partition} ({error.message}); {kept}"

    def unseen(self, error: OSError) -> None:
        """Its threads can't be looked at for the moment."""
        self.reason = f"{shortage.text(error)}; its last known threads are kept"

    def away(self, error: EdgeholdError) -> None:
        """vmand does not answer."""
        kept = "its last known threads are kept" if self._tids else "no thread is known"
        self.reason = f"vmand is away ({error.message}); {kept} until it is back"


class VmandLink:
    """Keeps every `PartitionSource` up to date. `run` is the task that does it."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._sources: set[PartitionSource] = set()
        self._wanted = asyncio.Event()
        self._away = False

    async def open(self, partition: int) -> PartitionSource:
        """A source for a partition, asked once over a conversation of its own so that the answer is the caller's.

        Raises:
            UnavailableError: vmand is away.
            EdgeholdError: as `PartitionSource.refresh`.
        """
        source = PartitionSource(partition, self)
        async with await VmandClient.connect(self._socket) as vmand:
            await source.refresh(vmand)
        self._sources.add(source)
        self._wanted.set()
        return source

    def drop(self, source: PartitionSource) -> None:
        """Not needed any more."""
        self._sources.discard(source)
        if not self._sources:
            self._wanted.clear()

    async def run(self) -> None:
        """For ever: connect while somebody is interested, follow the events, come back when vmand does."""
        while True:
            await self._wanted.wait()
            try:
                async with await VmandClient.connect(self._socket) as vmand:
                    await self._follow(vmand)
            except EdgeholdError as error:
                if not self._away:
                    log.warning("vmand is away: %s", error)
                    self._away = True
                for source in self._sources:
                    source.away(error)
                await asyncio.sleep(_RETRY_S)

    async def _follow(self, vmand: VmandClient) -> None:
        """Until nobody is interested; raises what vmand's going away raises."""
        await vmand.subscribe()
        changed = asyncio.Event()
        reader = asyncio.create_task(self._events(vmand, changed), name="vmand events")
        asked: dict[PartitionSource, asyncio.Task[None]] = {}
        try:
            while self._sources:
                changed.clear()
                for source in self._sources - asked.keys():
                    asked[source] = asyncio.create_task(self._refresh(source, vmand), name="partition")
                # A partition that hangs is waited for by nobody but itself.
                done, _ = await asyncio.wait(asked.values(), timeout=_ANSWER_S)
                asked = {source: task for source, task in asked.items() if task not in done}
                for task in done:
                    task.result()
                if reader.done():
                    reader.result()
                    raise UnavailableError(f"{self._socket}: the events ended")
                if self._away:
                    log.info("vmand is back")
                    self._away = False
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_REFRESH_S):
                        await changed.wait()
        finally:
            for task in (reader, *asked.values()):
                task.cancel()
            await asyncio.gather(reader, *asked.values(), return_exceptions=True)

    async def _events(self, vmand: VmandClient, changed: asyncio.Event) -> None:
        try:
            async for event in vmand.events():
                if event.kind != "console":
                    changed.set()
        finally:
            changed.set()

    @staticmethod
    async def _refresh(source: PartitionSource, vmand: VmandClient) -> None:
        try:
            await source.refresh(vmand)
        except NotFoundError:
            source.over = f"partition {source.partition} was destroyed"
        except DeniedError as error:
            source.over = error.message  # the id belongs to a dedicated partition now
        except EdgeholdError as error:
            # Of this partition only: that the conversation is over, the events tell.
            source.troubled(error)
        except OSError as error:
            if not is_short(error):
                raise
            source.unseen(error)
