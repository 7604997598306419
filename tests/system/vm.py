"""A whole machine under emulation: kernel, systemd as PID 1, and a way to run commands in it and see how they ended.

For what a container can't show: limits that cgroups enforce, isolated cores under systemd, kernel modules, another
architecture, firmware. The disk is never changed: what the machine writes lies in a layer above it, which lives as long
as the `Vm` and so survives `reboot`. Every wait is bounded, and QEMU ends with the `Vm` whatever happens.
"""

import base64
import contextlib
import json
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PORT = "edgehold-test"
"""The virtio-serial port of the agent (vmagent)."""
_MASKED = (
    "apparmor",
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap",
    "fstrim.timer",
    "getty@tty1",
    "systemd-networkd-wait-online",
    "systemd-resolved",
)
# mitigations, watchdogs and audit only cost time under emulation; a panic ends the machine (-no-reboot). Where a second
# of the machine is many of the host's, systemd's own time limits say nothing.
_COMMAND_LINE = (
    "root=/dev/vda rw loglevel=4 panic=-1 mitigations=off nowatchdog audit=0 apparmor=0 random.trust_cpu=on "
    "systemd.show_status=no systemd.default_timeout_start_sec=600 "
)
_ARCHES = {
    # Without no_timer_check a boot in many panics: "IO-APIC + timer doesn't work".
    "amd64": ("qemu-system-x86_64", "q35", "max", "console=ttyS0 no_timer_check tsc=reliable", "ttyS0"),
    "arm64": ("qemu-system-aarch64", "virt", "cortex-a72", "console=ttyAMA0", "ttyAMA0"),
}
_POLL_S = 0.1
_START_S = 60.0
_LAST_LINES = 50


class VmError(Exception):
    """The machine did not do what it should; the text has the last lines of its console."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a command in the machine ended."""

    status: int
    """0-255; 128 + the signal's number; 124 if it took too long, 127 if there is no such command."""
    output: str
    """Its standard output."""
    errors: str
    """Its standard error."""


@dataclass(frozen=True, kw_only=True)
class Firmware:
    """UEFI, as two files of flash memory: of ``variables`` each machine gets a copy."""

    code: Path
    variables: Path


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What to boot: a kernel with its initramfs on ``disk`` (a root file system), or ``firmware`` on a whole disk."""

    arch: str
    """``amd64`` or ``arm64``."""
    disk: Path
    """A raw image."""
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    """Added to the kernel's command line; only with a kernel."""
    firmware: Firmware | None = None
    cpus: int = 2
    memory_mib: int = 1024
    processor: str = ""
    """QEMU's name of it, where the usual one will not do."""
    masked: Sequence[str] = _MASKED
    """Units that do not start; only with a kernel."""
    credentials: Mapping[str, bytes] = field(default_factory=dict)
    """systemd's system credentials, by fw_cfg; a name has at most 30 characters."""
    disk_mib: int | None = None
    """The size of the disk that the machine sees, where it is to be larger than the image."""
    arguments: Sequence[str] = ()
    """More for QEMU's command line."""


