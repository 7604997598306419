"""The range of uids that one vmand uses for its guests, claimed for the whole host.

What runs as a partition's user is ended with the partition, whoever started it: two vmands with one range would end
each other's guests. The claim is a lock on the range's bytes of one file (OFD lock, fcntl(2)), gone with the process.
"""

import contextlib
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from edgehold.errors import FailedError, UnavailableError

SLOTS = 1024
"""One for each partition that the settings allow at most ([limits] partitions)."""
LOCK = Path("/run/vmand-uids.lock")
# struct flock on 64-bit machines (fcntl(2)): type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")


def uids_from(first: int) -> range:
    """All uids that partitions may have (the setting ``uid_first``); none where guests run as vmand's own user."""
    return range(first, first + SLOTS) if first and os.geteuid() == 0 else range(0)


@contextlib.contextmanager
def claimed(uids: range, *, lock: Path = LOCK) -> Iterator[None]:
    """The range is ours until the block ends; an empty one needs no claim.

    Raises:
        UnavailableError: another vmand of this host has a part of it.
        FailedError: the file can't be used.
    """
    if not uids:
        yield
        return
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise FailedError(f"{lock}: {error.strerror}; vmand needs it to claim the users of its guests") from error
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid() or not stat.S_ISREG(found.st_mode):
            raise FailedError(f"{lock}: it is not ours (uid {found.st_uid}); look who made it, then remove it")
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, uids.start, len(uids), 0))
        except (BlockingIOError, PermissionError):
            raise UnavailableError(
                f"uid_first: another vmand of this host uses some of the uids {uids.start} to {uids.stop - 1}; "
                "give each a range of its own, 1024 apart",
                retryable=False,
            ) from None
        yield
    finally:
        os.close(fd)
