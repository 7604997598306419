"""Whom deadlined never holds, whoever asks: by user, by unit or cgroup, by name. Looked at when a thread is found.

Patterns are shell globs (fnmatch(3): ``*``, ``?``, ``[…]``), and upper case differs from lower. A name is what a thread
calls itself and may change: a list of names keeps accidents away, not a program that wants to be held.
"""

import fnmatch
import pwd
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from edgehold.kernel import cgroup, procfs

Pattern = tuple[str, re.Pattern[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DenySettings:
    """The table ``deny`` of the settings: globs; whoever matches one is refused."""

    users: tuple[str, ...] = ()
    """Names or numbers of the users that a process runs as, really or effectively."""
    units: tuple[str, ...] = ()
    """systemd units, slices, containers' scopes: any one directory of a cgroup's path."""
    names: tuple[str, ...] = ()
    """A thread's name or its process' (proc_pid_comm(5)): at most 15 bytes."""


class Deny:
    """Says why a thread must not be held."""

    def __init__(self, settings: DenySettings) -> None:
        self._users = _compiled(settings.users)
        self._units = _compiled(settings.units)
        self._names = _compiled(settings.names)

    def why(self, tid: int) -> str:
        """The reason, with the setting in it; empty: it may be held. Reads what the settings ask for only.

        Raises:
            GoneError: it ended.
            OSError: no descriptor is left.
        """
        return self._why_user_or_name(tid) or self._why_unit(tid)

    def _why_user_or_name(self, tid: int) -> str:
        if not (self._users or self._names):
            return ""
        facts = _facts(tid)
        for uid in dict.fromkeys(facts.get(b"Uid", b"").split()[:2]) if self._users else ():
            user = _user(int(uid))
            if found := _match(self._users, user) or _match(self._users, uid.decode()):
                return f"thread {tid} belongs to user {user}, whom deny.users excludes ({found})"
        process = int(facts.get(b"Tgid", b"0")) or tid
        for one, what in ((tid, "thread"), (process, "process")) if self._names else ():
            name = procfs.stat(one).name
            if found := _match(self._names, name):
                return f"{what} {one} is called {name}, which deny.names excludes ({found})"
        return ""

    def _why_unit(self, tid: int) -> str:
        for path in dict.fromkeys(_units_of(tid)) if self._units else ():
            if why := self.why_group(path):
                return f"thread {tid}: {why}"
        return ""

    def why_group(self, path: str) -> str:
        """Why nothing in this cgroup, by its path, may be held; empty: it may."""
        for part in path.split("/") if self._units else ():
            if part and (found := _match(self._units, part)):
                return f"{part} is a unit or cgroup that deny.units excludes ({found})"
        return ""


def _compiled(globs: Sequence[str]) -> tuple[Pattern, ...]:
    return tuple((one, re.compile(fnmatch.translate(one))) for one in globs)


def _match(patterns: Sequence[Pattern], text: str) -> str:
    return next((glob for glob, pattern in patterns if pattern.match(text)), "")


def _facts(tid: int) -> dict[bytes, bytes]:
    """The lines of a thread's status file; a name's newline is written as \\n there."""
    lines = procfs.read(f"/proc/{tid}/task/{tid}/status", f"thread {tid}").splitlines()
    return {name: value.strip() for name, colon, value in (line.partition(b":") for line in lines) if colon}


def _units_of(tid: int) -> Iterator[str]:
    """The cgroups that tell what a thread belongs to: v2's and systemd's, and cpu's where neither says anything."""
    paths = cgroup.memberships(tid)
    for name in ("", "name=systemd", "cpu"):
        if name in paths:
            yield paths[name]


@lru_cache(maxsize=1024)
def _user(uid: int) -> str:
    """A user's name, or the number where it has none. Asked once: a directory service may take its time."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
