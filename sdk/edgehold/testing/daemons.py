"""Runs a real daemon in a private directory: for tests and for the demo. Ends only the process that it started.

with private_directory() as directory:
    daemon = Daemon("vmand", directory=directory, settings={"runtime_dir": str(directory / "run")})
    await daemon.start()
    …
    await daemon.stop()
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgehold.errors import FailedError


def toml(settings: Mapping[str, Any], prefix: str = "") -> str:
    """Settings as TOML: texts, numbers, booleans, lists of them, tables. A JSON text is a TOML basic string."""
    named = {key: _tables(value) for key, value in settings.items()}
    plain = [f"{key} = {json.dumps(value)}" for key, value in settings.items() if not named[key]]
    tables = [
        f"\n[[{prefix}{key}]]\n{toml(one, f'{prefix}{key}.')}"
        if isinstance(settings[key], list)
        else f"\n[{prefix}{key}]\n{toml(one, f'{prefix}{key}.')}"
        for key, ones in named.items()
        for one in ones
    ]
    return "\n".join([*plain, *tables]) + "\n"


def _tables(value: object) -> list[Mapping[str, Any]]:
    """The tables that a value is written as; none where it is written behind its key."""
    if isinstance(value, Mapping):
        return [value]
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


@contextlib.contextmanager
def private_directory(prefix: str = "eh-") -> Iterator[Path]:
    """A new directory, mode 0700, with a path short enough for unix sockets in it (107 bytes); removed at the end."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))  # not TMPDIR, which may be long
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class Daemon:
    """One daemon as a child process, run as ``python -m MODULE --config DIRECTORY/MODULE.toml``.

    Its stderr goes to ``DIRECTORY/MODULE.log`` (appended over restarts).
    """

    def __init__(
        self,
        module: str,
        *,
        directory: Path,
        settings: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        self.module = module
        self.directory = directory
        self.config = directory / f"{module}.toml"
        self.log = directory / f"{module}.log"
        self.config.write_text(toml(settings), encoding="utf-8")
        self._environment = dict(environment or {})
        self._arguments = list(arguments)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process' id; valid until `stop` or `kill` returns."""
        if self._process is None:
            raise RuntimeError(f"{self.module} is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process is not None and self._process.poll() is None

    def log_text(self) -> str:
        """What the daemon has logged so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def rss_kib(self) -> int:
        """Resident memory (VmRSS of /proc/PID/status) in KiB."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))

    def spawn(self, *, notify: str = "") -> None:
        """Start the process without waiting for anything."""
        if self.running:
            raise RuntimeError(f"{self.module} runs already")
        environment = {**os.environ, **self._environment}
        environment.pop("NOTIFY_SOCKET", None)
        if notify:
            environment["NOTIFY_SOCKET"] = notify
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module, "--config", str(self.config), *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for whoever started it, who then stops it in order
            )

    async def start(self, *, timeout_s: float = 30.0) -> None:
        """Start the daemon and wait for its READY=1.

        Raises:
            FailedError: it ended, or said nothing in time; the text has the end of its log.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as ready:
            ready.bind("")  # autobind: an abstract address that nobody else has (unix(7))
            self.spawn(notify="@" + ready.getsockname()[1:].decode())
            process = self._process
            assert process is not None  # noqa: S101 - spawn has just set it
            said = asyncio.create_task(self._wait_ready(ready))
            ended = asyncio.create_task(_ended(process.pid))
            await asyncio.wait({said, ended}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            good = said.done() and said.exception() is None and not ended.done()
            for task in (said, ended):
                task.cancel()
            await asyncio.gather(said, ended, return_exceptions=True)
            if not good:
                status = process.poll()
                await self.kill()
                what = f"ended with status {status}" if status is not None else f"was not ready within {timeout_s:g} s"
                raise FailedError(f"{self.module} {what}:\n{self.log_text()[-2000:]}")

    async def stop(self, *, timeout_s: float = 20.0) -> int:
        """SIGTERM, then wait. Returns the exit status.

        Raises:
            FailedError: it did not end in time (and was killed).
        """
        return await self._end(signal.SIGTERM, timeout_s)

    async def kill(self) -> None:
        """SIGKILL, then wait; does nothing where it has ended."""
        await self._end(signal.SIGKILL, 20.0)

    async def wait(self, *, timeout_s: float) -> int:
        """Until the process ends by itself. Returns its exit status.

        Raises:
            TimeoutError: it did not.
        """
        process = self._process
        if process is None:
            return 0
        if process.poll() is None:
            async with asyncio.timeout(timeout_s):
                await _ended(process.pid)
        return process.wait()

    async def _end(self, number: signal.Signals, timeout_s: float) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        if process.poll() is None:
            process.send_signal(number)  # our own child, not waited for yet: the pid can't be another's
            try:
                async with asyncio.timeout(timeout_s):
                    await _ended(process.pid)
            except TimeoutError:
                process.kill()
                process.wait()
                raise FailedError(
                    f"{self.module} did not end within {timeout_s:g} s:\n{self.log_text()[-2000:]}"
                ) from None
        return process.wait()

    @staticmethod
    async def _wait_ready(sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while b"READY=1" not in (await loop.sock_recv(sock, 4096)).split(b"\n"):
            pass


async def _ended(pid: int) -> None:
    """Until a child that nobody has waited for yet ends (pidfd_open(2): readable then)."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    fd = os.pidfd_open(pid)
    loop.add_reader(fd, _set, done)
    try:
        await done
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
