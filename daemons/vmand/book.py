"""The partitions and their journal: each change written down, one command's turn at a time on each partition.

It must not know what a command does.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec

from edgehold.errors import BadStateError, EdgeholdError, FailedError, NotFoundError
from vmand import model
from vmand.events import Hub
from vmand.model import DEPLOY, DESTROY, LIVE, LONG, OF_A_RUN, SHUTDOWN, TABLE, Record
from vmand.store import NO_ANNOTATIONS, Store

log = logging.getLogger(__name__)

_PATIENCE_S = 5.0
"""How long a command waits for the one before it on the same partition."""


class Book:
    """What is known of every partition, in memory and on disk."""

    def __init__(self, *, store: Store, hub: Hub, patience_s: float = _PATIENCE_S) -> None:
        self.store = store
        self.hub = hub
        self._patience_s = patience_s
        self._records: dict[int, Record] = {}
        self._locks: dict[int, asyncio.Lock] = {}
        self._unwritten: dict[int, Record] = {}

    @property
    def records(self) -> list[Record]:
        """All partitions, by id."""
        return [self._records[one] for one in sorted(self._records)]

    def get(self, partition: int) -> Record | None:
        """One partition, if there is one of this id."""
        return self._records.get(partition)

    def record(self, which: int | str) -> Record:
        """One partition, by its id or its name. A text of digits is an id.

        Raises:
            NotFoundError: there is none.
        """
        if isinstance(which, str) and not (which.isascii() and which.isdigit()):
            for one in self._records.values():
                if one.name == which:
                    return one
            raise NotFoundError(f"there is no partition {which[:64]!r}; list shows ids and names")
        found = self._records.get(int(which))
        if found is None:
            raise NotFoundError(f"there is no partition {which}")
        return found

    @contextlib.asynccontextmanager
    async def turn(self, partition: int, command: str, **changes: Any) -> AsyncIterator[Record]:
        """One command's turn on a partition: legal in its state, its intent written. A refusal leaves no trace.

        Raises:
            BadStateError: the state does not allow it, or another command takes longer than we wait for it.
        """
        lock = self.lock(partition)
        if not lock.locked():
            await lock.acquire()
        else:
            try:
                async with asyncio.timeout(self._patience_s):
                    await lock.acquire()
            except TimeoutError:
                self.refuse_busy(partition, command)
        try:
            before = self.record(partition)
            TABLE.check(command, before.state, who=str(partition))
            intent = msgspec.structs.replace(before, pending=command, **changes)
            self.store.save(intent, synced=command not in OF_A_RUN)
            self._records[partition] = intent
            if command in LONG:
                self.hub.state(intent)
            try:
                yield intent
            except BaseException as error:
                # Cut off by a stop: the intent stays in the journal, and the next start settles it.
                if isinstance(error, EdgeholdError) and self.get(partition) is not None:
                    self.put_late(before, quiet=command not in LONG)
                raise
        finally:
            lock.release()

    def refuse_if_busy(self, partition: int, command: str) -> None:
        """Refuse a command that is not to wait for the one that is under way.

        Raises:
            BadStateError: there is one; it may be tried again.
        """
        if self.record(partition).pending:
            self.refuse_busy(partition, command)

    def refuse_busy(self, partition: int, command: str) -> None:
        """Refuse a command because of the one that is under way.

        Raises:
            BadStateError: always; it may be tried again.
        """
        record = self.record(partition)
        doing = f"{record.pending} is under way" if record.pending else "it is being looked at"
        raise BadStateError(f"partition {partition} is BUSY: {doing}; {command} can be tried again", retryable=True)

    def lock(self, partition: int) -> asyncio.Lock:
        """Whose turn it is on a partition; recovery takes turns too, because its guests speak up meanwhile."""
        self.record(partition)
        return self._locks.setdefault(partition, asyncio.Lock())

    def hold(self, record: Record) -> None:
        """Take a partition in, as it is in the journal."""
        self._records[record.id] = record
        self.hub.state(record)

    def hold_unsettled(self, record: Record) -> None:
        """Take in a partition whose cut-off command could not be settled: no command is under way any more, and the
        journal keeps what was intended for the next start."""
        pending = record.pending if record.pending in {DEPLOY, SHUTDOWN, DESTROY} else ""
        self.put_late(msgspec.structs.replace(record, pending=pending), quiet=True)
        self.hold(msgspec.structs.replace(record, pending=""))

    def put(self, record: Record, *, annotations: Mapping[str, str | None] = NO_ANNOTATIONS) -> Record:
        """Write a partition's new record, and in the same step what is to be annotated (None removes); tell of both.

        Raises:
            BadRequestError: the annotations are malformed or, with those that are there by now, too much.
            FailedError: it can't be written; nothing is changed.
        """
        if annotations:
            model.annotated(self.store.annotations(record.id), annotations)
        self.store.save(record, annotations=annotations)
        kept = self._keep(record)
        if annotations:
            self.hub.annotated(kept)
        return kept

    def put_late(self, record: Record, *, quiet: bool = False) -> Record:
        """Write what has happened already. If that can't be written, it stands all the same: the intent is in the
        journal, and a restart comes to the same outcome from it."""
        before = self._records.get(record.id)
        of_a_run = before is not None and before.pending in OF_A_RUN and record.state in LIVE
        try:
            self.store.save(record, synced=not of_a_run)
        except FailedError as error:
            log.error("partition %d: the outcome is not written: %s", record.id, error)  # noqa: TRY400
        return self._keep(record, quiet=quiet)

    def forget(self, record: Record) -> None:
        """A partition is gone."""
        try:
            self.store.delete(record.id)
        except FailedError as error:
            log.error("partition %d: its end is not written: %s", record.id, error)  # noqa: TRY400
            self._unwritten[record.id] = record
        self._locks.pop(record.id, None)
        if self._records.pop(record.id, None) is not None:
            self.hub.gone(record.id)

    def claims(self) -> list[Record]:
        """The partitions whose slots and uuids can't be given. One whose end could not be written is among them: until
        it is, the next start ends whatever its user runs, and removes the memory of its uuid."""
        for partition in list(self._unwritten):
            with contextlib.suppress(FailedError):
                self.store.delete(partition)
                del self._unwritten[partition]
        return [*self._records.values(), *self._unwritten.values()]

    def annotate(self, partition: int, changes: Mapping[str, str | None]) -> None:
        """Keep texts with a partition; None removes one. It is no command: one that is under way is not waited for.

        Raises:
            BadRequestError: they are malformed or too much.
            FailedError: they can't be written; nothing is changed.
        """
        record = self.record(partition)
        before = self.store.annotations(partition)
        if model.annotated(before, changes) != before:
            self.store.annotate(partition, changes)
            self.hub.annotated(record)

    def _keep(self, record: Record, *, quiet: bool = False) -> Record:
        old = self._records.get(record.id)
        self._records[record.id] = record
        if not quiet and old is not None:
            if (old.state, old.pending, old.reason, old.boot_count) != (
                record.state,
                record.pending,
                record.reason,
                record.boot_count,
            ):
                self.hub.state(record)
            if (old.cores_grade, old.memory_grade) != (record.cores_grade, record.memory_grade) and record.run:
                self.hub.grade(record)
        return record
