"""What the host has to give, which partition has what of it, and how one gets its memory, or another share.

It must not know of commands, guests or the journal. Who takes something holds `Capacity.taking` meanwhile: what is left
is looked at and taken in one piece.
"""

import asyncio
from collections.abc import Callable, Collection

import msgspec

from edgehold.api.vmand import CoresGrade, Mode
from edgehold.errors import BadRequestError, EdgeholdError, NoCapacityError
from vmand import placement
from vmand.backend import Backend, Grades, Trait
from vmand.model import Record, plain
from vmand.placement import Topology
from vmand.watch import with_grades

_GONE = "its memory is gone (was the host started anew?)"


class Capacity:
    """Cores and memory of this host."""

    def __init__(
        self,
        *,
        backend: Backend,
        records: Callable[[], Collection[Record]],
        pool: Collection[int],
        topology: Topology,
        memory_limit: int,
    ) -> None:
        self.taking = asyncio.Lock()
        self.pool = tuple(sorted(pool))
        self._backend = backend
        self._records = records
        self._topology = topology
        self._memory_limit = memory_limit
        self._owed: set[int] = set()

    def reserved_bytes(self) -> int:
        """What all partitions have together."""
        return sum(one.memory_bytes for one in self._records())

    def owe(self, partitions: Collection[int]) -> None:
        """Count the memory of these partitions as taken, although the host has it, until it was taken anew or that was
        refused: it is nobody else's."""
        self._owed.update(partitions)

    def memory_free(self, *, besides: Record | None = None) -> int:
        """Bytes that a partition could be given. ``besides``: one that would give its own back for it."""
        own = besides.memory_bytes if besides is not None else 0
        owed = sum(one.memory_bytes for one in self._records() if one.id in self._owed)
        free = self._backend.memory_free() - owed + own
        if self._memory_limit:
            free = min(free, self._memory_limit - self.reserved_bytes() + own)
        return max(free, 0)

    def cores_free(self) -> tuple[int, ...]:
        """Cores that a dedicated partition could be given."""
        return placement.free(self._topology, self.pool, self._taken())

    def place(self, mode: Mode, cores: int, *, besides: Record | None = None) -> tuple[tuple[int, ...], int | None]:
        """The cores and the node of a partition. ``besides``: one that would give its own back for them.

        Raises:
            NoCapacityError: there are too few for a dedicated one.
        """
        if mode is Mode.SHARED:
            return (), None
        return placement.place(self._topology, self.pool, self._taken(besides), cores)

    async def check_strict(self, mode: Mode) -> None:
        """Refuse to promise isolated cores where this host can't.

        Raises:
            BadRequestError: a shared partition has no cores of its own.
            NoCapacityError: says why it can't.
        """
        if mode is Mode.SHARED:
            raise BadRequestError("strict: a shared partition has no cores of its own; use mode dedicated")
        best = (await self._backend.host()).best
        if best.cores is not CoresGrade.ISOLATED:
            raise NoCapacityError(
                f"strict: cores can't be isolated on this host: {best.cores_reason}; vmanctl doctor says what would "
                "change it",
                retryable=False,
            )

    async def give_back(self, record: Record) -> None:
        """Give back what was reserved for a partition, cleared."""
        if Trait.SCRUB in self._backend.traits:
            await self._backend.scrub(record)
        await self._backend.release(record)

    async def exchange(self, before: Record, after: Record) -> Grades:
        """Give back what a partition has, take what it is to have. Whoever holds `taking` asks.

        Raises:
            EdgeholdError: it is not there; what the partition had may be gone, see `restocked`.
        """
        await self.give_back(before)
        try:
            return await self._backend.reserve(after)
        finally:
            self._owed.discard(before.id)

    async def with_memory(self, record: Record) -> Record:
        """A partition that is to be deployed, its memory taken anew where it is not there.

        Raises:
            EdgeholdError: it can't be.
        """
        if await self._backend.holds(record):
            self._owed.discard(record.id)
            return record
        async with self.taking:
            try:
                return with_grades(record, await self.exchange(record, record))
            except EdgeholdError as error:
                raise said_of(error, f"{_GONE}, and can't be taken anew: {error.message}") from error

    async def restocked(self, record: Record) -> Record:
        """A partition at rest with its memory, taken anew where it is not there; or with the reason why it is not.

        Whoever holds `taking` asks.

        Raises:
            EdgeholdError: it can't be known what is there.
        """
        if await self._backend.holds(record):
            self._owed.discard(record.id)
            return record
        try:
            grades = await self.exchange(record, record)
        except EdgeholdError as error:
            why = f"{_GONE}, and can't be taken anew: {error.message}; deploy tries again"
            return msgspec.structs.replace(record, reason=plain("; ".join(filter(None, [_before(record), why]))))
        return with_grades(msgspec.structs.replace(record, reason=_before(record)), grades)

    def _taken(self, besides: Record | None = None) -> frozenset[int]:
        own = None if besides is None else besides.id
        return frozenset(cpu for one in self._records() for cpu in one.cpus if one.id != own)


def said_of(error: EdgeholdError, text: str) -> EdgeholdError:
    """The same refusal in other words."""
    return type(error)(text, code=error.code, retryable=error.retryable)


def _before(record: Record) -> str:
    """What a record says beside that its memory is gone."""
    return record.reason.partition(_GONE)[0].removesuffix("; ")
