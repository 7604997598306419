"""Runs a command of this host's own file tree under another kernel: in a guest of emulated CPUs, booted for it alone.

For what the host can't show: isolated cpusets (cgroup v2), kernel modules, more CPUs than there are. The guest sees the
host's files as they are (9p, read-only); what it writes stays in its memory and is gone with it. It runs as root, its
cgroup v2 has every controller, and it has no network. The kernel and how it starts: images/testkernel.

    python -m edgehold.testing.rig -cpus 4 -- .venv/bin/python -m pytest tests/guest
    python -m edgehold.testing.rig -kernel 6.12 -- uname -r

Needs root (the files that root alone may read are part of the tree), qemu-system-x86_64 and `make testkernel`.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgehold.errors import EX_USAGE, EdgeholdError, FailedError, TimedOutError, UnsupportedError

_QEMU = "qemu-system-x86_64"
_REPOSITORY = Path(__file__).resolve().parents[3]
# mitigations and watchdogs only cost time under emulation; a panic ends the guest (-no-reboot).
_COMMAND_LINE = (
    "console=ttyS0 loglevel=4 panic=-1 cgroup_no_v1=all tsc=reliable no_timer_check mitigations=off nowatchdog audit=0"
)
# The kernels that `make testkernel` builds: directory, and the emulated processor.
_KERNELS = {
    "6.1": ("testkernel", "max"),
    # With cx16 it dies of a double fault now and then, under QEMU 7.2.
    "6.12": ("testkernel-6.12", "qemu64,-cx16"),
}
KERNELS = tuple(_KERNELS)
"""What `Rig.kernel` may be."""
_INSIDE = "EDGEHOLD_RIG"
_LAST_LINES = 40
_POLL_S = 0.1
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Ended:
    """What became of a command."""

    status: int
    """Its exit status, 0-255; 128 + the signal's number where one ended it."""
    output: str
    """Its standard output and standard error."""


