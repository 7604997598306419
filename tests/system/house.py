"""A machine to install on: a Debian whose first process is systemd, in a container, for the system tests.

What a person does on a host is done here in the same way: apt, systemctl, journalctl and the client commands, each
with its exit status and output. The file tree is that of images/system with a layer of the machine's own above it, in
memory, which stays over reboots and power cuts. There is no network, and some of what systemd does can't be enforced
here: limits of memory and tasks, IP addresses, AppArmor. A virtual machine shows these.

Everything that a machine consists of is held by one process, which ends with this one at the latest.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from edgehold.errors import FailedError, TimedOutError
from edgehold.testing.capability import missing, need_command, need_root

ROOT = Path(__file__).parents[2]
_IMAGES = ROOT / "images"
_T = TypeVar("_T")
_POLL_S = 0.05
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "DEBIAN_FRONTEND": "noninteractive",
    "SYSTEMD_PAGER": "",
}
_ACTIVE = ("active/running", "active/active", "active/exited", "active/listening", "active/waiting")
# Of a command that fails: enough to see why, in a test's report.
_LAST_LINES = 40
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Done:
    """What became of a command."""

    status: int
    """Its exit status; minus the signal's number where one ended it."""
    output: str
    """Its standard output."""
    errors: str
    """Its standard error."""


def need_machines(suite: str) -> Path:
    """The tree that machines of a Debian start from, or the test is skipped (or fails, see `missing`)."""
    need_root()
    need_command("systemd-nspawn", "systemd-container")
    tree = Path(os.environ.get("BUILD", ROOT / "build")) / "system" / suite / "root"
    if not (tree / "usr/bin/systemctl").exists():
        missing(f"there is no Debian for the system tests: {tree} (run: images/system/build.sh {suite})")
    return tree.resolve()


def until(condition: Callable[[], _T], *, what: str, timeout_s: float = 30.0) -> _T:
    """The first true value of ``condition``.

    Raises:
        TimedOutError: there was none in time; the text has ``what`` and the last value.
    """
    end = time.monotonic() + timeout_s
    while True:
        if value := condition():
            return value
        if time.monotonic() > end:
            raise TimedOutError(f"not within {timeout_s:g} s: {what} (last: {value!r})")
        time.sleep(_POLL_S)


