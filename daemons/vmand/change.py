"""A READY partition's other name or other share of the host: all of it or nothing.

What it has is given back before the rest is taken: both at once may be more than there is. The journal has the old
record until the new one holds, so that a start of vmand takes back what it says (recovery.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import msgspec

from edgehold.api.vmand import Mode
from edgehold.errors import EdgeholdError
from vmand import model
from vmand.backend import Trait
from vmand.capacity import said_of
from vmand.model import Record
from vmand.service import Service
from vmand.watch import with_grades


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a partition is to be instead; None stays as it is."""

    name: str | None = None
    cores: int | None = None
    memory_bytes: int | None = None
    mode: Mode | None = None
    secure: bool | None = None
    strict: bool | None = None
    annotations: Mapping[str, str | None] = field(default_factory=dict)

    def shares(self) -> dict[str, Any]:
        """What is to be another in the partition's record."""
        names = (one.name for one in fields(self) if one.name != "annotations")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


async def change_partition(service: Service, partition: int, wanted: Change) -> Record:
    """Change a READY partition; what is not wanted otherwise stays.

    Raises:
        EdgeholdError: it can't be; the text says so where the partition could not be left as it was.
    """
    book, capacity = service.book, service.capacity
    async with book.turn(partition, model.CHANGE) as before, capacity.taking:
        after = await _as_wanted(service, before, wanted)
        model.annotated(service.annotations(partition), wanted.annotations)
        anew = not service.backend.keeps(before, after)
        if anew:
            model.check_memory(after.memory_bytes, capacity.memory_free(besides=before))
        try:
            if anew:
                grades = await capacity.exchange(before, after)
                after = msgspec.structs.replace(with_grades(after, grades), reason="")
            return book.put(msgspec.structs.replace(after, pending=""), annotations=wanted.annotations)
        except EdgeholdError as error:
            if not anew:
                raise
            failure, back = error, await _taken_back(service, before, after)
            book.put_late(msgspec.structs.replace(back, pending=""))
    raise said_of(failure, f"{failure.message}; {back.reason or 'the partition is as it was'}")


async def _as_wanted(service: Service, before: Record, wanted: Change) -> Record:
    """What a partition is to be.

    Raises:
        EdgeholdError: it can't be, as a create would be refused.
    """
    after = msgspec.structs.replace(before, **wanted.shares())
    if after.name != before.name:
        model.check_name(after.name, {one.name for one in service.records})
    if wanted.secure:
        service.require(Trait.SECURE, "secure")
    if wanted.mode is Mode.SHARED:
        service.require(Trait.SHARED, "mode shared")
    if after.strict and (after.strict, after.mode) != (before.strict, before.mode):
        await service.capacity.check_strict(after.mode)
    if (after.cores, after.mode, after.secure) != (before.cores, before.mode, before.secure):
        cpus, node = service.capacity.place(after.mode, after.cores, besides=before)
        after = msgspec.structs.replace(after, cpus=cpus, node=node)
    return after


async def _taken_back(service: Service, before: Record, after: Record) -> Record:
    """A partition whose change failed, with what it had; or with the reason why it has no memory now."""
    try:
        if not service.backend.keeps(after, before):
            await service.capacity.give_back(after)
        return await service.capacity.restocked(before)
    except EdgeholdError as error:
        return msgspec.structs.replace(before, reason=model.plain(f"its memory can't be had back: {error.message}"))