@dataclass(frozen=True, kw_only=True)
class Rig:
    """A machine to boot: each `run` is a new one.

    ``cpus`` 1-64, ``memory_mib`` from 512 (three quarters of it may hold what the command writes); ``cmdline`` is added
    to the kernel's command line; ``kernel`` is one of `KERNELS`.
    """

    cpus: int = 4
    memory_mib: int = 2048
    cmdline: str = ""
    kernel: str = "6.1"

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 600.0,
        said: Callable[[str], None] | None = None,
    ) -> Ended:
        """Boot, run ``argv`` (from ``PATH`` of ``env``, in ``cwd``), power off.

        ``env`` and ``cwd`` are this process' own by default; standard input is empty. ``said`` is called with what the
        command writes as it comes. ``timeout_s`` is for the whole, with 10-60 s of it for the boot.

        Raises:
            UnsupportedError: this host lacks something, or nobody builds such a kernel; the text says what.
            TimedOutError: it took longer; the machine was ended. The text has the last lines of output and console.
            FailedError: the machine ended without a status: a panic, or a start that failed. The text as above.
        """
        image = kernel_image(self.kernel)
        with tempfile.TemporaryDirectory(prefix="eh-rig-") as name:
            directory = Path(name)
            exchange = directory / "exchange"
            exchange.mkdir(mode=0o700)
            (exchange / "modules").write_text(str(image / "modules"), encoding="utf-8")
            (exchange / "command.sh").write_text(
                script(argv, env=os.environ if env is None else env, cwd=cwd or Path.cwd()),
                encoding="utf-8",
                errors="surrogateescape",
            )
            (exchange / "output").touch()
            with (directory / "qemu").open("wb") as log:
                process = subprocess.Popen(
                    self._arguments(image, directory), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
                )
            try:
                ended = _follow(process, exchange / "output", timeout_s, said)
            finally:
                process.kill()
                process.wait()
            return _result(directory, ended=ended, timeout_s=timeout_s)

    def _arguments(self, image: Path, directory: Path) -> list[str]:
        share = "local,security_model=none,multidevs=remap"
        return [
            # The machine must not outlive whoever waits for it, even where that was killed (PR_SET_PDEATHSIG).
            *("setpriv", "--pdeathsig", "KILL", "--"),
            *(_QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", _KERNELS[self.kernel][1]),
            *("-smp", str(self.cpus), "-m", str(self.memory_mib)),
            *("-kernel", str(image / "vmlinuz"), "-initrd", str(image / "initramfs.gz")),
            *("-append", f"{_COMMAND_LINE} {self.cmdline}".rstrip()),
            *("-chardev", f"file,id=console,path={directory / 'console'}", "-serial", "chardev:console"),
            *("-fsdev", f"{share},id=root,path=/,readonly=on"),
            *("-device", "virtio-9p-pci,fsdev=root,mount_tag=root"),
            *("-fsdev", f"{share},id=exchange,path={directory / 'exchange'}"),
            *("-device", "virtio-9p-pci,fsdev=exchange,mount_tag=exchange"),
            *("-object", "rng-random,id=random,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=random"),
        ]


def inside() -> bool:
    """Whether this process runs in a rig."""
    return os.environ.get(_INSIDE) == "1"


def kernel_image(kernel: str = "6.1") -> Path:
    """The directory of a test kernel below ``BUILD`` or the repository's build directory.

    Raises:
        UnsupportedError: this host can't run the rig, or nobody builds such a kernel; the text says what is missing.
    """
    if kernel not in _KERNELS:
        raise UnsupportedError(f"there is no test kernel {kernel}; there are {', '.join(KERNELS)}")
    if os.geteuid() != 0:
        raise UnsupportedError("the rig needs root: it shows the guest the whole file tree")
    if shutil.which(_QEMU) is None:
        raise UnsupportedError(f"{_QEMU} is not installed (Debian package qemu-system-x86)")
    image = Path(os.environ.get("BUILD", _REPOSITORY / "build")).absolute() / _KERNELS[kernel][0]
    if not (image / "vmlinuz").exists():
        raise UnsupportedError(f"the test kernel is not built: {image} (run: make testkernel)")
    return image.resolve()


def script(argv: Sequence[str], *, env: Mapping[str, str], cwd: Path) -> str:
    """A shell script that runs ``argv``; names that no shell takes (functions that bash exported) are left out."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in env.items() if _NAME.fullmatch(name)]
    where = f"cd {shlex.quote(str(cwd.absolute()))} || exit 126"
    return "\n".join([*exports, f"export {_INSIDE}=1", where, f"exec {shlex.join(argv)}", ""])


def _follow(
    process: subprocess.Popen[bytes], output: Path, timeout_s: float, said: Callable[[str], None] | None
) -> bool:
    """Pass the output on until the machine ends; false if it does not in time."""
    end = time.monotonic() + timeout_s
    with output.open(encoding="utf-8", errors="replace") as stream:
        while True:
            try:
                process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                running = True
            else:
                running = False
            if said is not None and (text := stream.read()):
                said(text)
            if not running or time.monotonic() > end:
                return not running


def _result(directory: Path, *, ended: bool, timeout_s: float) -> Ended:
    output = _text(directory / "exchange" / "output")
    with contextlib.suppress(FileNotFoundError):
        # Also of a machine that did its work and then could not power off.
        return Ended(int((directory / "exchange" / "status").read_text(encoding="ascii")), output)
    last = "".join(
        f"\n{title}:\n" + "\n".join(lines[-_LAST_LINES:])
        for title, lines in (
            ("output", output.splitlines()),
            ("console", _text(directory / "console").splitlines()),
            ("QEMU", _text(directory / "qemu").splitlines()),
        )
        if lines
    )
    if ended:
        raise FailedError(f"the rig's machine ended without an exit status of the command{last}")
    raise TimedOutError(f"the rig's machine was ended after {timeout_s:g} s{last}")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status, or that of the error."""
    parser = argparse.ArgumentParser(prog="edgehold.testing.rig", description="Run a command under the test kernel.")
    parser.add_argument("-cpus", type=int, default=4)
    parser.add_argument("-memory", type=int, default=2048, metavar="MIB")
    parser.add_argument("-timeout", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument("-kernel", choices=KERNELS, default="6.1")
    parser.add_argument("-append", default="", metavar="OPTIONS", help="added to the kernel's command line")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.print_usage(sys.stderr)
        return EX_USAGE
    try:
        rig = Rig(cpus=options.cpus, memory_mib=options.memory, cmdline=options.append, kernel=options.kernel)
        return rig.run(command, timeout_s=options.timeout, said=_write).status
    except EdgeholdError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
