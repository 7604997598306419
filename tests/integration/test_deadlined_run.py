"""``deadlined run`` and ``deadlined recover`` as a person types them, on the real kernel."""

import contextlib
import errno
import json
import os
import pty
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from deadlined import leftovers
from edgehold.api.deadlined import DeadlinedClient, Target, TargetKind
from edgehold.kernel import procfs, sched
from edgehold.kernel.procfs import GoneError
from edgehold.kernel.sched import Flag, SchedAttr
from edgehold.testing.capability import need_command, need_root
from edgehold.testing.daemons import Daemon, private_directory
from edgehold.testing.load import Load, eventually

DEADLINED = [sys.executable, "-m", "deadlined"]
# A busy host is slow to start Python twice.
WAIT_S = 60.0
NOBODY = 65534

# Says who it is and ends with its input; "fork" and "thread" start one that sleeps.
PROGRAM = """
import os, signal, subprocess, sys, threading, time
if "count" in sys.argv:
    got = []
    signal.signal(signal.SIGINT, lambda *_: got.append(1))
print(os.getpid(), flush=True)
for line in sys.stdin:
    word = line.strip()
    if word == "fork":
        no = subprocess.DEVNULL
        one = subprocess.Popen(["sleep", "600"], stdin=no, stdout=no, stderr=no)
        print(one.pid, flush=True)
    elif word == "thread":
        ready = []
        def work(): ready.append(threading.get_native_id()); time.sleep(600)
        threading.Thread(target=work, daemon=True).start()
        while not ready: time.sleep(0.001)
        print(ready[0], flush=True)
    elif word == "got":
        print(len(got), flush=True)
    elif word.isdigit():
        os._exit(int(word))
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with private_directory() as path:
        yield path


class Run:
    """A running ``deadlined run`` with `PROGRAM` under it."""

    def __init__(self, options: Sequence[str] = (), *, prefix: Sequence[str] = (), words: Sequence[str] = ()) -> None:
        argv = [*prefix, *DEADLINED, "run", *options, "--", sys.executable, "-c", PROGRAM, *words]
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.children: list[int] = []
        self.pid = self._read()

    def _read(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def ask(self, word: str) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self._read()

    def fork(self) -> int:
        self.children.append(self.ask("fork"))
        return self.children[-1]

    def end(self, status: int = 0) -> tuple[int, str]:
        """Let the command end; the wrapper's status, and what it said."""
        _, said = self.process.communicate(f"{status}\n", timeout=WAIT_S)
        return self.process.returncode, said

    def clean(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        with contextlib.suppress(ValueError, OSError):
            self.process.communicate(timeout=WAIT_S)
        for pid in (self.pid, *self.children):
            with contextlib.suppress(ProcessLookupError, GoneError):
                sched.set_attr(pid, SchedAttr())  # a throttled one would end late
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def running(options: Sequence[str] = (), *, prefix: Sequence[str] = (), words: Sequence[str] = ()) -> Iterator[Run]:
    one = Run(options, prefix=prefix, words=words)
    try:
        yield one
    finally:
        one.clean()


def said(*arguments: str, prefix: Sequence[str] = ()) -> tuple[int, str]:
    """A whole command's status and stderr."""
    argv = [*prefix, *DEADLINED, *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=WAIT_S, check=False, stdin=subprocess.DEVNULL)
    return done.returncode, done.stderr


def is_held(tid: int) -> bool:
    attr = sched.get(tid)
    return attr.policy is sched.Policy.DEADLINE and Flag.RESET_ON_FORK in attr.flags


def ordinary(*tids: int) -> bool:
    return all(sched.without_slice(sched.get(tid)) == SchedAttr() for tid in tids)


def held(*tids: int) -> None:
    eventually(lambda: all(is_held(tid) for tid in tids), timeout_s=WAIT_S, what="held")


def own_directories() -> set[Path]:
    base = leftovers.base()
    return set(base.iterdir()) if base.is_dir() else set()


@pytest.mark.usefixtures("deadline")
def test_a_command_its_threads_and_children_are_held_while_it_runs() -> None:
    with running(["--json"], prefix=["nice", "-n", "5"]) as run:
        held(run.pid)
        thread, child = run.ask("thread"), run.fork()
        held(run.pid, thread, child)
        assert sched.get(run.process.pid).policy is sched.Policy.FIFO
        status, text = run.end(7)
        assert status == 7
        # What the command left behind lives on, by its own policy.
        assert ordinary(child)
        report = json.loads(text.splitlines()[-1])
        assert report["status"] == 7
        by_tid = {one["tid"]: one for one in report["threads"]}
        assert {run.pid, thread, child} <= by_tid.keys()
        assert by_tid[child]["name"] == "sleep"
        assert {by_tid[tid]["state"] for tid in (run.pid, thread, child)} == {"held"}


@pytest.mark.usefixtures("deadline")
def test_the_table_says_what_was_measured() -> None:
    work = "import time\nend = time.monotonic() + 3\nwhile time.monotonic() < end: sum(range(20000)); time.sleep(0.01)"
    status, text = said("run", "-v", "--cap", "0.5", "--", sys.executable, "-c", work)
    assert status == 0
    assert "executed per period" in text
    assert "held" in text
    assert "WANTED/ms" in text


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on(number: signal.Signals) -> None:
    # Python as the command would answer SIGINT by an exception.
    argv = [*DEADLINED, "run", "--", "sh", "-c", "echo $$; exec sleep 600"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as one:
        assert one.stdout is not None
        pid = int(one.stdout.readline())
        held(pid)
        one.send_signal(number)
        assert one.wait(WAIT_S) == 128 + number
        with pytest.raises(GoneError):
            procfs.stat(pid)


@pytest.mark.usefixtures("deadline")
def test_a_terminals_interrupt_reaches_the_command_once() -> None:
    need_command("setsid", "util-linux")
    program = (
        "import signal, time\n"
        "got = []\n"
        "signal.signal(signal.SIGINT, lambda *_: got.append(1))\n"
        "print('ready', flush=True)\n"
        "while not got: time.sleep(0.01)\n"
        "end = time.monotonic() + 1\n"
        "while time.monotonic() < end: time.sleep(0.01)\n"
        "print(f'got {len(got)}', flush=True)"
    )
    argv = ["setsid", "--ctty", *DEADLINED, "run", "--", sys.executable, "-c", program]
    master, slave = pty.openpty()
    try:
        with subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave) as one:
            os.close(slave)
            try:
                shown = shown_by(master, until=b"ready")
                os.write(master, b"\x03")
                shown += shown_by(master)
                assert one.wait(WAIT_S) == 0
            finally:
                one.terminate()
    finally:
        os.close(master)
    assert b"got 1\r\n" in shown
    assert b"deadlined: " in shown  # a terminal gets the table


def shown_by(terminal: int, *, until: bytes = b"") -> bytes:
    """What a terminal shows until these words, or until nobody has it open any more."""
    seen = b""
    while not until or until not in seen:
        assert select.select([terminal], [], [], WAIT_S)[0], seen
        try:
            seen += os.read(terminal, 4096)
        except OSError as error:
            assert error.errno == errno.EIO  # noqa: PT017 - how a terminal ends
            break
    return seen


@pytest.mark.usefixtures("deadline")
def test_the_command_begins_as_if_nobody_was_in_between() -> None:
    look = (
        "import json, os, resource, signal\n"
        "blocked = [int(line.split()[1], 16) for line in open('/proc/self/status') if line.startswith('SigBlk')][0]\n"
        "print(json.dumps([blocked, signal.getsignal(signal.SIGHUP), resource.getrlimit(resource.RLIMIT_NOFILE),\n"
        "    os.getppid(), sorted(int(fd) for fd in os.listdir('/proc/self/fd'))[:3], os.environ.get('MARK')]))"
    )
    argv = [*DEADLINED, "run", "--", sys.executable, "-c", look]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = min(soft, 512)
    one = subprocess.Popen(
        ["prlimit", f"--nofile={few}:{hard}", "nohup", *argv],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | {"MARK": "x"},
    )  # fmt: skip
    out, _ = one.communicate(timeout=WAIT_S)
    blocked, hangup, limits, parent, fds, mark = json.loads(out)
    assert (blocked, hangup, limits, parent, fds, mark) == (
        0, signal.SIG_IGN, [few, hard], one.pid, [0, 1, 2], "x",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["nosuchprogram"], 127, "nosuchprogram: not found"),
        (["/tmp"], 126, "/tmp: Permission denied"),
        ([], 125, "Missing argument"),
        (["--bogus", "true"], 125, "--bogus"),
        (["--budget-ms", "200", "true"], 125, "--budget-ms"),
        (["--cap", "2", "true"], 125, "--cap"),
        (["--period-ms", "10", "--min-budget-ms", "9", "true"], 125, "--min-budget-ms"),
    ],
)
def test_what_can_not_be_run_is_told_as_by_a_shell(arguments: list[str], status: int, text: str) -> None:
    need_root()
    before = own_directories()
    found, told = said("run", *arguments)
    assert found == status, told
    assert text in told
    assert "Traceback" not in told
    assert own_directories() <= before


