"""What nobody asks for: guests that end, QEMUs that hang, grades that are lost. What is heard is looked at.

Grades are read back every second, because the kernel does not tell of all losses (a remote cpuset partition becomes
invalid in silence). A lost isolation is tried to be had back now and then.
"""

import logging
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from edgehold.api.vmand import CoresGrade, State
from edgehold.clock import NS_PER_S, Clock
from edgehold.errors import EdgeholdError
from vmand.backend import Backend, Finding, Grades, Trait
from vmand.book import Book
from vmand.model import AFTER, LIVE, RESTORE, SUSPEND, Found, Record, plain
from vmand.tasks import Tasks

if TYPE_CHECKING:
    import asyncio

log = logging.getLogger(__name__)

GUEST_FAILED_ID = "5f1c35a0c7d64a0d9b0c9f6b6c0d7e21"
"""MESSAGE_ID of a guest that panicked or whose process died."""
GRADE_LOST_ID = "9c4be2d1a0c94f0fb1b6c40f2f8ce3aa"
"""MESSAGE_ID of a partition whose cores or memory are less its own than they were."""
HANGS_ID = "3e0d7b52f6a14d55a6f0a5a4a1c2d9e4"
"""MESSAGE_ID of a guest whose QEMU does not answer."""
GRADES_EVERY_S = 1.0
REPAIR_EVERY_S = 30.0
ASK_EVERY_S = 5.0
# Pauses between looks at a guest whose QEMU does not answer.
_LOOK_AGAIN_S, _LOOK_AGAIN_MAX_S = 0.5, 30.0
_EXPECTED = {
    State.DEPLOYED: Found.RUNNING,
    State.SUSPENDED: Found.PAUSED,
    SUSPEND: Found.PAUSED,
    RESTORE: Found.RUNNING,
}
"""By state, or by the command that is under way: what a guest does then."""
_LAST_LINES, _LAST_CHARACTERS = 20, 2000


