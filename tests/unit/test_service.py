"""The run loop in a real process: what systemd would see."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

HEAD = """
import asyncio, contextlib, sys
from edgehold.errors import SettingsError, UnavailableError, UnsupportedError
from edgehold.service import run
@contextlib.asynccontextmanager
async def lifespan(runtime):
"""


class Manager:
    """The service manager's side: starts the daemon, hears what it notifies."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(20)
        self.path = path
        self.process: subprocess.Popen[str] | None = None

    def start(self, body: str, *, drain_s: float = 5.0, **environ: str) -> subprocess.Popen[str]:
        code = (
            HEAD
            + textwrap.indent(textwrap.dedent(body), "    ")
            + f"\nsys.exit(run('test', lifespan, drain_s={drain_s}))"
        )
        env = os.environ | {"NOTIFY_SOCKET": str(self.path)} | environ
        self.process = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)
        return self.process

    def hear(self) -> str:
        return self.socket.recv(1000).decode()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    one = Manager(tmp_path / "n")
    yield one
    one.socket.close()
    if one.process is not None:
        one.process.kill()
        one.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ready_then_an_orderly_stop(manager: Manager, number: signal.Signals) -> None:
    process = manager.start("""
        yield
        print("drained", file=sys.stderr)
    """)
    assert manager.hear() == "READY=1"
    process.send_signal(number)
    assert manager.hear() == "STOPPING=1"
    _out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "drained" in err


def test_watchdog_beats(manager: Manager) -> None:
    process = manager.start("yield", WATCHDOG_USEC="20000")
    heard = [manager.hear() for _ in range(4)]
    assert sorted(set(heard)) == ["READY=1", "WATCHDOG=1"]
    process.terminate()
    process.communicate(timeout=20)


@pytest.mark.parametrize("ending", ["raise ZeroDivisionError", "return"])
def test_a_dead_task_ends_the_process(manager: Manager, ending: str) -> None:
    process = manager.start(f"""
        async def task():
            {ending}
        runtime.spawn(task(), name="the sampler")
        yield
    """)
    _out, err = process.communicate(timeout=20)
    assert process.returncode == 70
    assert "the task 'the sampler' ended" in err


def test_the_stop_is_bounded(manager: Manager) -> None:
    process = manager.start(
        """
        yield
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)
        """,
        drain_s=0.2,
    )
    assert manager.hear() == "READY=1"
    process.terminate()
    try:
        process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 70


def test_a_stop_before_ready_is_obeyed(manager: Manager) -> None:
    process = manager.start("""
        print("starting", file=sys.stderr, flush=True)
        await asyncio.sleep(3600)
        yield
    """)
    assert process.stderr is not None
    assert process.stderr.readline() == "starting\n"
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_wrong_usage_is_64_and_the_version_is_told() -> None:
    code = "from edgehold.service import daemon_arguments as d; d('vmand', 'Partitions.')"
    done = subprocess.run([sys.executable, "-c", code, "--bogus"], capture_output=True, text=True, check=False)
    assert (done.returncode, "vmand --help says more" in done.stderr) == (64, True)
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "vmand (edgehold) 0.1.0\n")


def test_wrong_settings_are_not_restarted(manager: Manager) -> None:
    process = manager.start('raise SettingsError("a.toml: pool.cores: unknown key")\nyield')
    _out, err = process.communicate(timeout=20)
    assert process.returncode == 78
    assert err == "test: a.toml: pool.cores: unknown key\n"


def test_a_start_that_fails_says_why(manager: Manager) -> None:
    process = manager.start('raise UnavailableError("/run/x: another process listens there")\nyield')
    _out, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "can't start: /run/x: another process listens there" in err


def test_what_this_version_cannot_read_is_not_restarted(manager: Manager) -> None:
    process = manager.start('raise UnsupportedError("a.db: written by a newer test")\nyield')
    _out, err = process.communicate(timeout=20)
    assert process.returncode == 78
    assert "can't start: a.db: written by a newer test" in err


def test_reload_keeps_the_old_settings_when_refused(manager: Manager) -> None:
    process = manager.start("""
        def reload():
            runtime.stop()
            raise SettingsError("a.toml: name: wrong")
        runtime.on_reload(reload)
        yield
    """)
    assert manager.hear() == "READY=1"
    process.send_signal(signal.SIGHUP)
    _out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "reload refused, the old settings stay: a.toml: name: wrong" in err