@pytest.mark.usefixtures("deadline")
def test_a_command_that_is_over_at_once_is_no_fault() -> None:
    assert said("run", "--", "true") == (0, "")
    assert said("run", "--", "sh", "-c", "kill -9 $$") == (137, "")


def test_without_privilege_nothing_is_started_but_a_dry_run_is(directory: Path) -> None:
    need_root()
    need_command("setpriv", "util-linux")
    powerless = ["setpriv", "--bounding-set=-sys_nice", "--inh-caps=-all"]
    mark = directory / "mark"
    status, text = said("run", "--", "touch", str(mark), prefix=powerless)
    assert status == 125
    assert "denied" in text
    assert "CAP_SYS_NICE" in text
    assert not mark.exists()
    status, text = said("run", "--json", "--", "touch", str(mark), prefix=powerless)
    assert (status, json.loads(text)["error"]["code"]) == (125, "denied")

    with running(["--dry-run", "--json"], prefix=powerless) as run:
        child = run.fork()
        assert ordinary(run.pid, child)
        eventually(lambda: Path(f"/proc/{run.process.pid}").exists(), timeout_s=WAIT_S, what="it runs")
        status, text = run.end(3)
        assert status == 3
        assert {one["state"] for one in json.loads(text.splitlines()[-1])["threads"]} <= {"watched"}


