"""The files behind a guest's disks: opened with the caller's rights, checked, and locked against a second use.

QEMU is given the open file, so that what was checked is what the guest gets. The lock is of the open file description
(fcntl(2), F_OFD_SETLK): it goes to QEMU with the descriptor, outlives vmand and ends with QEMU. Locks are advisory:
they keep guests apart, and QEMU's own tools away (which look for locks), but not a program that does not look.
"""

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator, Sequence

from edgehold.api.vmand import Disk
from edgehold.errors import BadRequestError, BadStateError, UnsupportedError
from edgehold.wire.peer import Peer
from vmand.backend import qcow2
from vmand.backend.rights import open_as
from vmand.model import OpenDisk, OpenFile

# struct flock on 64-bit machines (fcntl(2)): type, whence, start, length (0: to the end, wherever it will be), pid.
_FLOCK = struct.Struct("hhqqi4x")


@contextlib.contextmanager
def opened(disks: Sequence[Disk], *, limit: int, peer: Peer) -> Iterator[tuple[OpenDisk, ...]]:
    """The disks, open until the block ends. Block devices of the host are for root alone.

    Raises:
        BadRequestError: names the disk and the cure.
        DeniedError: the caller has not the rights to the file that the guest would have.
        BadStateError: it is in use, by another guest or twice by this one.
        UnsupportedError: its file system has no locks.
    """
    if len(disks) > limit:
        raise BadRequestError(f"disks: {len(disks)} are more than the {limit} that the settings allow ([limits] disks)")
    with contextlib.ExitStack() as stack:
        yield tuple(_open(stack, f"disks[{n}]", disk, peer) for n, disk in enumerate(disks))


def is_block(disk: OpenDisk) -> bool:
    """Whether it is a block device of the host."""
    return stat.S_ISBLK(os.fstat(disk.file.fd).st_mode)


def _open(stack: contextlib.ExitStack, key: str, disk: Disk, peer: Peer) -> OpenDisk:
    file = open_as(key, disk.path, peer, write=not disk.readonly, limit_bytes=None, block=peer.uid == 0)
    made = OpenDisk(file=file, format=disk.format, readonly=disk.readonly)
    with contextlib.ExitStack() as own:
        own.callback(os.close, file.fd)
        if is_block(made) and not disk.readonly:
            _claim(key, file)
        _lock(key, made)
        _check(key, made)
        stack.push(own.pop_all())
    return made


def _claim(key: str, file: OpenFile) -> None:
    """Open a block device anew for ourselves alone (open(2), O_EXCL): refused while mounted or part of a RAID."""
    try:
        fd = os.open(f"/proc/self/fd/{file.fd}", os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise BadRequestError(f"{key}: {file.name}: {error.strerror}") from error
        raise BadStateError(
            f"{key}: {file.name} is in use: mounted, or given to another; unmount it, or give it readonly"
        ) from None
    os.dup2(fd, file.fd, inheritable=False)
    os.close(fd)


def _lock(key: str, disk: OpenDisk) -> None:
    kind = fcntl.F_RDLCK if disk.readonly else fcntl.F_WRLCK
    name = disk.file.name
    try:
        fcntl.fcntl(disk.file.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno not in {errno.EAGAIN, errno.EACCES}:
            raise UnsupportedError(
                f"{key}: {name} can't be locked ({error.strerror}), so nothing would keep two guests from writing it; "
                "use a file system with locks"
            ) from error
        raise BadStateError(
            f"{key}: {name} is in use by another guest or twice by this one; "
            "a disk has one guest that writes, or several for which it is readonly"
        ) from None


def _check(key: str, disk: OpenDisk) -> None:
    fd, name = disk.file.fd, disk.file.name
    try:
        head, size = os.pread(fd, qcow2.HEADER_BYTES, 0), os.lseek(fd, 0, os.SEEK_END)
    except OSError as error:
        raise BadRequestError(f"{key}: {name}: {error.strerror}") from error
    if disk.format == "qcow2":
        qcow2.check(f"{key}: {name}", head, size)
        return
    if head.startswith(qcow2.MAGIC):
        # What a guest writes into the first sector of a raw disk must not change what the file is.
        raise BadRequestError(
            f"{key}: {name} is given as raw and begins like a qcow2 image; give the format qcow2 if it is one"
        )
    if not size or size % qcow2.SECTOR:
        raise BadRequestError(f"{key}: {name} has {size} bytes; a raw disk has a multiple of {qcow2.SECTOR}")
