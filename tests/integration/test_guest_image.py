"""The small guest of images/guest, booted by QEMU itself, without any of our daemons.

What is held here is the guest's word to everybody else: its console lines, its grid of releases, the power button and
the crash switch. Emulation only (`-accel tcg`): it runs on every host. Nothing here measures speed.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

QEMU = "qemu-system-x86_64"
REPO = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("BUILD", REPO / "build"))
IMAGE = BUILD / "guest" / "amd64"
# As images/guest/README.md recommends.
COMMAND_LINE = "console=ttyS0 quiet no_timer_check tsc=reliable panic=-1"

BOOT_DEADLINE_S = 90.0
LINE_DEADLINE_S = 30.0
EXIT_DEADLINE_S = 20.0

UP = re.compile(r"edgehold-guest up kernel=(?P<kernel>\S+) uptime_s=(?P<uptime>\d+\.\d) cpus=(?P<cpus>\d+)")
CALIBRATED = re.compile(r"edgehold-job calibrated work_ms=(?P<work>\d+\.\d{3}) iterations=(?P<iterations>\d+)")
JOB = re.compile(r"edgehold-job n=(?P<n>\d+) release_ms=(?P<release>\d+\.\d{3}) response_ms=(?P<response>\d+\.\d{3})")
POWER_OFF = re.compile(r"edgehold-guest power-off")
PANIC = re.compile(r".*Kernel panic - not syncing: sysrq triggered crash.*")


def _missing(reason: str) -> None:
    """Skip, or fail where everything is required (CI)."""
    if os.environ.get("EDGEHOLD_REQUIRE") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


class Guest:
    """A running QEMU with its console on a pipe. Lines are read by the test's own thread, each wait has a deadline."""

    def __init__(self, process: subprocess.Popen[bytes], qmp_path: Path) -> None:
        assert process.stdout is not None
        self.process = process
        self.lines: list[str] = []
        self._qmp_path = qmp_path
        self._console: IO[bytes] = process.stdout
        self._partial = b""
        self._next = 0
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._console, selectors.EVENT_READ)

    def expect(self, pattern: re.Pattern[str], deadline_s: float = LINE_DEADLINE_S) -> re.Match[str]:
        """Return the next console line that is the pattern as a whole; seconds until it must have come."""
        end = time.monotonic() + deadline_s
        while True:
            while self._next < len(self.lines):
                line = self.lines[self._next]
                self._next += 1
                if match := pattern.fullmatch(line):
                    return match
            if not self._read(end):
                pytest.fail(f"no line like {pattern.pattern!r}; the console said:\n" + "\n".join(self.lines))

    def rest(self, deadline_s: float = EXIT_DEADLINE_S) -> list[str]:
        """Read the console to its end, which is QEMU's end; return what `expect` has not looked at."""
        end = time.monotonic() + deadline_s
        while self._read(end):
            pass
        self.process.wait(max(0.0, end - time.monotonic()))
        return self.lines[self._next :]

    def command(self, name: str) -> None:
        """Give one QMP command in a session of its own."""
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(LINE_DEADLINE_S)
            peer.connect(str(self._qmp_path))
            with peer.makefile("rw", encoding="utf-8") as stream:
                assert "QMP" in json.loads(stream.readline())
                for execute in ("qmp_capabilities", name):
                    stream.write(json.dumps({"execute": execute}) + "\n")
                    stream.flush()
                    answer = json.loads(stream.readline())
                    while "event" in answer:
                        answer = json.loads(stream.readline())
                    assert answer == {"return": {}}

    def close(self) -> None:
        """End QEMU, this one process and no other, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(EXIT_DEADLINE_S)
        self._selector.close()
        self._console.close()

    def _read(self, end: float) -> bool:
        """Read once; false at the end of the console or when the time is up."""
        if not self._selector.select(max(0.0, end - time.monotonic())):
            return False
        data = os.read(self._console.fileno(), 65536)
        *whole, self._partial = (self._partial + data).split(b"\n")
        self.lines += [line.decode(errors="replace").rstrip("\r") for line in whole]
        return bool(data)


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Callable[..., Guest]]:
    """Start a guest with these words added to the kernel command line, and QEMU options after them."""
    qemu = shutil.which(QEMU)
    if qemu is None:
        _missing(f"{QEMU} is not installed")
    for name in ("vmlinuz", "initramfs.gz"):
        if not (IMAGE / name).is_file():
            _missing(f"{IMAGE / name} is missing: run images/guest/build.sh")
    guests: list[Guest] = []

    def start(append: str = "", *options: str) -> Guest:
        qmp_path = tmp_path / f"qmp{len(guests)}"
        command = [str(qemu), "-nodefaults", "-no-user-config", "-display", "none"]
        command += ["-machine", "q35", "-accel", "tcg", "-cpu", "qemu64,-cx16", "-smp", "1", "-m", "256"]
        command += ["-kernel", str(IMAGE / "vmlinuz"), "-initrd", str(IMAGE / "initramfs.gz")]
        command += ["-append", f"{COMMAND_LINE} {append}", "-no-reboot"]
        command += ["-serial", "stdio", "-qmp", f"unix:{qmp_path},server=on,wait=off", *options]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        guests.append(Guest(process, qmp_path))
        return guests[-1]

    try:
        yield start
    finally:
        for guest in guests:
            guest.close()


def test_job_lines_and_power_button(boot: Callable[..., Guest]) -> None:
    guest = boot("edgehold.job_ms=2.5 edgehold.period_ms=100")

    up = guest.expect(UP, BOOT_DEADLINE_S)
    assert up["kernel"].endswith("-cloud-amd64")
    assert up["cpus"] == "1"
    assert float(up["uptime"]) > 0

    calibrated = guest.expect(CALIBRATED)
    assert 2.5 * 0.9 <= float(calibrated["work"]) <= 2.5 * 1.1
    assert int(calibrated["iterations"]) > 0

    for n in range(1, 8):
        job = guest.expect(JOB)
        assert int(job["n"]) == n
        assert float(job["release"]) == pytest.approx(n * 100.0, abs=0.001)
        # The work cannot be done in much less than calibrated; how much longer it takes is the host's affair.
        assert float(job["response"]) > 0.5 * 2.5

    guest.command("system_powerdown")
    guest.expect(POWER_OFF)
    assert not [line for line in guest.rest() if JOB.fullmatch(line)]
    assert guest.process.returncode == 0
    # Whatever is ours on the console is a whole line of a known form.
    ours = [line for line in guest.lines if "edgehold" in line]
    assert [line for line in ours if not any(p.fullmatch(line) for p in (UP, CALIBRATED, JOB, POWER_OFF))] == []


def test_late_jobs_keep_their_releases(boot: Callable[..., Guest]) -> None:
    """More work than period: each job waits for the one before, and its response time says so."""
    guest = boot("edgehold.job_ms=30 edgehold.period_ms=10.5")
    guest.expect(CALIBRATED, BOOT_DEADLINE_S)
    responses = []
    for n in range(1, 9):
        job = guest.expect(JOB)
        assert int(job["n"]) == n
        assert float(job["release"]) == pytest.approx(n * 10.5, abs=0.001)
        responses.append(float(job["response"]))
    assert responses == sorted(responses)
    assert responses[-1] > 8 * 30.0 * 0.5 - 7 * 10.5


def test_idle_guest_is_silent_and_powers_off(boot: Callable[..., Guest]) -> None:
    """Without a job: one line, and the button has a reader as soon as that line is there."""
    guest = boot()
    guest.expect(UP, BOOT_DEADLINE_S)
    guest.command("system_powerdown")
    guest.expect(POWER_OFF)
    guest.rest()
    assert guest.process.returncode == 0
    assert len([line for line in guest.lines if "edgehold" in line]) == 2


def test_panic_switch(boot: Callable[..., Guest]) -> None:
    guest = boot("edgehold.panic_s=0.2")
    guest.expect(UP, BOOT_DEADLINE_S)
    guest.expect(PANIC)
    guest.rest()  # panic=-1 restarts at once, and -no-reboot makes that QEMU's end
    assert guest.process.returncode == 0


@pytest.mark.parametrize("value", ["0", "10ms", "nan"])
def test_refused_job(boot: Callable[..., Guest], value: str) -> None:
    guest = boot(f"edgehold.job_ms={value}")
    guest.expect(re.compile(r"edgehold-job usage: .*"), BOOT_DEADLINE_S)
    guest.expect(re.compile(r"edgehold-guest job-ended status=64"))
    guest.command("system_powerdown")
    guest.expect(POWER_OFF)


def test_shell_on_virtio_console(boot: Callable[..., Guest], tmp_path: Path) -> None:
    path = tmp_path / "hvc0"
    guest = boot(
        "",
        *("-chardev", f"socket,id=hvc0,path={path},server=on,wait=off"),
        *("-device", "virtio-serial-pci", "-device", "virtconsole,chardev=hvc0"),
    )
    with socket.socket(socket.AF_UNIX) as terminal:
        terminal.settimeout(2)
        # Before the guest looks at the port, as vmand does: a shell on a port that nobody has opened yet reads its end.
        deadline = time.monotonic() + BOOT_DEADLINE_S
        while terminal.connect_ex(str(path)):
            assert time.monotonic() < deadline, "QEMU makes no console"
            time.sleep(0.01)
        guest.expect(UP, BOOT_DEADLINE_S)
        seen = b""
        deadline = time.monotonic() + BOOT_DEADLINE_S
        terminal.sendall(b"echo answer=$((6 * 7))\n")
        while b"answer=42" not in seen:
            try:
                data = terminal.recv(4096)
                assert data, seen
                seen += data
            except TimeoutError:
                assert time.monotonic() < deadline, seen
                # A shell that is only starting throws away what was typed before (tcsetattr(3), TCSAFLUSH).
                terminal.sendall(b"echo answer=$((6 * 7))\n")
        terminal.sendall(b"poweroff\n")
    guest.expect(POWER_OFF)
    guest.rest()
    assert guest.process.returncode == 0
