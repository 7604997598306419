"""The files that a guest is made of, checked before anything is started: a bad one is the caller's mistake.

vmand and QEMU may read more than the caller may. So the caller's right is asked for, and what was checked is what QEMU
reads: it is given the open file (``/proc/PID/fd/N``), not a name that may mean another file by then. Nothing is opened
for reading before it is known to be a regular file, because opening a device or a FIFO may already do something.

The right is read from owner, group and mode bits. Access control lists are not looked at: what only they allow is
refused, and what only they forbid is granted where the mode bits' group class lets it through.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from edgehold.errors import BadRequestError, DeniedError, FailedError, UnsupportedError
from edgehold.wire.peer import Peer
from vmand.model import MIB, Images, check_cmdline

_READ, _SEARCH = 4, 1


@contextlib.contextmanager
def opened(*, kernel: str, initrd: str, dtb: str, cmdline: str, limit_mib: int, peer: Peer) -> Iterator[Images]:
    """Images whose paths are open files, until the block ends. What QEMU says of them has the caller's names again.

    Raises:
        BadRequestError: names the argument and the cure.
        DeniedError: the peer may not read a file; the text does not tell whether it exists.
        UnsupportedError: a device tree for an x86 guest.
    """
    if dtb:
        raise UnsupportedError(
            "dtb: an x86 guest takes no device tree, its hardware is described by ACPI; leave it out on this host"
        )
    check_cmdline(cmdline)
    with contextlib.ExitStack() as stack:
        names: dict[str, str] = {}
        for key, text in (("kernel", kernel), ("initrd", initrd)):
            if key == "kernel" or text:
                fd = _open(key, text, limit_mib, peer)
                stack.callback(os.close, fd)
                # Not /proc/self: QEMU, as our child or as a unit of systemd, has the rights to open ours.
                names[key] = f"/proc/{os.getpid()}/fd/{fd}"
        try:
            yield Images(kernel=names["kernel"], initrd=names.get("initrd", ""), cmdline=cmdline)
        except FailedError as error:
            message = error.message
            for name, text in ((names["kernel"], kernel), (names.get("initrd", ""), initrd)):
                message = message.replace(name, text) if name else message
            raise FailedError(message) from error


def _open(key: str, text: str, limit_mib: int, peer: Peer) -> int:
    path = Path(text)
    if not path.is_absolute() or "\0" in text:
        raise BadRequestError(f"{key}: {text[:200]!r} is not an absolute path; vmand has another working directory")
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)  # no right is used, nothing happens to what it is
    except OSError as error:
        _refuse(key, text, peer, error)
    try:
        found = os.fstat(handle)
        if not _may_read(path, handle, found, peer):
            raise _denied(key, text, peer)
        if not stat.S_ISREG(found.st_mode):
            raise BadRequestError(f"{key}: {text[:200]} is not a regular file")
        if not 0 < found.st_size <= limit_mib * MIB:
            raise BadRequestError(f"{key}: {text[:200]} has {found.st_size} bytes; 1 to {limit_mib} MiB are allowed")
        # The same inode again, now for reading: whether vmand itself may. O_NONBLOCK: no lease of another delays us.
        return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        _refuse(key, text, peer, error)
    finally:
        os.close(handle)


def _refuse(key: str, text: str, peer: Peer, error: OSError) -> NoReturn:
    if peer.uid != 0:
        raise _denied(key, text, peer)
    raise BadRequestError(f"{key}: {text[:200]}: {error.strerror}") from None


def _denied(key: str, text: str, peer: Peer) -> DeniedError:
    return DeniedError(
        f"{key}: {text[:200]} can't be read by uid {peer.uid}: there is no such file, or its mode or that of a "
        "directory above it does not allow it (access control lists are not looked at)"
    )


def _may_read(path: Path, handle: int, found: os.stat_result, peer: Peer) -> bool:
    if peer.uid == 0:
        return True
    real = Path(f"/proc/self/fd/{handle}").readlink()
    # By both ways: the caller must be able to walk to where the name points as well as along the name itself.
    above = {*path.parents, *real.parents}
    return _allows(found, peer, _READ) and all(_allows(os.stat(one), peer, _SEARCH) for one in above)  # noqa: PTH116


def _allows(found: os.stat_result, peer: Peer, right: int) -> bool:
    """What the kernel does with mode bits (path_resolution(7)): the first class that fits decides."""
    if found.st_uid == peer.uid:
        shift = 6
    elif found.st_gid in peer.groups:
        shift = 3
    else:
        shift = 0
    return bool(found.st_mode >> shift & right)