class Watch:
    """Looks after guests that run."""

    def __init__(self, *, backend: Backend, book: Book, tasks: Tasks, clock: Clock) -> None:
        self.ends: Counter[str] = Counter()
        """How guests ended by themselves: ``off`` or ``failed``."""
        self._backend = backend
        self._book = book
        self._tasks = tasks
        self._clock = clock
        self._looking: set[str] = set()
        self._news: set[str] = set()
        self._more: set[str] = set()
        self._kept: dict[str, str] = {}
        self._tried_ns: dict[str, int] = {}

    def begin(self) -> None:
        """Start what goes on until the stop. What was recovered is known by now."""
        self._tasks.loop(self._keep_grading(), "grades")
        self._tasks.loop(self._keep_asking(), "ask guests")

    def changed(self, partition: int, run: str, found: Found | None = None) -> None:
        """Something happened to a guest. One who says so without end is looked at one time after the other."""
        record = self._current(partition, run)
        if record is not None and found is not None and found is _EXPECTED.get(record.pending or record.state):
            return  # it is what a command did, or is doing
        if run not in self._news:
            self._news.add(run)
            self._tasks.spawn(self._hear(partition, run), f"look at partition {partition}")
        else:
            self._more.add(run)

    async def _hear(self, partition: int, run: str) -> None:
        try:
            await self._see(partition, run)
            while run in self._more:
                self._more.discard(run)
                await self._see(partition, run)
        finally:
            self._news.discard(run)
            self._more.discard(run)

    def keep_reason(self, record: Record, reason: str) -> None:
        """What a command says of this run of a guest is not over when the guest is seen to be well."""
        self._kept = {one.run: self._kept[one.run] for one in self._book.records if one.run in self._kept}
        self._kept[record.run] = reason

    def look_later(self, record: Record) -> None:
        """Look at a guest that could not be looked at just now, until it can be."""
        work = self._see(record.id, record.run, pause_first=True)
        self._tasks.spawn(work, f"look later at partition {record.id}")

    async def reconcile(self, record: Record, finding: Finding) -> Record:
        """Write what was found. Asked for with the partition's lock held."""
        state = AFTER[finding.found]
        if state in LIVE:
            # A reason that a command gave stays; one that a look gave is over when the next one does not give it.
            given = record.reason if record.reason == self._kept.get(record.run) else ""
            reason = finding.reason or given
            if state is record.state and not record.pending and record.reason == reason:
                return record
            found = msgspec.structs.replace(record, state=state, pending="", reason=reason)
            return self._book.put_late(found)
        self.ends["off" if finding.found is Found.OFF else "failed"] += 1
        reason = finding.reason or ("the guest powered itself off" if state is State.READY else finding.found.value)
        last = ""
        if state is State.FAILED:
            fields = {"message_id": GUEST_FAILED_ID, "partition": record.id}
            log.error("partition %d failed: %s", record.id, reason, extra=fields)
            last = self._last_output(record)
            if finding.found is Found.GONE:
                has = "vmanctl console --tail has its last output, " if Trait.CONSOLE in self._backend.traits else ""
                reason += f"; {has}shutdown makes it READY"
        # Written before its process is ended: after a crash in between it would seem to have died.
        begun = msgspec.structs.replace(record, state=state, reason=reason, last_output=last, pending="")
        self._book.put_late(begun, quiet=True)
        try:
            await self._backend.end(record)
        except EdgeholdError as error:
            log.error("partition %d: %s", record.id, error)  # noqa: TRY400 - the text is the message
            self._book.hub.state(begun)
            return begun
        done = self._book.put_late(begun.at_rest(state, reason=reason), quiet=True)
        self._book.hub.state(done)
        return done

    async def regrade(self, record: Record, *, repair: bool = False) -> Record:
        """Read back what the partition has of its cores and memory, and write what is another than it was."""
        try:
            grades = await self._backend.grade(record, repair=repair)
        except (EdgeholdError, OSError) as error:  # OSError: of one of the kernel's files; no descriptor is left
            log.warning("partition %d: its grades can't be read: %s", record.id, error)
            return record
        if self._book.get(record.id) is not record or graded(record) == grades:
            return record  # where a command came in between, it is read again
        if _less(record, grades):
            fields = {"message_id": GRADE_LOST_ID, "partition": record.id}
            log.warning("partition %d: %s", record.id, _told(grades), extra=fields)
        return self._book.put_late(with_grades(record, grades))

    async def _keep_grading(self) -> None:
        while not await self._tasks.pause(GRADES_EVERY_S):
            for record in self._book.records:
                if not record.pending:
                    await self.regrade(record, repair=self._repair_is_due(record))

    def _repair_is_due(self, record: Record) -> bool:
        """A grade below what this partition had once, or could have: tried again now and then."""
        if record.state not in LIVE or not record.cpus or record.cores_grade is CoresGrade.ISOLATED:
            self._tried_ns.pop(record.run, None)
            return False
        now = self._clock.monotonic_ns()
        last = self._tried_ns.setdefault(record.run, now)
        if now - last < REPAIR_EVERY_S * NS_PER_S:
            return False
        self._tried_ns = {one.run: self._tried_ns[one.run] for one in self._book.records if one.run in self._tried_ns}
        self._tried_ns[record.run] = now
        return True

    async def _keep_asking(self) -> None:
        """A QEMU that hangs says nothing: it is asked. Each by its own task, so that one does not delay the others."""
        asked: dict[str, asyncio.Task[None]] = {}
        while not await self._tasks.pause(ASK_EVERY_S):
            asked = {run: task for run, task in asked.items() if not task.done()}
            for record in self._book.records:
                if record.state in LIVE and record.run not in asked and record.run not in self._looking:
                    name = f"ask partition {record.id}"
                    asked[record.run] = self._tasks.spawn(self._see(record.id, record.run), name)

    async def _see(self, partition: int, run: str, *, pause_first: bool = False) -> None:
        """Look, and write what was found. A QEMU that hangs is asked until it answers, and no command waits for that:
        what it could not say once (the guest is off, or panicked) it says only when asked."""
        if run in self._looking:
            return
        self._looking.add(run)
        try:
            pause_s = _LOOK_AGAIN_S
            if pause_first and await self._tasks.pause(pause_s):
                return
            while (record := self._current(partition, run)) is not None:
                try:
                    await self._backend.look(record)
                    break
                except EdgeholdError as error:
                    self._cannot_look(record, error)
                if await self._tasks.pause(pause_s):
                    return
                pause_s = min(pause_s * 2, _LOOK_AGAIN_MAX_S)
        finally:
            self._looking.discard(run)
        if record is None:
            return
        async with self._book.lock(partition):
            record = self._current(partition, run)
            if record is None:
                return  # a command has dealt with it meanwhile
            try:
                await self.reconcile(record, await self._backend.look(record))
            except EdgeholdError as error:  # it answered a moment ago
                log.warning("partition %d can't be looked at: %s", partition, error)

    def _cannot_look(self, record: Record, error: EdgeholdError) -> None:
        reason = plain(error.message)
        if record.pending or record.reason == reason:
            return
        fields = {"message_id": HANGS_ID, "partition": record.id}
        log.warning("partition %d can't be looked at: %s", record.id, error, extra=fields)
        if self._book.get(record.id) is record:
            self._book.put_late(msgspec.structs.replace(record, reason=reason))

    def _current(self, partition: int, run: str) -> Record | None:
        """The partition, as long as this run of its guest is the present one."""
        record = self._book.get(partition)
        return record if record is not None and record.run == run and record.state in LIVE else None

    def _last_output(self, record: Record) -> str:
        lines = self._backend.console(record).splitlines()[-_LAST_LINES:]
        return "\n".join(filter(None, map(plain, lines)))[-_LAST_CHARACTERS:]


def graded(record: Record) -> Grades:
    """The grades that a record holds."""
    return Grades(
        cores=record.cores_grade,
        cores_reason=record.cores_reason,
        memory=record.memory_grade,
        memory_reason=record.memory_reason,
    )


def with_grades(record: Record, grades: Grades) -> Record:
    """The same partition with these grades."""
    return msgspec.structs.replace(
        record,
        cores_grade=grades.cores,
        cores_reason=plain(grades.cores_reason),
        memory_grade=grades.memory,
        memory_reason=plain(grades.memory_reason),
    )


def _less(record: Record, grades: Grades) -> bool:
    """Whether something was lost; the enumerations stand best first."""
    for old, new in ((record.cores_grade, grades.cores), (record.memory_grade, grades.memory)):
        order = list(type(old)) if old is not None else []
        if old is not None and new is not None and order.index(new) > order.index(old):
            return True
    return False


def _told(grades: Grades) -> str:
    cores = f"cores {grades.cores.value}" if grades.cores else ""
    memory = f"memory {grades.memory.value}" if grades.memory else ""
    parts = [(cores, grades.cores_reason), (memory, grades.memory_reason)]
    return "; ".join(f"{what} ({why})" if why else what for what, why in parts if what)
