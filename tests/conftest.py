"""Checks that hold for every test: nothing that it started is left behind."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

# Whoever runs the tests in the background may have signals ignored or blocked, and children inherit that (signal(7)).
signal.pthread_sigmask(signal.SIG_SETMASK, ())
for _one in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
    if signal.getsignal(_one) is signal.SIG_IGN:
        signal.signal(_one, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def children() -> set[int]:
    """The living children of this process (proc(5), task/TID/children; zombies count: somebody forgot to wait)."""
    found: set[int] = set()
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile
            found.update(int(pid) for pid in (task / "children").read_text().split())
    return found


@pytest_asyncio.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    """Fail a test that leaves a task or a child process behind."""
    before = children()
    yield
    me = asyncio.current_task()
    left = [task for task in asyncio.all_tasks() if task is not me and not task.done()]
    own = [task for task in left if "pytest_asyncio" not in repr(task.get_coro())]
    assert not own, f"tasks left behind: {own}"
    assert not children() - before, f"child processes left behind: {children() - before}"