class Machine:
    """A machine that is off: `boot` it. As a context manager it is gone in the end, whatever happened.

    ``size`` bounds what is written above the tree (tmpfs(5)).
    """

    def __init__(self, suite: str, *, size: str = "3g") -> None:
        self.suite = suite
        self.name = f"eh-{os.getpid()}-{next(_numbers)}"
        self._nspawn = self._leader = 0
        unified = Path("/sys/fs/cgroup/unified")
        cgroups = unified if unified.is_dir() else unified.parent
        self._cgroup = str(cgroups / self.name / "payload" / "commands")
        self._holder = subprocess.Popen(
            [
                sys.executable,
                _IMAGES / "apart.py",
                "--",
                _IMAGES / "system/hold.sh",
                self.name,
                need_machines(suite),
                size,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            start_new_session=True,  # an interrupt at the terminal is ours: it cleans up when we end
        )
        try:
            self._place = self._told("held")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it at once, and all that belongs to it."""
        for stream in (self._holder.stdin, self._holder.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        try:
            self._holder.wait(30.0)
        except subprocess.TimeoutExpired:
            self._holder.kill()
            self._holder.wait()
        self._nspawn = self._leader = 0

    # -- on and off

    def boot(self, *, timeout_s: float = 60.0) -> str:
        """Switch it on and wait until systemd has done what it wants to do: ``running``, or ``degraded``."""
        self._tell("boot")
        self._nspawn = int(self._told("pid"))
        self._leader = until(self._systemd, what=f"{self.name} starts systemd", timeout_s=timeout_s)
        # It does not listen yet when it is only just there.
        settled = ("running", "degraded")
        return until(
            lambda: word if (word := self.system_state("--wait", timeout_s=timeout_s)) in settled else "",
            what=f"{self.name} is up",
            timeout_s=timeout_s,
        )

    def reboot(self, *, timeout_s: float = 60.0) -> str:
        """``systemctl reboot``, and wait as `boot` does."""
        self.run("systemctl", "--no-block", "reboot", check=False)
        self._off(timeout_s)  # nspawn leaves the second half to whoever started it
        return self.boot(timeout_s=timeout_s)

    def poweroff(self, *, timeout_s: float = 60.0) -> None:
        """Switch it off in good order; its files stay."""
        os.kill(self._leader, signal.SIGRTMIN + 4)  # systemd(1): starts poweroff.target
        self._off(timeout_s)

    def cut(self) -> None:
        """Pull the plug: every process ends at once; its files stay as they were written."""
        self._tell("cut")
        self._off(10.0)

    # -- commands

    def run(
        self,
        *argv: str,
        check: bool = True,
        input: str | bytes | None = None,  # noqa: A002 - as subprocess has it
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> Done:
        """A command as root, in /root, with an environment of its own; in a machine that is off, in its file tree.

        Raises:
            FailedError: with ``check``: its exit status was not 0. The text has its last lines.
            TimedOutError: it took longer; it was ended.
        """
        environment = [f"{name}={value}" for name, value in {**_ENVIRONMENT, **(env or {})}.items()]
        command = ["env", "-i", *environment, *argv]
        try:
            ended = subprocess.run(
                [*self._inside(), *command],
                input=input.encode() if isinstance(input, str) else input,
                stdin=subprocess.DEVNULL if input is None else None,
                capture_output=True,
                check=False,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired as error:
            raise TimedOutError(f"{argv!r} in {self.name} took more than {timeout_s:g} s") from error
        done = Done(ended.returncode, ended.stdout.decode(errors="replace"), ended.stderr.decode(errors="replace"))
        if check and done.status != 0:
            last = "\n".join((done.output + done.errors).splitlines()[-_LAST_LINES:])
            raise FailedError(f"{argv!r} in {self.name} ended with {done.status}\n{last}")
        return done

    def sh(self, script: str, **options: Any) -> Done:
        """A shell script, with the options of `run`."""
        return self.run("sh", "-euc", script, **options)

    def put(self, files: Mapping[str, str | bytes | Path], *, mode: str = "644") -> None:
        """Write files; a `Path` is a file of this host."""
        for path, what in files.items():
            content = what.read_bytes() if isinstance(what, Path) else what
            script = 'mkdir -p "${1%/*}" && cat >"$1" && chmod "$2" "$1"'  # no /dev/stdin in a machine that is off
            self.run("sh", "-c", script, "put", path, mode, input=content)

    def read(self, path: str) -> str:
        """A file's text."""
        return self.run("cat", path).output

    def install(self, *packages: str | Path, timeout_s: float = 300.0) -> Done:
        """``apt-get install``, without recommended packages. A `Path` is a package file of this host."""
        names = []
        for one in packages:
            if isinstance(one, Path):
                self.put({f"/root/debs/{one.name}": one})
                names.append(f"./debs/{one.name}")
            else:
                names.append(one)
        options = ("-q", "-y", "-o", "APT::Sandbox::User=root", "--no-install-recommends", "--allow-downgrades")
        return self.run("apt-get", *options, "install", *names, timeout_s=timeout_s)

    # -- systemd

    def system_state(self, *options: str, timeout_s: float = 60.0) -> str:
        """``systemctl is-system-running``: ``running``, ``degraded``, …"""
        done = self.run("systemctl", "is-system-running", *options, check=False, timeout_s=timeout_s)
        return done.output.strip()

    @contextlib.contextmanager
    def override(self, unit: str, text: str) -> Iterator[None]:
        """Lines of a drop-in for a while; what already runs keeps what it was started with."""
        name = f"/run/systemd/system/{unit}.d/zz-test.conf"  # by name the last one, wherever others are
        self.put({name: text})
        self.run("systemctl", "daemon-reload")
        try:
            yield
        finally:
            self.run("rm", name)
            self.run("systemctl", "daemon-reload")

    def one_boot_id(self) -> None:
        """Until the next boot, every process sees the host's boot id, as on a host all see one: nspawn shows one of its
        own, but not to services that have a /proc of theirs (ProtectKernelTunables=)."""
        while self.run("umount", "/proc/sys/kernel/random/boot_id", check=False).status == 0:
            pass

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """``systemctl show``; all properties, or those that are named."""
        options = [f"--property={one}" for one in properties]
        lines = self.run("systemctl", "show", *options, "--", unit).output.splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def state(self, unit: str) -> str:
        """``active/running``, ``failed/failed``, …"""
        shown = self.show(unit, "ActiveState", "SubState")
        return f"{shown['ActiveState']}/{shown['SubState']}"

    def wait_state(self, unit: str, *states: str, timeout_s: float = 30.0) -> str:
        """Wait for one of ``states``; on time-out the text has ``systemctl status``."""
        try:
            return until(lambda: one if (one := self.state(unit)) in states else "", what=unit, timeout_s=timeout_s)
        except TimedOutError as error:
            raise TimedOutError(f"{unit} is not {states} within {timeout_s:g} s\n{self.status(unit)}") from error

    def wait_active(self, *units: str, timeout_s: float = 30.0) -> None:
        """Wait until each is active."""
        for one in units:
            self.wait_state(one, *_ACTIVE, timeout_s=timeout_s)

    def main_pid(self, unit: str) -> int:
        """The unit's main process as the machine numbers it, 0 for none."""
        return int(self.show(unit, "MainPID")["MainPID"])

    def status(self, unit: str) -> str:
        """What ``systemctl status`` says, whatever its exit status."""
        return self.run("systemctl", "status", "--no-pager", "--full", "--", unit, check=False).output

    def journal(self, *arguments: str, unit: str | None = None, after: str | None = None) -> list[dict[str, Any]]:
        """What the journal has: of a unit (systemd's own words about it too), since a `cursor`."""
        # journalctl's --after-cursor loses an entry where its --unit does not match the cursor's.
        chosen = [*arguments, *(("--after-cursor", after) if after else ("-u", unit) if unit else ())]
        output = self.run("journalctl", "-q", "-o", "json", "--no-pager", "--all", *chosen).output
        entries: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
        if unit and after:
            return [one for one in entries if unit in {one.get("UNIT"), one.get("_SYSTEMD_UNIT")}]
        return entries

    def cursor(self) -> str:
        """The journal's end now, for `journal`."""
        self.run("journalctl", "--sync")
        return str(self.journal("-n", "1")[-1]["__CURSOR"])

    def wait_journal(self, text: str, *, unit: str | None = None, after: str, timeout_s: float = 30.0) -> str:
        """Wait for a message that contains ``text``; the whole of it."""

        def found() -> str:
            messages = (str(one.get("MESSAGE")) for one in self.journal(unit=unit, after=after))
            return next((one for one in messages if text in one), "")

        return until(found, what=f"{text!r} in the journal of {unit or self.name}", timeout_s=timeout_s)

    # -- how it is done

    def _tell(self, word: str) -> None:
        assert self._holder.stdin is not None
        self._holder.stdin.write(f"{word}\n")
        self._holder.stdin.flush()

    def _told(self, word: str) -> str:
        assert self._holder.stdout is not None
        line = self._holder.stdout.readline()
        first, _, rest = line.strip().partition(" ")
        if first != word:
            raise FailedError(f"the holder of {self.name} ended, or said {line!r}: see its standard error")
        return rest

    def _children(self) -> list[int]:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return [int(one) for one in Path(f"/proc/{self._nspawn}/task/{self._nspawn}/children").read_text().split()]
        return []

    def _systemd(self) -> int:
        """systemd's process; nspawn has another child for a moment."""
        for child in self._children():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if Path(f"/proc/{child}/comm").read_text() == "systemd\n":
                    return child
        return 0

    def _off(self, timeout_s: float) -> None:
        # The holder reaps it; nothing of the machine runs any more then.
        nspawn, gone = Path(f"/proc/{self._nspawn}"), lambda: not nspawn.exists()
        until(gone, what=f"{self.name} is off", timeout_s=timeout_s)
        self._nspawn = self._leader = 0

    def _inside(self) -> Sequence[str]:
        if self._leader:
            pid = str(self._leader)
            # In a cgroup of the machine's own tree: from outside of it, /proc/self/cgroup would make no sense there.
            into = ("sh", "-euc", 'mkdir -p "$0" && echo $$ >"$0/cgroup.procs" && exec "$@"', self._cgroup)
            return (*into, "nsenter", "--target", pid, "--all", "--root", f"--wd=/proc/{pid}/root/root", "--")
        pid = str(self._holder.pid)
        return ("nsenter", "--target", pid, "--mount", "--root", "--", "chroot", self._place)


@contextlib.contextmanager
def machine(suite: str, **options: Any) -> Iterator[Machine]:
    """A machine of a Debian, booted."""
    with Machine(suite, **options) as one:
        assert one.boot() == "running", one.run("systemctl", "--failed", check=False).output
        yield one
