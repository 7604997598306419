"""What an errno of /dev/vmanager means for a person: the same code and, where QEMU can fail so too, the same text.

Source of what each one says: ext/uapi/vmanager.h. Pure.
"""

import errno
import os

from edgehold.api.vmand import State
from edgehold.errors import (
    BadRequestError,
    BadStateError,
    EdgeholdError,
    FailedError,
    NoCapacityError,
    TimedOutError,
    UnsupportedError,
)
from edgehold.kernel import vmanager
from edgehold.kernel.vmanager import Info, Status
from vmand.backend import Finding
from vmand.model import MIB, TABLE, Found, Record
from vmand.placement import as_list

_FOUND = {
    vmanager.State.DEPLOYED: Found.RUNNING,
    vmanager.State.SUSPENDED: Found.PAUSED,
    vmanager.State.READY: Found.OFF,
    vmanager.State.FAILED: Found.FAILED,
}

_VERBS: dict[int, tuple[type[EdgeholdError], str]] = {
    errno.ETIMEDOUT: (TimedOutError, "the firmware did not answer in time"),
    errno.EIO: (FailedError, "the firmware refused it{code}"),
    errno.ECANCELED: (FailedError, "it was ended by force meanwhile"),
    errno.EOPNOTSUPP: (UnsupportedError, "not supported on this back end: the firmware can't do it"),
    errno.ENOSPC: (
        BadRequestError,
        "the files don't fit into the partition's {memory} MiB; create it with a larger memsize",
    ),
    errno.ENOEXEC: (BadRequestError, "the firmware does not take one of the files for what it should be"),
}


class GoneError(FailedError):
    """The firmware has no such partition, or a stranger's under the same id."""


class RefusedError(Exception):
    """The driver refused a call; ``status`` is what the partition was then, None where it is not known."""

    def __init__(self, error: OSError, status: Status | None = None) -> None:
        super().__init__(str(error))
        self.number = error.errno or errno.EIO
        self.status = status


def gone(partition: int) -> GoneError:
    """There is no such partition any more."""
    return GoneError(
        f"partition {partition} is gone in the firmware (was the host started anew?); shut it down and deploy it again"
    )


def is_gone(error: OSError) -> bool:
    """Whether a call says that the partition is gone."""
    return error.errno in {errno.ENOENT, errno.ENODEV}


def of_verb(refused: RefusedError, command: str, record: Record) -> EdgeholdError:
    """A refused call on a partition. ``command`` as the table of states names it, or a word for what was done."""
    status = refused.status
    if refused.number in {errno.EBUSY, errno.EBADFD}:
        return _of_state(command, record, status)
    kind, text = _VERBS.get(refused.number, (FailedError, "the firmware's driver refused it: {reason}"))
    code = f" (its code {status.fw_code})" if status is not None and status.fw_code else ""
    said = text.format(code=code, reason=os.strerror(refused.number), memory=record.memory_bytes // MIB)
    return kind(f"{command}: {said}")


def of_create(refused: RefusedError, record: Record, info: Info) -> EdgeholdError:
    """A partition that could not be made; ``info`` is what the firmware had then."""
    size, free = record.memory_bytes // MIB, info.memory_free // MIB
    match refused.number:
        case errno.EEXIST:
            return NoCapacityError(
                f"the firmware has a partition {record.id} that is not vmand's; create another, which gets another id"
            )
        case errno.EBUSY:
            return NoCapacityError(
                f"cores: somebody else's partition has one of the cores {as_list(record.cpus)} in the firmware; "
                "destroy it, or leave its cores out of pool.cores"
            )
        case errno.ENOSPC if info.num_partitions >= info.max_partitions:
            return NoCapacityError(f"the firmware has room for {info.max_partitions} partitions; destroy one first")
        case errno.ENOSPC:
            return NoCapacityError(
                f"memory: {size} MiB are wanted in one piece and the firmware has none; {free} MiB are left in all"
            )
        case errno.EOPNOTSUPP:
            return UnsupportedError("create-partition: not supported on this back end: the firmware can't do it")
        case number:
            return FailedError(f"create-partition: the firmware's driver refused it: {os.strerror(number)}")


def finding(record: Record, status: Status) -> Finding:
    """What a guest does that was deployed.

    Raises:
        TimedOutError: the firmware is in between; it has to be asked again.
    """
    found = _FOUND.get(status.state)
    if found is None:
        raise TimedOutError(f"partition {record.id}: the firmware is {status.state.name} with it")
    return Finding(found=found, reason=_failure(status) if found is Found.FAILED else "")


def _failure(status: Status) -> str:
    match status.last_error:
        case errno.ENOTRECOVERABLE:
            return "the guest crashed"
        case errno.ETIMEDOUT:
            return "the firmware did not answer in time and gave it up"
        case 0 | errno.EIO:
            return f"the firmware gave it up (its code {status.fw_code})"
        case number:
            return f"the firmware gave it up: {os.strerror(number)}"


def _of_state(command: str, record: Record, status: Status | None) -> BadStateError:
    """The firmware is in another state than the journal: what was not heard yet is said as if it had been."""
    state = status.state.name if status is not None else ""
    if state in {State.READY.name, State.DEPLOYED.name, State.SUSPENDED.name, State.FAILED.name}:
        try:
            if command in TABLE.table:
                TABLE.check(command, State[state], who=str(record.id))
        except BadStateError as error:
            return error
    doing = f"the firmware has it {state or 'in another state'}"
    return BadStateError(f"partition {record.id} is BUSY: {doing}; {command} can be tried again", retryable=True)
