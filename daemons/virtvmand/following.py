"""One conversation with vmand, from the first word to the last: its partitions and their annotations as it tells them.

Nothing that was told is lost or put in a wrong order: events bring whole partitions; annotations are asked for, and
asked for again where they became others meanwhile. What this makes of it is the mirror's. A vmand that does not answer
any more ends the conversation.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from edgehold.api.vmand import Capabilities, Event, Partition, VmandClient
from edgehold.errors import EdgeholdError, FailedError, NotFoundError, TimedOutError, UnavailableError

log = logging.getLogger(__name__)

ENDS = (EdgeholdError, msgspec.ValidationError)
"""What a conversation ends with: vmand is away, or says what can't be understood. Anything else is a bug of ours."""

# vmand takes 16 requests of a connection at once: there is always room for a command.
_READ_AT_ONCE = 12
_ASK_EVERY_S = 10.0
_ANSWER_S = 5.0
_ASK_HOST_AGAIN_S = 10.0

Known = tuple[Partition, Mapping[str, str]]


class Following:
    """Follows one vmand until it is away.

    ``begin``: these partitions are there, and all that follows is told. ``put``: one is there or became another.
    ``remove``: one is gone.
    """

    def __init__(
        self,
        path: Path,
        *,
        begin: Callable[[Sequence[Known]], None],
        put: Callable[[Partition, Mapping[str, str]], None],
        remove: Callable[[int], None],
    ) -> None:
        self._path = path
        self._tell_begin = begin
        self._tell_put = put
        self._tell_remove = remove
        self.over = False
        self._vmand: VmandClient | None = None
        self._synced = False
        self._early: list[Event] | None = []
        self._partitions: dict[int, Partition] = {}
        self._annotations: dict[int, dict[str, str]] = {}
        self._held: set[int] = set()
        """Partitions that became others together with their annotations, and are told of together."""
        self._reading: dict[int, asyncio.Task[None]] = {}
        self._again: set[int] = set()
        self._slots = asyncio.Semaphore(_READ_AT_ONCE)
        loop = asyncio.get_running_loop()
        self._broken: asyncio.Future[None] = loop.create_future()
        self.host: asyncio.Future[Capabilities] = loop.create_future()
        """What vmand's host can give; it may take vmand seconds to find out. Cancelled when vmand goes away first."""

    @property
    def vmand(self) -> VmandClient:
        """The conversation itself, for commands."""
        assert self._vmand is not None  # noqa: S101 - nobody is given this object before
        return self._vmand

    async def run(self) -> None:
        """Until vmand is away: it always ends with an error.

        Raises:
            EdgeholdError, msgspec.ValidationError: as `ENDS`.
        """
        self._vmand = await VmandClient.connect(self._path, on_event=self._hear)
        work: set[asyncio.Future[None]] = {
            asyncio.create_task(self._sync(), name="sync with vmand"),
            asyncio.create_task(self._ask_host(), name="ask what the host can give"),
            asyncio.create_task(self._keep_asking(), name="ask whether vmand is there"),
            asyncio.create_task(self._until_over(), name="vmand's end"),
        }
        try:
            done, _ = await asyncio.wait({*work, self._broken}, return_when=asyncio.FIRST_EXCEPTION)
            for one in done:
                one.result()
        finally:
            self.over = True
            self.host.cancel()
            self._broken.cancel()
            for task in (*work, *self._reading.values()):
                task.cancel()
            try:
                await asyncio.gather(self._broken, *work, *self._reading.values(), return_exceptions=True)
            finally:
                await self._vmand.close()

    async def refresh(self, partition: int) -> None:
        """Read a partition's annotations, so that they are told as they are now or later."""
        if partition not in self._reading and partition in self._partitions:
            self._read(partition)
        while (task := self._reading.get(partition)) is not None:
            await asyncio.wait({task})

    async def _sync(self) -> None:
        await self.vmand.subscribe()
        self._partitions = {one.id: one for one in await self.vmand.list_partitions()}
        # Which of these came before the list can't be seen. Each brings the whole partition and there is one for each
        # change that stays: the last of a partition is the newest, or what the list says.
        early, self._early = self._early, None
        for event in early or ():
            self._take(event)
        for number in self._partitions.keys() - self._reading.keys():
            self._read(number)
        while self._reading:
            await asyncio.wait(self._reading.values())
        if not self._broken.done():
            self._synced = True
            self._tell_begin([(one, self._annotations[number]) for number, one in sorted(self._partitions.items())])

    def _hear(self, event: Event) -> None:
        if event.kind == "console" or self.over:
            return
        if self._early is not None:
            self._early.append(event)
        else:
            self._take(event)

    def _take(self, event: Event) -> None:
        number, now = event.partition, event.now
        if event.kind == "gone":
            self._forget(number)
            return
        if now is None:
            self._break(
                FailedError(f"an event of kind {event.kind!r} without a partition; are vmand and this one version?")
            )
            return
        before = self._partitions.get(number)
        self._partitions[number] = now
        if before is not None and _shape(before) != _shape(now):
            self._held.add(number)
            self._read(number)
        elif before is None or event.kind == "annotated":
            self._read(number)
        self._show(number)

    def _show(self, number: int) -> None:
        if self._synced and number in self._annotations and number not in self._held:
            self._tell_put(self._partitions[number], self._annotations[number])

    def _forget(self, number: int) -> None:
        if self._partitions.pop(number, None) is not None:
            self._held.discard(number)
            # One that was never shown is not missed.
            if self._annotations.pop(number, None) is not None and self._synced:
                self._tell_remove(number)

    def _read(self, number: int) -> None:
        if number in self._reading:
            self._again.add(number)
        else:
            self._reading[number] = asyncio.create_task(self._ask(number), name=f"annotations of partition {number}")

    async def _ask(self, number: int) -> None:
        try:
            annotations = await self._asked(number)
            del self._reading[number]
            if number in self._partitions:
                self._annotations[number] = annotations
                self._held.discard(number)
                self._show(number)
        except NotFoundError:  # it went away meanwhile
            self._forget(number)
        except Exception as error:  # noqa: BLE001 - `run` ends with it, whatever it is
            self._break(error)
        finally:
            self._reading.pop(number, None)

    async def _asked(self, number: int) -> dict[str, str]:
        while True:
            async with self._slots:
                self._again.discard(number)
                try:
                    annotations = await self.vmand.annotations(number)
                except TimedOutError:  # others hold all its places; whether vmand hangs is found out apart
                    continue
            if number not in self._again:
                return annotations

    async def _keep_asking(self) -> NoReturn:
        """End where vmand hangs. Asked apart: the conversation may be waiting for commands that take long."""
        while True:
            await asyncio.sleep(_ASK_EVERY_S)
            try:
                async with asyncio.timeout(_ANSWER_S):
                    with contextlib.suppress(EdgeholdError):  # refused, or gone: then `_until_over` ends
                        async with await VmandClient.connect(self._path, timeout_s=2 * _ANSWER_S) as apart:
                            await apart.subscribe()
            except TimeoutError:
                raise UnavailableError(f"{self._path}: it does not answer within {_ANSWER_S:g} s") from None

    async def _ask_host(self) -> None:
        while True:
            try:
                self.host.set_result(await self.vmand.capabilities())
            except EdgeholdError as error:
                await asyncio.sleep(_ASK_HOST_AGAIN_S)  # where this is the end, it ends here
                log.warning("vmand can't tell what its host gives: %s; asking again", error)
            else:
                return

    async def _until_over(self) -> None:
        async for _ in self.vmand.events():
            pass  # they come to `_hear`

    def _break(self, error: Exception) -> None:
        if not self._broken.done():
            self._broken.set_exception(error)


def _shape(one: Partition) -> tuple[object, ...]:
    """What change-partition can change, together with annotations."""
    return one.name, one.mode, one.cores, one.memory_bytes, one.secure, one.strict
