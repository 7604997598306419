"""Asks libvirt about domains, in a process of its own: the only code of ours in which libvirt's library is.

libvirt-python blocks for as long as its daemon pleases and takes 18 MB, so deadlined starts this file as a script, with
whichever Python has the module, and ends it by force where it hangs. It therefore imports nothing but the standard
library and libvirt, and it only looks: its connection is read-only.

A line of JSON in, a list of domains' names; a line of JSON out: ``{"domains": {name: …}}`` (`deadlined.domainask.Seen`)
or ``{"error": {code, message, retryable}}``. The end of its input is its end.
"""

import contextlib
import json
import os
import pwd
import re
import sys
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import parse_qs, urlsplit

try:
    import libvirt  # type: ignore[import-not-found]  # Debian's python3-libvirt, or libvirt-python
except ImportError:
    sys.exit(69)  # EX_UNAVAILABLE: deadlined names the package

# As QEMU names its vCPU threads where debug-threads is on, which libvirt turns on; the second of single-threaded TCG.
_VCPU = re.compile(rb"CPU \d+/(KVM|TCG)|ALL CPUs/TCG")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: "running",
    libvirt.VIR_DOMAIN_BLOCKED: "running",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_SHUTDOWN: "shutting down",
    libvirt.VIR_DOMAIN_SHUTOFF: "shut off",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_PMSUSPENDED: "suspended",
}
_STANDS = frozenset({libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_CRASHED, libvirt.VIR_DOMAIN_PMSUSPENDED})
_DENIED = frozenset(
    {
        libvirt.VIR_ERR_AUTH_FAILED,
        libvirt.VIR_ERR_AUTH_CANCELLED,
        libvirt.VIR_ERR_AUTH_UNAVAILABLE,
        libvirt.VIR_ERR_ACCESS_DENIED,
        libvirt.VIR_ERR_OPERATION_DENIED,
    }
)


