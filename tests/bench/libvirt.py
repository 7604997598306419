"""A private libvirtd and virtlogd (Debian's packages), for comparison. Needs root.

Their state is in a mount namespace of their own: the host's libvirt, if it has one, is neither seen nor touched.
"""

import asyncio
import contextlib
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from edgehold.testing.daemons import private_directory
from edgehold.testing.load import eventually
from tests.bench.figures import CMDLINE, need_guest

NAME = "edgehold-bench"
MEMORY_MIB = 256
SYSTEM_PYTHON = "/usr/bin/python3"  # python3-libvirt is Debian's, for Debian's Python
_PROGRAMS = {
    "libvirtd": "libvirt-daemon-system",
    "virtlogd": "libvirt-daemon-system",
    "virsh": "libvirt-clients",
    "nsenter": "util-linux",
}
_READY_S = 120.0
_COMMAND_S = 300.0  # the first definition looks at every emulator that is installed
_OWN = "/run /etc/libvirt/qemu /etc/libvirt/hooks /var/lib/libvirt /var/cache/libvirt /var/log/libvirt"
# In a chroot the root may be no mount point, whose propagation can't be changed: harmless where nothing is shared.
_NAMESPACE = f"""
if ! mount --make-rprivate / 2>/dev/null && grep -q ' shared:' /proc/self/mountinfo; then
    echo "/ is no mount point here, and its mounts are shared with the host: bind-mount the chroot onto itself first"
    exit 69
fi
for one in {_OWN}; do [ ! -d "$one" ] || mount -t tmpfs -o mode=755 bench "$one" || exit 1; done; exec "$@"
"""
_CONFIG = """unix_sock_dir = "{directory}"
unix_sock_rw_perms = "0700"
auth_unix_ro = "none"
auth_unix_rw = "none"
"""
# The machine that vmand makes, in libvirt's words. What libvirt adds by itself and vmand does not have is taken off.
_DOMAIN = """<domain type='qemu'>
  <name>{name}</name><memory unit='MiB'>{memory}</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{directory}/vmlinuz</kernel><initrd>{directory}/initramfs.gz</initrd><cmdline>{cmdline}</cmdline></os>
  <features><acpi/><apic/><tcg><tb-cache unit='MiB'>128</tb-cache></tcg></features>
  <cpu mode='maximum'/>
  <devices>
    <controller type='usb' model='none'/><memballoon model='none'/><panic model='isa'/>
    <serial type='unix'><source mode='bind' path='{console}'/></serial>
  </devices>
</domain>
"""
# Reads a command a line, answers with its milliseconds: what libvirt-python itself takes on an open connection.
_HELPER = """
import sys, time
import libvirt
connection = libvirt.open(sys.argv[1])
domain = None
for line in sys.stdin:
    word, _, rest = line.strip().partition(" ")
    begin = time.perf_counter_ns()
    if word == "start":
        domain = connection.defineXML(open(rest).read())
        domain.create()
    elif word == "find":
        domain = connection.lookupByName(rest)
    else:
        getattr(domain, word)()
    print((time.perf_counter_ns() - begin) / 1e6, flush=True)
"""


