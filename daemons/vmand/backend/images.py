"""The files that a guest is made of, checked before anything is started: a bad one is the caller's mistake.

A file is a path, opened with the caller's rights (see `rights`), or a descriptor that came with the request: then the
caller has opened it, and nothing is left to ask but what it is. Either way QEMU gets a copy of what was open here.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from edgehold.errors import BadRequestError, FailedError, UnsupportedError
from edgehold.wire.peer import Peer
from edgehold.wire.stream import duplicates
from vmand.backend.kernelimage import X86_64, architecture
from vmand.backend.rights import check_size, open_as
from vmand.model import MIB, Images, OpenFile, check_cmdline


@contextlib.contextmanager
def opened(
    *,
    kernel: str | int,
    initrd: str | int | None,
    dtb: str | int | None,
    cmdline: str,
    fds: Sequence[int],
    limit_mib: int,
    peer: Peer,
) -> Iterator[Images]:
    """Images whose files are open until the block ends. A number is an index into ``fds``, which stay the caller's.

    Raises:
        BadRequestError: names the argument and the cure.
        DeniedError: the peer may not read a file; the text does not tell whether it exists.
        UnsupportedError: a device tree for an x86 guest.
    """
    check_cmdline(cmdline)
    given = {"kernel": kernel, "initrd": initrd, "dtb": dtb}
    wanted = {key: one for key, one in given.items() if key == "kernel" or one not in {None, ""}}
    _check_indices({key: one for key, one in wanted.items() if isinstance(one, int)}, len(fds))
    with contextlib.ExitStack() as stack:
        files: dict[str, OpenFile] = {}
        arch = ""
        for key, one in wanted.items():
            if key == "dtb" and arch == X86_64:
                raise UnsupportedError(
                    "dtb: an x86 guest takes no device tree, its hardware is described by ACPI; leave it out"
                )
            if isinstance(one, int):
                files[key] = _duplicate(key, one, fds[one], limit_mib * MIB)
            else:
                files[key] = open_as(key, one or "", peer, limit_bytes=limit_mib * MIB)
            stack.callback(os.close, files[key].fd)
            if key == "kernel":
                arch = architecture(files[key])
        yield Images(
            kernel=files["kernel"], initrd=files.get("initrd"), dtb=files.get("dtb"), cmdline=cmdline, arch=arch
        )


@contextlib.contextmanager
def named(copies: Mapping[Path, OpenFile]) -> Iterator[None]:
    """What fails in the block and names one of the copies has the caller's name instead."""
    try:
        yield
    except FailedError as error:
        message = error.message
        for path, file in copies.items():
            message = message.replace(str(path), file.name)
        raise FailedError(message) from error


def _check_indices(named_ones: Mapping[str, int], count: int) -> None:
    users: dict[int, str] = {}
    for key, index in named_ones.items():
        if not 0 <= index < count:
            came = f"{count} came with the request, counted from 0" if count else "none came with the request"
            raise BadRequestError(f"{key}: there is no descriptor {index}: {came}")
        if index in users:
            raise BadRequestError(f"{key}: descriptor {index} is {users[index]} already; send one for each")
        users[index] = key
    if unused := sorted(set(range(count)) - users.keys()):
        raise BadRequestError(
            f"descriptor {unused[0]} came with the request and no argument names it; give its number as kernel, initrd "
            "or dtb, or do not send it"
        )


def _duplicate(key: str, index: int, fd: int, limit_bytes: int) -> OpenFile:
    name = f"descriptor {index}"
    try:
        flags, found = fcntl.fcntl(fd, fcntl.F_GETFL), os.fstat(fd)
    except OSError as error:  # a file system of the caller's own may refuse even that
        raise BadRequestError(f"{key}: {name} can't be looked at: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise BadRequestError(f"{key}: {name} is not a regular file or memfd; a pipe, socket or device can't be copied")
    if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_WRONLY:
        raise BadRequestError(f"{key}: {name} is not open for reading")
    check_size(key, name, found.st_size, limit_bytes)
    (kept,) = duplicates((fd,))
    return OpenFile(fd=kept, name=name)
