"""Checks that hold for every test: nothing that it started is left behind."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio


def children() -> set[int]:
    """The living children of this process (proc(5), task/TID/children; zombies count: somebody forgot to wait)."""
    found: set[int] = set()
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
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