def test_a_pinned_command_is_refused_with_the_cure() -> None:
    need_root()
    cpu = min(os.sched_getaffinity(0))
    if os.cpu_count() == 1:
        pytest.skip("one CPU: nobody is pinned here")
    status, text = said("run", "--", "true", prefix=["taskset", "--cpu-list", str(cpu)])
    assert status == 125
    assert "EPERM" in text


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize("how", ["recover", "recover as the daemon's user", "run"])
def test_what_a_killed_run_left_is_put_right(how: str, directory: Path) -> None:
    state, config = directory / "state", directory / "deadlined.toml"
    config.write_text(f'state_dir = "{state}"\n')
    state.mkdir(mode=0o700)
    if how == "recover as the daemon's user":
        need_command("setpriv", "util-linux")
        os.chown(state, NOBODY, NOBODY)
    with running(prefix=["nice", "-n", "5"]) as run:
        held(run.pid)
        child = run.fork()
        held(run.pid, child)
        left = leftovers.base() / f"{run.process.pid}.{procfs.stat(run.process.pid).start_ticks}"
        assert left.is_dir()
        # One that lives is left alone.
        assert said("recover", "--config", str(config))[0] == 0
        assert is_held(run.pid)
        run.process.kill()
        run.process.wait(WAIT_S)
        assert is_held(child)
        status, told = said("run", "--", "true") if how == "run" else said("recover", "--config", str(config))
        assert status == 0, told
        assert ordinary(child)
        assert sched.without_slice(sched.get(run.pid)) == SchedAttr(nice=5)
        assert not left.exists()
    assert {one.stat().st_uid for one in state.iterdir()} <= {state.stat().st_uid}


@pytest.mark.usefixtures("deadline")
async def test_recover_is_for_when_no_daemon_runs(directory: Path, load: Load) -> None:
    daemon = Daemon(
        "deadlined",
        directory=directory,
        settings={"socket": str(directory / "api.sock"), "state_dir": str(directory / "state")},
    )
    await daemon.start()
    try:
        pid = load.sleeper().pid
        async with DeadlinedClient(directory / "api.sock") as client:
            await client.attach(Target(kind=TargetKind.PROCESS, id=pid))
        status, text = said("recover", "--config", str(daemon.config))
        assert status == 75
        assert "another deadlined uses it" in text
        assert is_held(pid)
        await daemon.kill()
        argv = [*DEADLINED, "recover", "--config", str(daemon.config)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=WAIT_S, check=False)  # noqa: ASYNC221
        assert (done.returncode, done.stdout) == (0, "restored: 1 threads, 0 groups; killed runs found: 0\n"), done
        assert ordinary(pid)
    finally:
        await daemon.kill()
