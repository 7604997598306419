"""Calls into /dev/vmanager, which may take long or for ever: each in a thread of its own, with a time limit.

A thread whose call does not return is left behind, and what it would have said is nobody's any more; the event loop
and other partitions go on. A partition is opened anew for each call, and verified by its uuid while it is open: an id
may be used again, an open partition never becomes another one.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar
from uuid import UUID

from edgehold.errors import TimedOutError
from edgehold.kernel.vmanager import Manager, PartitionHandle, Status
from vmand.backend.vmanager_errors import RefusedError, gone, is_gone
from vmand.model import Record

T = TypeVar("T")
Act = Callable[[PartitionHandle, Status], T]
"""What is done with an open partition, which has just had this status."""

# Far more than partitions could need: beyond it nothing is answered any more, and more threads would not help.
_MAX_THREADS = 128


class Calls:
    """Runs calls on one open device."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._threads = 0
        self._asked: dict[int, asyncio.Future[Status]] = {}

    def begin(self, work: Callable[[], T], name: str) -> asyncio.Future[T]:
        """Start a call; who waits for it gets its result or its exception, and nobody has to.

        Raises:
            TimedOutError: far too many calls hang already.
        """
        if self._threads >= _MAX_THREADS:
            raise TimedOutError(f"{name}: the firmware does not answer, {self._threads} calls wait for it")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            self._threads -= 1
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
                future.exception()  # seen, also where nobody waits any more

        def body() -> None:
            result, problem = None, None
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001 - it is raised where somebody waits
                problem = error
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(settle, result, problem)

        self._threads += 1
        threading.Thread(target=body, name=name, daemon=True).start()  # a hung one must not delay the daemon's end
        return future

    async def run(self, work: Callable[[], T], name: str, *, limit_s: float) -> T:
        """A call with a time limit.

        Raises:
            TimedOutError: it has not returned; it may still be carried out.
        """
        return await within(self.begin(work, name), name, limit_s)

    async def status(self, record: Record, *, limit_s: float) -> Status:
        """What the partition is now. One such call at a time is under way on each, however often it is asked for.

        Raises:
            GoneError: the firmware does not have it.
            RefusedError: the driver does not tell.
            TimedOutError: it does not answer.
        """
        name = f"status of partition {record.id}"
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit_s
        # Never the answer to an earlier question: it may have been given before the command that has just ended.
        while (before := self._asked.get(record.id)) is not None:
            await asyncio.wait({before}, timeout=max(deadline - loop.time(), 0))
            if not before.done():
                raise _silent(name)
        future = self._asked[record.id] = self.begin(self.on(record, lambda _handle, status: status), name)
        future.add_done_callback(lambda _future: self._asked.pop(record.id, None))
        return await within(future, name, max(deadline - loop.time(), 0))

    def on(self, record: Record, act: Act[T]) -> Callable[[], T]:
        """Work for a thread: act on the partition, once it is known to be this one.

        The work raises `GoneError`, and `RefusedError` for every other errno.
        """

        def work() -> T:
            status: Status | None = None
            try:
                with self._manager.open_partition(record.id) as handle:
                    status = handle.status()
                    if status.uuid != UUID(record.uuid):
                        raise gone(record.id)
                    try:
                        return act(handle, status)
                    except OSError:
                        with contextlib.suppress(OSError):
                            status = handle.status()
                        raise
            except OSError as error:
                if is_gone(error):
                    raise gone(record.id) from error
                raise RefusedError(error, status) from error

        return work

    def close(self) -> None:
        """Close the device. With calls under way it stays open: its number must not become another file's."""
        if not self._threads:
            self._manager.close()


async def within(future: asyncio.Future[T], name: str, limit_s: float) -> T:
    """The result of a call that was begun.

    Raises:
        TimedOutError: it has not returned; it may still be carried out.
    """
    await asyncio.wait({future}, timeout=limit_s)
    if not future.done():
        raise _silent(name)
    return future.result()


def _silent(name: str) -> TimedOutError:
    return TimedOutError(f"{name}: the firmware does not answer")
