"""The files that a guest is made of, checked before anything is started: a bad one is the caller's mistake."""

import os
import stat
from pathlib import Path

from edgehold.errors import BadRequestError, UnsupportedError
from vmand.model import MIB, Images, check_cmdline


def check(*, kernel: str, initrd: str, dtb: str, cmdline: str, limit_mib: int) -> Images:
    """Absolute, checked paths.

    Raises:
        BadRequestError: names the argument and the cure.
        UnsupportedError: a device tree for an x86 guest.
    """
    if dtb:
        raise UnsupportedError(
            "dtb: an x86 guest takes no device tree, its hardware is described by ACPI; leave it out on this host"
        )
    check_cmdline(cmdline)
    return Images(
        kernel=_file("kernel", kernel, limit_mib),
        initrd=_file("initrd", initrd, limit_mib) if initrd else "",
        cmdline=cmdline,
    )


def _file(key: str, text: str, limit_mib: int) -> str:
    path = Path(text)
    if not path.is_absolute() or "\0" in text:
        raise BadRequestError(f"{key}: {text[:200]!r} is not an absolute path; vmand has another working directory")
    try:
        # O_NONBLOCK: opening somebody's FIFO must not wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise BadRequestError(f"{key}: {text[:200]}: {error.strerror}") from None
    try:
        status = os.fstat(fd)
    finally:
        os.close(fd)
    if not stat.S_ISREG(status.st_mode):
        raise BadRequestError(f"{key}: {text[:200]} is not a regular file")
    if not 0 < status.st_size <= limit_mib * MIB:
        raise BadRequestError(f"{key}: {text[:200]} has {status.st_size} bytes; 1 to {limit_mib} MiB are allowed")
    return str(path)
