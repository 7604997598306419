"""Files that a caller names, opened with the caller's rights: vmand may read and write more than the caller may.

What was checked is what is opened, whatever the name means by then. Nothing is opened for reading before it is known to
be of the right kind, because opening a device or a FIFO may already do something.

The right is read from owner, group and mode bits. Access control lists are not looked at: what only they allow is
refused, and what only they forbid is granted where the mode bits' group class lets it through.
"""

import os
import stat
from pathlib import Path
from typing import NoReturn

from edgehold.errors import BadRequestError, DeniedError
from edgehold.wire.peer import Peer
from vmand.model import MIB, OpenFile, plain

_READ, _WRITE, _SEARCH = 4, 2, 1
_SHOWN = 200


def open_as(
    key: str, text: str, peer: Peer, *, write: bool = False, limit_bytes: int | None, block: bool = False
) -> OpenFile:
    """A regular file (with ``block`` also a block device) at an absolute path; whoever calls closes it.

    ``key``: the argument, for errors. ``write``: for reading and writing. ``limit_bytes``: 1 to so many are allowed;
    None: any size.

    Raises:
        BadRequestError: names the argument and the cure.
        DeniedError: the peer may not; the text does not tell whether there is such a file.
    """
    path = Path(text)
    if not path.is_absolute() or "\0" in text:
        raise BadRequestError(f"{key}: {text[:_SHOWN]!r} is not an absolute path; vmand has another working directory")
    name = plain(text, _SHOWN)
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)  # no right is used, nothing happens to what it is
    except (OSError, UnicodeEncodeError) as error:
        _refuse(key, name, peer, error, write=write)
    try:
        found = os.fstat(handle)
        if not _may(path, handle, found, peer, _READ | _WRITE if write else _READ):
            raise _denied(key, name, peer, write=write)
        if not (stat.S_ISREG(found.st_mode) or (block and stat.S_ISBLK(found.st_mode))):
            raise BadRequestError(f"{key}: {name} is not a regular file{' or block device' if block else ''}")
        check_size(key, name, found.st_size, limit_bytes)
        # The same inode again, now for use: whether vmand itself may. O_NONBLOCK: no lease of another delays us.
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(f"/proc/self/fd/{handle}", flags)
        os.set_blocking(fd, True)
        return OpenFile(fd=fd, name=name)
    except OSError as error:
        _refuse(key, name, peer, error, write=write)
    finally:
        os.close(handle)


def check_size(key: str, name: str, size: int, limit_bytes: int | None) -> None:
    """Refuse an empty file and one that is longer than the limit.

    Raises:
        BadRequestError: says how long it is and may be.
    """
    if limit_bytes is not None and not 0 < size <= limit_bytes:
        raise BadRequestError(f"{key}: {name} has {size} bytes; 1 to {limit_bytes // MIB} MiB are allowed")


def _refuse(key: str, name: str, peer: Peer, error: OSError | UnicodeEncodeError, *, write: bool) -> NoReturn:
    if peer.uid != 0:
        raise _denied(key, name, peer, write=write)
    reason = error.strerror if isinstance(error, OSError) else "no such name can be in a file system"
    raise BadRequestError(f"{key}: {name}: {reason}") from None


def _denied(key: str, name: str, peer: Peer, *, write: bool) -> DeniedError:
    return DeniedError(
        f"{key}: {name} can't be {'written' if write else 'read'} by uid {peer.uid}: there is no such file, or its "
        "mode or that of a directory above it does not allow it (access control lists are not looked at)"
    )


def _may(path: Path, handle: int, found: os.stat_result, peer: Peer, rights: int) -> bool:
    if peer.uid == 0:
        return True
    real = Path(f"/proc/self/fd/{handle}").readlink()
    # By both ways: the caller must be able to walk to where the name points as well as along the name itself.
    above = {*path.parents, *real.parents}
    return _allows(found, peer, rights) and all(_allows(os.stat(one), peer, _SEARCH) for one in above)  # noqa: PTH116


def _allows(found: os.stat_result, peer: Peer, rights: int) -> bool:
    """What the kernel does with mode bits (path_resolution(7)): the first class that fits decides."""
    if found.st_uid == peer.uid:
        shift = 6
    elif found.st_gid in peer.groups:
        shift = 3
    else:
        shift = 0
    return found.st_mode >> shift & rights == rights
