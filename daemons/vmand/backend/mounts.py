"""What is mounted where, as /proc/self/mountinfo tells (proc_pid_mountinfo(5)). Only this process' own view counts."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from edgehold.errors import FailedError

MOUNTINFO = Path("/proc/self/mountinfo")
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One mount."""

    point: str
    kind: str
    """The file system's type, as ``tmpfs``."""
    device: int
    """``st_dev`` of what is on it (stat(2))."""
    options: frozenset[str]
    """Of this mount and of the file system behind it, as ``ro`` or ``size=1024k``."""

    @property
    def on_top(self) -> bool:
        """Whether a path below its mount point leads to it, or to something that was mounted over it later."""
        try:
            return os.stat(self.point).st_dev == self.device  # noqa: PTH116 - the text is the kernel's
        except OSError:
            return False


def parse(text: str) -> list[Mount]:
    """All mounts, in the kernel's order. Of several at one place the last is on top."""
    found = []
    for line in text.splitlines():
        fields = line.split(" ")
        # Optional fields of any number stand before a single hyphen; type, source and options of the file system after.
        end = fields.index("-", 6)
        major, _colon, minor = fields[2].partition(":")
        found.append(
            Mount(
                # The kernel writes space, tab, newline and backslash in octal.
                point=_OCTAL.sub(lambda one: chr(int(one[1], 8)), fields[4]),
                kind=fields[end + 1],
                device=os.makedev(int(major), int(minor)),
                options=frozenset(f"{fields[5]},{fields[end + 3]}".split(",")),
            )
        )
    return found


def mounts(mountinfo: Path = MOUNTINFO) -> list[Mount]:
    """All mounts of this process' namespace below its root. Raises `OSError`."""
    return parse(mountinfo.read_text(encoding="utf-8", errors="surrogateescape"))


def mount_of(path: Path, mountinfo: Path = MOUNTINFO) -> Mount | None:
    """The mount that the path is on, or would be made on; None where the kernel shows none. Raises `OSError`."""
    wanted = Path(os.path.realpath(path))
    best: Mount | None = None
    for one in mounts(mountinfo):
        if wanted.is_relative_to(one.point) and (best is None or len(one.point) >= len(best.point)):
            best = one
    return best


def filesystem(path: Path, mountinfo: Path = MOUNTINFO) -> str:
    """The type of the file system that the path is on, or would be made on; empty where it can't be told."""
    found = mount_of(path, mountinfo)
    return found.kind if found else ""


def active_swaps(swaps: Path = Path("/proc/swaps")) -> tuple[str, ...]:
    """The swap areas in use (proc_swaps(5)); none where the kernel has no swap."""
    try:
        lines = swaps.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise FailedError(f"{swaps}: {error.strerror}") from error
    return tuple(line.split()[0] for line in lines[1:] if line.strip())