class Vm:
    """A machine that can be booted, again and again, until it is closed."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._directory = Path(tempfile.mkdtemp(prefix="eh-vm-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._received = b""
        self._answers: dict[int, dict[str, Any]] = {}
        self._ready = ""
        self._next = 0
        try:
            self._make_files()
        except BaseException:
            self.close()
            raise

    def start(self, *, timeout_s: float = 600.0) -> None:
        """Boot until the agent answers, which is early: wait for what you need.

        Raises:
            VmError: it ended or does not answer in time.
        """
        self.kill()
        self._received, self._answers, self._ready = b"", {}, ""
        channel = self._directory / "agent"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(channel))
            listener.listen()
            with (self._directory / "qemu").open("ab") as log:
                self._process = subprocess.Popen(
                    self._arguments(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._directory
                )
            self._until(lambda: bool(select.select([listener], [], [], 0)[0]), _START_S, "QEMU did not start")
            self._socket, _ = listener.accept()
            end = time.monotonic() + timeout_s
            while not self._ready:
                self._receive(end, f"the agent did not answer within {timeout_s:g} s")
        except BaseException:
            self.kill()
            raise
        finally:
            listener.close()

    def run(self, *argv: str, timeout_s: float = 120.0, check: bool = True, text: str = "") -> Done:
        """Run a command as root in /root, with ``text`` as its standard input.

        Raises:
            VmError: with ``check``, the status is not 0; or the machine does not answer.
        """
        answer = self._ask(
            {"argv": argv, "input": base64.b64encode(text.encode()).decode(), "timeout_s": timeout_s}, timeout_s + 60
        )
        done = Done(status=answer["status"], output=_decoded(answer["out"]), errors=_decoded(answer["err"]))
        if check and done.status != 0:
            raise VmError(f"{' '.join(argv)}: status {done.status}\n{done.output}{done.errors}")
        return done

    def shell(self, script: str, *, timeout_s: float = 120.0, check: bool = True) -> Done:
        """Run lines of a shell; the first that fails ends it."""
        return self.run("sh", "-ec", script, timeout_s=timeout_s, check=check)

    def wait(self, *argv: str, timeout_s: float = 120.0, status: int = 0) -> Done:
        """Run a command again and again until it ends with ``status``.

        Raises:
            VmError: it does not, in time.
        """
        end = time.monotonic() + timeout_s
        while (done := self.run(*argv, check=False)).status != status:
            if time.monotonic() > end:
                raise VmError(
                    f"{' '.join(argv)}: still status {done.status} after {timeout_s:g} s\n{done.output}{done.errors}"
                )
            time.sleep(5 * _POLL_S)
        return done

    def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Make a file in the machine, and the directories above it."""
        self._ask({"write": path, "data": base64.b64encode(data).decode(), "mode": mode}, 120)

    def read(self, path: str) -> bytes:
        """The contents of a file in the machine."""
        return base64.b64decode(self._ask({"read": path}, 120)["data"])

    def power_off(self, *, timeout_s: float = 300.0) -> None:
        """In order; the disk is whole afterwards and `start` boots it again.

        Raises:
            VmError: it is still there after that time (and then ended).
        """
        self._leave("poweroff", timeout_s)

    def reboot(self, *, timeout_s: float = 600.0) -> None:
        """Down in order, and up again."""
        self._leave("reboot", timeout_s)
        self.start(timeout_s=timeout_s)

    def kill(self) -> None:
        """As if the power went."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        (self._directory / "agent").unlink(missing_ok=True)

    def close(self) -> None:
        """End it, and remove all that it wrote."""
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def console(self) -> str:
        """The last lines that the machine wrote to its console, and QEMU to its log."""
        said = []
        for name in ("console", "qemu"):
            with contextlib.suppress(FileNotFoundError):
                text = (self._directory / name).read_text(encoding="utf-8", errors="replace")
                if lines := text.replace("\r", "").splitlines()[-_LAST_LINES:]:
                    said.append(f"{name}:\n" + "\n".join(lines))
        return "\n".join(said)

    def _leave(self, command: str, timeout_s: float) -> None:
        try:
            self.run("systemctl", command, "--no-block")
            assert self._process is not None
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise VmError(f"no {command} within {timeout_s:g} s\n{self.console()}") from None
        finally:
            self.kill()

    def _until(self, true: Callable[[], bool], timeout_s: float, why: str) -> None:
        end = time.monotonic() + timeout_s
        while not true():
            if time.monotonic() > end or self._process is None or self._process.poll() is not None:
                raise VmError(f"{why}\n{self.console()}")
            time.sleep(_POLL_S)

    def _ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        if self._socket is None:
            raise VmError("the machine is not running")
        self._next += 1
        number = self._next
        self._socket.settimeout(timeout_s)
        self._socket.sendall(json.dumps({"id": number, **request}).encode() + b"\n")
        end = time.monotonic() + timeout_s
        while number not in self._answers:
            self._receive(end, f"no answer within {timeout_s:g} s: {str(request)[:200]}")
        answer = self._answers.pop(number)
        if "error" in answer:
            raise VmError(f"{answer['error']}: {str(request)[:200]}")
        return answer

    def _receive(self, end: float, why: str) -> None:
        """Take what the agent says, or wait a little for it."""
        assert self._socket is not None
        self._socket.settimeout(1.0)
        try:
            data = self._socket.recv(65536)
        except TimeoutError:
            data = b""
            if time.monotonic() > end:
                raise VmError(f"{why}\n{self.console()}") from None
        else:
            if not data:
                raise VmError(f"the machine ended\n{self.console()}")
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            answer = json.loads(line)
            if "ready" in answer:
                self._ready = answer["ready"]
            else:
                self._answers[answer["id"]] = answer

    def _make_files(self) -> None:
        machine = self.machine
        size = [] if machine.disk_mib is None else [f"{machine.disk_mib}M"]
        layer = [
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "-b",
            str(machine.disk.resolve()),
            "disk",
            *size,
        ]
        subprocess.run(layer, cwd=self._directory, check=True, timeout=60)
        for name, value in machine.credentials.items():
            path = self._directory / f"credential-{name}"
            path.touch(mode=0o600)
            path.write_bytes(value)
        if machine.firmware is not None:
            shutil.copyfile(machine.firmware.variables, self._directory / "variables")

    def _arguments(self) -> list[str]:
        machine = self.machine
        program, board, processor, console, terminal = _ARCHES[machine.arch]
        masks = [f"systemd.mask={name}" for name in (*machine.masked, f"serial-getty@{terminal}")]
        arguments = [
            # The machine must not outlive whoever waits for it, even where that was killed (PR_SET_PDEATHSIG).
            *("setpriv", "--pdeathsig", "KILL", "--"),
            *(program, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-machine", board, "-accel", "tcg,thread=multi", "-cpu", machine.processor or processor),
            *("-smp", str(machine.cpus), "-m", str(machine.memory_mib)),
            *("-chardev", "file,id=console,path=console,append=on", "-serial", "chardev:console"),
            *("-drive", "if=none,id=disk,file=disk,format=qcow2,cache=unsafe", "-device", "virtio-blk-pci,drive=disk"),
            *("-chardev", "socket,id=agent,path=agent,server=off", "-device", "virtio-serial-pci"),
            *("-device", f"virtserialport,chardev=agent,name={PORT}"),
            *("-object", "rng-random,id=random,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=random"),
        ]
        if machine.kernel is not None:
            arguments += ["-kernel", str(machine.kernel.resolve())]
            arguments += ["-append", " ".join([console, _COMMAND_LINE, *masks, machine.cmdline]).rstrip()]
        if machine.initrd is not None:
            arguments += ["-initrd", str(machine.initrd.resolve())]
        if machine.firmware is not None:
            arguments += ["-drive", f"if=pflash,format=raw,readonly=on,file={machine.firmware.code.resolve()}"]
            arguments += ["-drive", "if=pflash,format=raw,file=variables"]
        for name in machine.credentials:
            arguments += ["-fw_cfg", f"name=opt/io.systemd.credentials/{name},file=credential-{name}"]
        return [*arguments, *machine.arguments]


def _decoded(data: str) -> str:
    return base64.b64decode(data).decode("utf-8", errors="replace")


@contextlib.contextmanager
def booted(machine: Machine, *, timeout_s: float = 600.0) -> Iterator[Vm]:
    """A machine whose agent answers; gone afterwards."""
    vm = Vm(machine)
    try:
        vm.start(timeout_s=timeout_s)
        yield vm
    finally:
        vm.close()