class Guest:
    """One QEMU process, by its task directory, which never becomes another process' (proc_pid_task(5))."""

    def __init__(self, pid: int, number: int) -> None:
        """Raises `OSError`. ``number`` is the id of this run of the domain."""
        self.pid = pid
        self.number = number
        self._task = os.open(f"/proc/{pid}/task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._names: list[str] = []
        self._again = True
        self._vcpus: list[int] = []

    @property
    def ended(self) -> bool:
        return not self._list()

    def _list(self) -> list[str]:
        try:
            return sorted(os.listdir(self._task))  # noqa: PTH208 - by descriptor
        except OSError:
            return []

    def vcpus(self) -> list[int]:
        """Its vCPU threads; empty as well where it has ended."""
        names = self._list()
        # A thread gives itself its name, a moment after it is there: each new list is read twice.
        same = names == self._names
        if not same or self._again:
            self._vcpus = [int(name) for name in names if _VCPU.fullmatch(_read(f"{name}/comm", self._task).strip())]
        self._names, self._again = names, not same
        return self._vcpus

    def close(self) -> None:
        os.close(self._task)


def _read(path: str, directory: "int | None" = None) -> bytes:
    """A file of /proc; empty where its task has ended."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return b""
    try:
        return b"".join(iter(lambda: os.read(fd, 65536), b""))
    except OSError:
        return b""
    finally:
        os.close(fd)


def _processes(uuid: str) -> Iterable[int]:
    """QEMU processes that say that they run this domain: libvirt gives each ``-name guest=NAME,… -uuid UUID``."""
    for entry in os.listdir("/proc"):  # noqa: PTH208 - names are enough
        if entry.isdigit():
            words = _read(f"/proc/{entry}/cmdline").split(b"\0")
            if (
                b"-uuid" in words[:-1]
                and words[words.index(b"-uuid") + 1] == uuid.encode()
                and any(word.startswith(b"guest=") for word in words)
            ):
                yield int(entry)


def _uid(pid: int) -> int:
    """The effective user of a process, -1 where it ended. Not the owner of its directory: that may be root's."""
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith(b"Uid:"):
            return int(line.split()[2])
    return -1


class Looker:
    """One connection, and the guests that were found by it."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._connection: Any = None
        self._guests: dict[str, Guest] = {}

    def answer(self, names: "list[str]") -> "dict[str, object]":
        """What is to be sent."""
        try:
            if self._connection is None:
                self._connection = libvirt.openReadOnly(self._uri)
            domains = {name: self._look(name) for name in names}
        except libvirt.libvirtError as error:
            self._forget_connection()
            return {"error": _told(self._uri, error)}
        for name in self._guests.keys() - set(names):
            self._drop(name)
        return {"domains": domains}

    def _forget_connection(self) -> None:
        """The next question opens another one. Guests that were found stay known."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(libvirt.libvirtError):
                connection.close()

    def _drop(self, name: str) -> None:
        guest = self._guests.pop(name, None)
        if guest is not None:
            guest.close()

    def _look(self, name: str) -> "dict[str, object]":
        try:
            domain = self._find(name)
            state, number, uuid = domain.state()[0], domain.ID(), domain.UUIDString()
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
            self._drop(name)
            return {"known": False}
        seen: dict[str, object] = {"uuid": uuid, "state": _STATES.get(state, f"in state {state}")}
        if number < 0 or self._uri.startswith("vman"):
            self._drop(name)
            return seen
        guest, reason = self._guest(name, domain, number, uuid)
        if guest is None:  # while it ends, that is no news
            return seen if state == libvirt.VIR_DOMAIN_SHUTDOWN else seen | {"reason": reason}
        tids = guest.vcpus()
        if not tids:
            return seen | {"reason": f"its process {guest.pid} has no thread that is called a vCPU (yet)"}
        return seen | {"pid": guest.pid, "tids": tids, "suspended": state in _STANDS}

    def _find(self, name: str) -> Any:
        """As virsh does: a uuid is one before it is a name."""
        if _UUID.fullmatch(name):
            try:
                return self._connection.lookupByUUIDString(name)
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                    raise
        return self._connection.lookupByName(name)

    def _guest(self, name: str, domain: Any, number: int, uuid: str) -> "tuple[Guest | None, str]":
        """The domain's process, or why it can't be told."""
        known = self._guests.get(name)
        if known is not None and known.number == number and not known.ended:
            return known, ""
        self._drop(name)
        # Anybody can start a program with these words: it must be the user's as whom libvirt runs this domain.
        try:
            user = self._user(domain)
        except (OSError, KeyError, ET.ParseError) as error:
            return None, f"libvirt does not tell which user runs it: {error}"
        pids = [pid for pid in _processes(uuid) if _uid(pid) == user]
        if len(pids) != 1:
            what = "no process" if not pids else f"more than one process ({', '.join(map(str, pids))})"
            return None, f"{what} of uid {user} on this host has its uuid {uuid}; only domains of this host are held"
        try:
            guest = Guest(pids[0], number)
        except OSError as error:
            return None, f"its process {pids[0]}: {error.strerror}"
        self._guests[name] = guest
        return guest, ""

    def _user(self, domain: Any) -> int:
        """Who must own the process: libvirt's DAC label; a session has none, and there it is the session's user."""
        for model, label in _labels(domain):
            if model == "dac" and label:
                user = label.partition(":")[0].lstrip("+")
                return int(user) if user.isdigit() else pwd.getpwnam(user).pw_uid
        socket = parse_qs(urlsplit(self._uri).query).get("socket")
        return Path(socket[0]).stat().st_uid if socket else os.geteuid()


def _labels(domain: Any) -> "list[tuple[str, str]]":
    """The running domain's security labels: model and label."""
    root = ET.fromstring(domain.XMLDesc())  # noqa: S314 - libvirt's own text
    return [(one.get("model", ""), one.findtext("label") or "") for one in root.findall("seclabel")]


def _told(uri: str, error: "libvirt.libvirtError") -> "dict[str, object]":
    text = f"{uri}: {error.get_error_message()}"
    if error.get_error_code() in _DENIED or "Permission denied" in text:
        message = f"{text}; uid {os.geteuid()} needs access to libvirt's read-only socket"
        return {"code": "denied", "message": message, "retryable": False}
    return {"code": "unavailable", "message": f"{text}; is libvirt's daemon running?", "retryable": True}


def main(uri: str) -> None:
    """Answer until the end of the input, also while libvirt hangs."""
    libvirt.registerErrorHandler(lambda _context, _error: None, None)  # else it prints each error
    lines: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    looker = Looker(uri)
    while True:
        sys.stdout.write(json.dumps(looker.answer(json.loads(lines.get()))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