class Libvirt:
    """Both daemons, the domain's definition, and the ways to give commands."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.uri = f"qemu+unix:///system?socket={directory}/libvirt-sock"
        self.definition = directory / "domain.xml"
        # QEMU's user makes its socket there.
        self.console_directory = directory / "console"
        self._logger: subprocess.Popen[bytes] | None = None
        self._daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start both daemons and define what is booted.

        Raises:
            SystemExit: a program is missing; names the Debian package.
            AssertionError: a daemon did not come up.
        """
        for program, package in _PROGRAMS.items():
            if shutil.which(program) is None:
                raise SystemExit(f"{program} is not installed (Debian package {package})")
        self.directory.chmod(0o755)
        self.console_directory.mkdir()
        self.console_directory.chmod(0o777)
        for image in need_guest():
            (self.directory / image.name).write_bytes(image.read_bytes())
        self.definition.write_text(
            _DOMAIN.format(
                name=NAME, memory=MEMORY_MIB, directory=self.directory, cmdline=CMDLINE, console=self.console
            )
        )
        config = self.directory / "libvirtd.conf"
        config.write_text(_CONFIG.format(directory=self.directory))
        ready = self.directory / "virtlogd.pid"
        with (self.directory / "log").open("ab") as log:
            unshare = ["unshare", "--mount", "--propagation", "unchanged", "sh", "-c", _NAMESPACE, "sh"]
            self._logger = subprocess.Popen([*unshare, "virtlogd", "-p", str(ready)], stdout=log, stderr=log)
            eventually(ready.exists, timeout_s=_READY_S, what=f"virtlogd runs: {self._log()}")
        self.start_libvirtd()

    def start_libvirtd(self) -> None:
        """Start libvirtd, for the first time or after `kill_libvirtd`; virtlogd runs already.

        Raises:
            AssertionError: it did not come up.
        """
        if self._logger is None:
            raise AssertionError("virtlogd is not running: begin with start()")
        # Entering a mount namespace leads out of a chroot: its root is entered too.
        nsenter = ["nsenter", "--mount", "--root", "--wd", "--target", str(self._logger.pid)]
        argv = ["libvirtd", "-f", str(self.directory / "libvirtd.conf"), "-p", str(self.directory / "libvirtd.pid")]
        with (self.directory / "log").open("ab") as log:
            self._daemon = subprocess.Popen([*nsenter, *argv], stdout=log, stderr=log)
        answers = ["virsh", "-c", self.uri, "list"]
        eventually(
            lambda: subprocess.run(answers, capture_output=True, check=False).returncode == 0,
            timeout_s=_READY_S,
            what=f"libvirtd answers: {self._log()}",
        )

    def kill_libvirtd(self) -> None:
        """End libvirtd by force; its guests and virtlogd stay."""
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon.wait()

    def signal_libvirtd(self, number: signal.Signals) -> None:
        """SIGSTOP makes it hang."""
        if self._daemon is not None:
            self._daemon.send_signal(number)

    def stop(self) -> None:
        """End the domain and both daemons."""
        if self._daemon is not None:
            for word in ("destroy", "undefine"):
                subprocess.run(["virsh", "-c", self.uri, word, NAME], capture_output=True, check=False, timeout=60)
        for process in (self._daemon, self._logger):
            if process is not None:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    @property
    def console(self) -> Path:
        """The guest's serial console."""
        return self.console_directory / "serial"

    def version(self) -> str:
        """As the daemon says it."""
        return subprocess.run(["libvirtd", "--version"], capture_output=True, text=True, check=True).stdout.strip()

    def pids(self) -> list[int]:
        """Both daemons."""
        return [one.pid for one in (self._daemon, self._logger) if one is not None]

    async def virsh(self, *words: str) -> float:
        """One command; its milliseconds.

        Raises:
            RuntimeError: it failed; has what it said.
        """
        begin = time.perf_counter_ns()
        process = await asyncio.create_subprocess_exec(
            "virsh", "-q", "-c", self.uri, *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        said, _ = await asyncio.wait_for(process.communicate(), _COMMAND_S)
        spent = (time.perf_counter_ns() - begin) / 1e6
        if process.returncode:
            raise RuntimeError(f"virsh {' '.join(words)}: {said.decode(errors='replace')}")
        return spent

    async def remove(self) -> None:
        """End the domain by force and forget it."""
        await self.virsh("destroy", NAME)
        await self.virsh("undefine", NAME)

    async def until(self, words: str, *, timeout_s: float) -> None:
        """Until the running guest printed these words."""
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(self.console)
            try:
                seen = b""
                while b"\n" not in seen.partition(words.encode())[2]:
                    more = await reader.read(4096)
                    if not more:
                        raise RuntimeError(f"libvirt's guest ended: {seen.decode(errors='replace')[-500:]}")
                    seen += more
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    def _log(self) -> str:
        log = self.directory / "log"
        return log.read_text(errors="replace")[-1000:] if log.exists() else ""


class LibvirtPython:
    """A process of the system's Python with an open connection of python3-libvirt."""

    def __init__(self, uri: str) -> None:
        self._process = subprocess.Popen(
            [SYSTEM_PYTHON, "-c", _HELPER, uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The end of its input is its end.
        self._process.communicate(timeout=30)

    async def ask(self, command: str) -> float:
        """One command; the milliseconds that libvirt-python took.

        Raises:
            RuntimeError: it ended; what it said is on stderr.
        """
        stdin, stdout = _stream(self._process.stdin), _stream(self._process.stdout)
        stdin.write(command + "\n")
        stdin.flush()
        answer = await asyncio.to_thread(stdout.readline)
        if not answer:
            raise RuntimeError(f"libvirt-python ended at {command!r} (Debian package python3-libvirt)")
        return float(answer)


def _stream(one: IO[str] | None) -> IO[str]:
    if one is None:
        raise RuntimeError("the process has no pipe")
    return one


@contextlib.asynccontextmanager
async def private_libvirt() -> AsyncIterator[Libvirt]:
    """Both daemons for the block. Cgroups that they made are removed."""
    before = _cgroups()
    with private_directory("eh-lv-") as directory:
        libvirt = Libvirt(directory)
        try:
            libvirt.start()
            yield libvirt
        finally:
            libvirt.stop()
            for group in _cgroups() - before:
                with contextlib.suppress(OSError):  # not empty: it is not ours alone
                    group.rmdir()


def _cgroups() -> set[Path]:
    """The cgroups in which libvirt puts its guests where there is no systemd, one in each hierarchy."""
    return {one for depth in ("machine", "*/machine") for one in Path("/sys/fs/cgroup").glob(depth)}
