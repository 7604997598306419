"""The ABI of /dev/vmanager against the seccomp double: the cases of tests/vmanager in a process that it answers.

The double is also a program of its own, with a command's life to look after.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgehold.kernel.vmanager import Cap
from edgehold.testing.vmanager import PATIENCE_S, ROOT, Double

PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rs"]
CASES = ROOT / "tests" / "vmanager"
OPEN = "import sys; from edgehold.kernel.vmanager import Manager; manager = Manager.open(sys.argv[1]); "


@pytest.fixture
def double(tmp_path: Path) -> Double:
    return Double.build(tmp_path)


@pytest.mark.parametrize(
    "caps",
    [
        pytest.param(None, id="all"),
        pytest.param(Cap(0), id="nothing"),
        pytest.param(Cap.KEEP | Cap.SECURE | Cap.CLEARS, id="static"),
    ],
)
def test_the_cases(double: Double, caps: Cap | None) -> None:
    done = double.run([*PYTEST, str(CASES)], caps=caps, timeout_s=600)
    assert done.returncode == 0, done.stdout
    if caps is None:
        assert "this firmware has no" not in done.stdout, "a case was passed over"
    assert " passed" in done.stdout


def test_the_exit_status_is_the_command_s(double: Double) -> None:
    assert double.run(["sh", "-c", "exit 3"]).returncode == 3
    assert double.run(["sh", "-c", "kill -KILL $$"]).returncode == 128 + signal.SIGKILL
    assert double.run(["/nonexistent"]).returncode == 127


def test_sigterm_reaches_the_command(double: Double) -> None:
    with subprocess.Popen(double.command(["sh", "-c", "echo here; read line"]), stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM


def test_the_command_ends_with_the_double(double: Double) -> None:
    """Nobody would answer its calls any more."""
    code = f"{OPEN} import os; print(os.getpid(), flush=True); sys.stdin.read()"
    argv = double.command([sys.executable, "-c", code, str(double.device.path)])
    with subprocess.Popen(argv, stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        pidfd = os.pidfd_open(int(process.stdout.readline()))
        process.kill()
        assert process.stdout.read() == b""
    os.close(pidfd)


def test_children_are_served_and_other_files_are_left_alone(double: Double, tmp_path: Path) -> None:
    (tmp_path / "vmanager2").write_text("a file")
    code = (
        "import fcntl, os, subprocess, sys\n"
        "device, other = sys.argv[1], sys.argv[2]\n"
        "if len(sys.argv) == 3:\n"
        "    assert open(other).read() == 'a file'\n"
        "    try: fcntl.ioctl(0, 0xC060BE00, bytearray(96))\n"
        "    except OSError as error: assert error.errno == 25, error\n"  # ENOTTY
        "    sys.exit(subprocess.run([sys.executable, *sys.orig_argv[1:], 'child']).returncode)\n"
        "from edgehold.kernel.vmanager import Manager\n"
        "print(Manager.open(device).info().max_partitions)\n"
    )
    done = double.run([sys.executable, "-c", code, str(double.device.path), str(tmp_path / "vmanager2")])
    assert (done.returncode, done.stdout) == (0, "16\n")


def test_usage_is_told(double: Double) -> None:
    for argv in ([], ["--device", "/x/other", "--", "true"], ["--device", "/x/vmanager", "--what", "1", "--", "true"]):
        done = subprocess.run([double.program, *argv], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.startswith("usage: ")) == (64, True)


def test_faults_that_can_t_be_read_end_it(double: Double) -> None:
    assert double.device.control is not None
    (double.device.control / "faults").write_text("nonsense\n")
    done = double.run([sys.executable, "-c", OPEN, str(double.device.path)])
    assert done.returncode == 70
    assert "nonsense" in done.stdout
