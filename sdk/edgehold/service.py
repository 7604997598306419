"""The run loop of every daemon: signals, readiness, the watchdog's heartbeat, one owner of all tasks, a bounded stop.

A daemon is an async context manager: entering it makes it ready, leaving it drains it. Whatever runs in between is
spawned on the `Runtime`, and a task that ends is a fault of the whole: the process exits and systemd restarts it.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, NoReturn

from edgehold import __version__
from edgehold.clock import Clock, SystemClock
from edgehold.errors import EX_CONFIG, EX_SOFTWARE, EX_USAGE, EdgeholdError, SettingsError, UnsupportedError
from edgehold.systemd.notify import Notifier

log = logging.getLogger(__name__)

Lifespan = Callable[["Runtime"], contextlib.AbstractAsyncContextManager[None]]


class Runtime:
    """What a daemon gets: a clock, and an owner for its tasks."""

    def __init__(self, name: str, *, clock: Clock | None = None) -> None:
        self.name = name
        self.clock = clock or SystemClock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reload: list[Callable[[], None]] = []
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def spawn(self, coro: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        """Run a task for the daemon's whole life. If it ends before the stop, the daemon exits with status 70."""
        task = asyncio.create_task(coro, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def on_reload(self, callback: Callable[[], None]) -> None:
        """Call it on SIGHUP; an `EdgeholdError` that it raises is logged and the old settings stay."""
        self._reload.append(callback)

    def stop(self, status: int = 0) -> None:
        """Begin the stop, with the process' exit status."""
        if not self._ended.done():
            self._ended.set_result(status)

    async def wait(self) -> int:
        """Until a stop is asked for; the exit status."""
        return await asyncio.shield(self._ended)

    async def cancel_tasks(self) -> None:
        """Cancel what was spawned, and wait for it."""
        for task in list(self._tasks):
            task.remove_done_callback(self._task_done)
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    def reload(self) -> None:
        """What SIGHUP does."""
        if not self._reload:
            log.info("SIGHUP: nothing can be reloaded; restart to take new settings")
        for callback in self._reload:
            try:
                callback()
            except EdgeholdError as error:
                log.error("reload refused, the old settings stay: %s", error)  # noqa: TRY400 - the text is the message

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        log.critical("the task %r ended; the daemon can't go on", task.get_name(), exc_info=error)
        self.stop(EX_SOFTWARE)


@contextlib.asynccontextmanager
async def _signals(runtime: Runtime) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, runtime.stop)
    loop.add_signal_handler(signal.SIGHUP, runtime.reload)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)


async def _heartbeat(notifier: Notifier, every_s: float) -> None:
    while True:
        notifier.watchdog()
        await asyncio.sleep(every_s)


async def _serve(name: str, lifespan: Lifespan, notifier: Notifier, drain_s: float) -> int:
    runtime = Runtime(name)
    async with _signals(runtime):
        alive = lifespan(runtime)
        if not await _started(runtime, alive):
            return await runtime.wait()
        if notifier.watchdog_s is not None:
            runtime.spawn(_heartbeat(notifier, notifier.watchdog_s), name="watchdog")
        notifier.ready()
        log.info("ready")
        status = await runtime.wait()
        notifier.stopping()
        log.info("stopping")
        drain = asyncio.create_task(_drain(runtime, alive), name="drain")
        # Not asyncio.timeout: it would wait for a task that swallows its cancellation.
        if not (await asyncio.wait({drain}, timeout=drain_s))[0]:
            # Crash-only: what did not end in time is ended, and the next start finds the right state in the journal.
            log.critical("not drained within %g s, ending by force", drain_s)
            logging.shutdown()
            os._exit(EX_SOFTWARE)
        await drain
        return status


async def _started(runtime: Runtime, alive: contextlib.AbstractAsyncContextManager[None]) -> bool:
    """Whether the daemon came up; not if it was told to stop before. Starting may take long: a peer may hang."""
    starting = asyncio.ensure_future(alive.__aenter__())
    stopping = asyncio.ensure_future(runtime.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not starting.done():
        starting.cancel()
        log.info("told to stop before it was ready")
    try:
        await starting
    except asyncio.CancelledError:
        return False
    return True


async def _drain(runtime: Runtime, alive: contextlib.AbstractAsyncContextManager[None]) -> None:
    await alive.__aexit__(None, None, None)
    await runtime.cancel_tasks()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EX_USAGE, f"{self.prog}: {message}; {self.prog} --help says more\n")


def daemon_arguments(name: str, description: str) -> argparse.Namespace:
    """A daemon's command line: ``config`` (a path or None) and ``check_config``. Wrong usage ends with 64."""
    parser = _Parser(
        prog=name,
        description=description,
        epilog="Exit status: 0 stopped when told so, 1 no start, 64 wrong usage, 70 a task died, 78 wrong "
        "settings or state of a newer version.",
    )
    parser.add_argument("--config", type=Path, help=f"settings (default: /etc/edgehold/{name}.toml, where it exists)")
    parser.add_argument("--check-config", action="store_true", help="read and check the settings, say so, and exit")
    parser.add_argument("--version", action="version", version=f"{name} (edgehold) {__version__}")
    return parser.parse_args()


def take_descriptors() -> None:
    """As many as this process may have: each guest, client and console takes some (getrlimit(2))."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run(name: str, lifespan: Lifespan, *, drain_s: float = 10.0) -> int:
    """Run a daemon until it is told to stop. Returns the process' exit status.

    0: stopped by SIGTERM or SIGINT. 70: a task died. 78: the settings are wrong, or the state on the disk is one that
    this version can't read (a unit does not restart on it). 1: it could not start for another reason that a person can
    act on.
    """
    try:
        return asyncio.run(_serve(name, lifespan, Notifier(), drain_s))
    except SettingsError as error:
        print(f"{name}: {error}", file=sys.stderr)  # noqa: T201 - systemctl status shows the last line of stderr
        return EX_CONFIG
    except EdgeholdError as error:
        log.critical("can't start: %s", error)
        return EX_CONFIG if isinstance(error, UnsupportedError) else 1
