"""Attachments that wait for their target: in the list from the start on, with the reason, until it is there."""

import asyncio
import errno
from collections.abc import Awaitable, Callable

import pytest

from deadlined import standing
from deadlined.held import Attached
from deadlined.rules import rule_config
from deadlined.standing import PendingSource, open_in_time
from deadlined.targets import Source
from edgehold.api.deadlined import Policy, Target, TargetKind
from edgehold.errors import NotFoundError, UnavailableError

TARGET = Target(kind=TargetKind.UNIT, name="nginx.service")


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "_FIRST_RETRY_S", 0.001)
    monkeypatch.setattr(standing, "_LAST_RETRY_S", 0.002)


def attached() -> Attached:
    return Attached(
        id=3, target=TARGET, policy=Policy(), config=rule_config(Policy()), source=PendingSource(TARGET), begun=0
    )


class Opened:
    """Opens a target as a test wants it: fails with each of these, one after the other, then gives a source."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.source: Source = PendingSource(TARGET)
        self.tried = asyncio.Event()

    async def __call__(self) -> Source:
        await asyncio.sleep(0)
        self.tried.set()
        if self.errors:
            raise self.errors.pop(0)
        return self.source


def followed(into: list[Source]) -> Callable[[Attached, Source], None]:
    def follow(one: Attached, source: Source) -> None:
        into.append(source)
        one.source = source

    return follow


def test_it_is_listed_without_threads() -> None:
    one = attached()
    message = one.message(5)
    assert (message.id, message.threads, message.cycles) == (3, (), 5)
    assert message.reason == "unit nginx.service is being looked for"
    one.source.forget(1)
    one.source.close()
    assert (one.source.changed(), one.source.tids(), one.source.over, one.source.suspended) == (False, (), "", False)


async def test_it_is_followed_when_it_is_there() -> None:
    one, opened, into = attached(), Opened(), list[Source]()
    await asyncio.wait_for(open_in_time(one, opened, followed(into)), 20)
    assert into == [opened.source]


async def test_every_failure_is_waited_out_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    away = UnavailableError("vmand is away")
    opened = Opened(away, away, NotFoundError("no such unit"), OSError(errno.EACCES, "Permission denied"))
    one, into = attached(), list[Source]()
    await asyncio.wait_for(open_in_time(one, opened, followed(into)), 20)
    assert into == [opened.source]
    assert [record.getMessage().partition("wait: ")[2] for record in caplog.records] == [
        "vmand is away",
        "no such unit",
        "[Errno 13] Permission denied",
    ]


async def test_the_reason_is_in_the_list_meanwhile() -> None:
    class Never:
        tried = asyncio.Event()

        async def __call__(self) -> Source:
            if self.tried.is_set():
                waiting.set()
            self.tried.set()
            raise UnavailableError("libvirt is away")

    one, waiting = attached(), asyncio.Event()
    task = asyncio.create_task(open_in_time(one, Never(), followed([])))
    await asyncio.wait_for(waiting.wait(), 20)
    assert one.message(0).reason == "libvirt is away"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert isinstance(one.source, PendingSource)


async def test_detached_while_it_is_asked() -> None:
    """Cancelled in the middle, nothing is followed."""
    begun, into = asyncio.Event(), list[Source]()

    async def opened() -> Source:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    task = asyncio.create_task(open_in_time(attached(), opened, followed(into)))
    await asyncio.wait_for(begun.wait(), 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert into == []


async def test_one_that_is_followed_already_is_left_alone() -> None:
    def must_not(*_values: object) -> Awaitable[Source]:
        raise AssertionError

    one = attached()
    one.source = _Real()
    await open_in_time(one, must_not, lambda _one, _source: None)


class _Real:
    over = reason = ""
    suspended = False

    def changed(self) -> bool:
        return False

    def tids(self) -> tuple[int, ...]:
        return ()

    def forget(self, tid: int) -> None:
        raise AssertionError(tid)

    def close(self) -> None:
        raise AssertionError
