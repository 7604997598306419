"""What is in a firmware: its cores, vmand's partitions and strangers'. All of it blocks: it is for a thread."""

import contextlib
import fcntl
import threading
from collections.abc import Iterator, Mapping
from uuid import UUID

from edgehold.errors import UnavailableError
from edgehold.kernel import vmanager
from edgehold.kernel.vmanager import Cap, Flag, Info, Manager, PartitionHandle, Status
from vmand.backend.vmanager_errors import is_gone
from vmand.model import GIB
from vmand.placement import Topology

MARK = "vmand:"
"""How the names of our partitions in the firmware begin."""

_STRANGERS_S = 5.0
# A firmware that is not in a hurry.
_BASE_S, _CLEARED_BYTES_S = 10.0, GIB // 2


def open_alone(path: str) -> Manager:
    """The device, for one vmand: at a start what is ours and in no journal is removed, another vmand's would be too.

    Raises:
        UnavailableError: says why it can't be used.
    """
    with contextlib.ExitStack() as undo:
        try:
            manager = Manager.open(path)
            undo.callback(manager.close)
            fcntl.flock(manager.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnavailableError(f"vmanager_device: another vmand uses {path}; stop that one first") from None
        except OSError as error:
            raise UnavailableError(f"vmanager_device: {path}: {error.strerror}") from error
        undo.pop_all()
        return manager


def cores(path: str) -> tuple[Topology, frozenset[int]]:
    """The firmware's cores, and those that no stranger's partition has now.

    They may be offline for Linux, which then does not tell of their siblings and nodes: which of them may be given
    alone is the firmware's affair. A firmware that hangs does not delay a start for long: what strangers have is then
    learnt when it is refused.

    Raises:
        OSError: the device can't be used.
    """
    manager = Manager.open(path)
    known = frozenset(manager.info().cpus)
    taken: set[int] = set()
    problems: list[OSError] = []

    def look() -> None:
        try:
            for _, status in _all(manager):
                taken.update(() if status.name.startswith(MARK) else status.cpus)
        except OSError as error:
            problems.append(error)
        finally:
            manager.close()

    thread = threading.Thread(target=look, name="strangers", daemon=True)
    thread.start()
    thread.join(_STRANGERS_S)
    if problems:
        raise problems[0]
    return Topology(siblings={core: frozenset({core}) for core in known}, node={}), frozenset(known - taken)


def remove_unknown(manager: Manager, info: Info, ours: Mapping[int, UUID]) -> list[str]:
    """End and destroy those of our partitions that are none of these. Returns what came of each, in words.

    Raises:
        OSError: they can't be looked through.
    """
    said: list[str] = []
    for handle, status in _all(manager):
        if not status.name.startswith(MARK) or ours.get(status.id) == status.uuid:
            continue
        who = f"{status.id} ({status.name})"
        try:
            if status.state is not vmanager.State.READY:
                handle.shutdown(force=True)
            clear(handle, handle.status(), info, clearing_s(status.memory_bytes))
            manager.destroy(status.id)
            said.append(f"{who} is removed")
        except OSError as error:
            said.append(f"{who} can't be removed: {error.strerror}")
    return said


def clear(handle: PartitionHandle, status: Status, info: Info, limit_s: float) -> None:
    """Clear a READY partition's memory where a guest was in it and the firmware does not do so itself."""
    if Cap.CLEARS not in info.caps and Flag.DIRTY in status.flags:
        handle.scrub(timeout_ms=int(limit_s * 1000))


def clearing_s(memory_bytes: int) -> float:
    """What clearing so much memory may take."""
    return _BASE_S + memory_bytes / _CLEARED_BYTES_S


def _all(manager: Manager) -> Iterator[tuple[PartitionHandle, Status]]:
    """Every partition; the handle is closed at the next one."""
    one = 0
    while (following := manager.next(one)) is not None:
        one = following
        try:
            with manager.open_partition(one) as handle:
                yield handle, handle.status()
        except OSError as error:
            if not is_gone(error):
                raise
