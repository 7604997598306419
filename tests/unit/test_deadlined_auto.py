"""Finding periods by themselves: who is looked at and when, what becomes of an answer, and when it is given up. The
observer and the monitor are replaced; nobody's switches are recorded."""

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, cast

import pytest
import pytest_asyncio

from deadlined.auto import Periods
from deadlined.held import Attached, Thread
from deadlined.periods import Inference
from deadlined.rules import RuleConfig, rule_config
from deadlined.standing import PendingSource
from edgehold.api.deadlined import PeriodOrigin, Policy, Target, TargetKind, ThreadState
from edgehold.errors import DeniedError, NoCapacityError
from edgehold.kernel.native_held import HeldTable
from edgehold.kernel.procfs import GoneError

if TYPE_CHECKING:
    from deadlined.monitor import Monitor
    from deadlined.observer import Observer

MS = 1_000_000
TARGET = Target(kind=TargetKind.PROCESS, id=1)
AUTO = Policy(period_ns="auto")
NOTHING = Inference(None, reason="it does not wake up")


class World:
    """A monitor with threads, and an observer that answers what a test says, when it says so."""

    def __init__(self) -> None:
        self.auto: dict[int, Attached] = {}
        self.number = 0
        self.table = HeldTable(history=1, cycle_ns=500 * MS, short_ns=0)
        self.observed: list[int] = []
        self.set: list[tuple[int, int]] = []
        """Whose period was set, and to what."""
        self.refuse = False
        self.gone = False
        self.answers: asyncio.Queue[Inference | Exception] = asyncio.Queue()

    async def observe(self, tid: int) -> Inference:
        self.observed.append(tid)
        answer = await self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def reconfigure(self, thread: Thread, _one: Attached, config: RuleConfig) -> None:
        if self.gone:
            raise GoneError("it ended")
        self.set.append((thread.tid, config.period_ns))
        if not self.refuse:
            thread.config = config

    def attach(self, policy: Policy = AUTO) -> Thread:
        """One thread that is held and had a window."""
        self.number += 1
        number = self.number
        config = rule_config(policy)
        one = Attached(id=number, target=TARGET, policy=policy, config=config, source=PendingSource(TARGET), begun=0)
        thread = Thread(2**30 + number, 1, "x", config, self.table)
        thread.state = ThreadState.HELD
        thread.period_origin = PeriodOrigin.OBSERVING if policy.period_ns == "auto" else PeriodOrigin.GIVEN
        thread.row = self.table.add(
            tid=thread.tid, fd=-1, owner=number, start_ticks=1, rule=config.raw(), budget_ns=10 * MS
        )
        thread.cells.windows = 1000
        one.threads[thread.tid] = thread
        if policy.period_ns == "auto":
            self.auto[number] = one
        return thread

    async def turns(self, number: int = 20) -> None:
        """Let the task have some turns, in which it could do what it must not."""
        for _ in range(number):
            await asyncio.sleep(0.001)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - attributes, which set no event
            await asyncio.sleep(0.001)


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    one = World()
    periods = Periods(cast("Monitor", one), cast("Observer", one))

    async def cycles() -> None:
        while True:
            await asyncio.sleep(0.001)
            periods.look()

    task = asyncio.create_task(cycles())
    yield one
    assert not task.done(), task
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await periods.close()


async def test_a_clear_period_is_set_and_marked(world: World) -> None:
    thread = world.attach()
    world.answers.put_nowait(Inference(40 * MS, confidence=0.97))
    await until(lambda: thread.period_origin == PeriodOrigin.INFERRED)
    assert world.set == [(thread.tid, 40 * MS)]
    assert (thread.config.period_ns, thread.config.initial_budget_ns) == (40 * MS, 4 * MS)
    assert thread.confidence == 0.97
    await world.turns()
    assert world.observed == [thread.tid]  # once


async def test_who_is_not_looked_at(world: World) -> None:
    """Given a period; not sampled; before its first window; saturated; suspended."""
    world.attach(Policy())
    for number in range(4):
        thread = world.attach()
        if number == 0:
            thread.row = -1
        elif number == 1:
            thread.cells.windows = 0
        elif number == 2:
            thread.cells.sizing.saturated = 1
        else:
            world.auto[5].suspended = True
    await world.turns()
    assert world.observed == []


async def test_one_that_is_no_longer_saturated_is(world: World) -> None:
    thread = world.attach()
    thread.cells.sizing.saturated = 1
    await world.turns()
    thread.cells.sizing.saturated = 0
    await until(lambda: world.observed)
    assert world.observed == [thread.tid]


async def test_what_the_present_period_is_already_is_no_change(world: World) -> None:
    thread = world.attach()
    world.answers.put_nowait(Inference(round(100.4 * MS), confidence=1.0))
    await until(lambda: thread.period_origin == PeriodOrigin.INFERRED)
    assert world.set == []
    assert thread.config.period_ns == 100 * MS


async def test_no_clear_period_is_unknown_after_five_tries(world: World, caplog: pytest.LogCaptureFixture) -> None:
    thread = world.attach()
    caplog.set_level("INFO")
    for number in range(1, 6):
        await until(lambda number=number: len(world.observed) == number)  # type: ignore[misc]
        assert thread.period_origin is PeriodOrigin.OBSERVING
        world.answers.put_nowait(NOTHING)
    await until(lambda: thread.period_origin == PeriodOrigin.UNKNOWN)
    assert thread.reason == "period unknown: it does not wake up"
    assert "its period is unknown: it does not wake up" in caplog.text
    await world.turns()
    assert len(world.observed) == 5
    assert world.set == []


async def test_a_note_of_the_first_tries_goes_when_it_is_found(world: World) -> None:
    thread = world.attach()
    world.answers.put_nowait(NOTHING)
    await until(lambda: thread.reason == "period unknown: it does not wake up")
    world.answers.put_nowait(Inference(100 * MS, confidence=1.0))
    await until(lambda: thread.period_origin == PeriodOrigin.INFERRED)
    assert thread.reason == ""


async def test_other_reasons_are_not_hidden(world: World) -> None:
    thread = world.attach()
    thread.reason = "less: the host is full"
    world.answers.put_nowait(NOTHING)
    world.answers.put_nowait(Inference(40 * MS, confidence=1.0))
    await until(lambda: thread.period_origin == PeriodOrigin.INFERRED)
    assert thread.reason == "less: the host is full"


async def test_a_refusal_for_good_is_unknown_at_once(world: World) -> None:
    thread = world.attach()
    world.answers.put_nowait(DeniedError("it needs CAP_PERFMON"))
    await until(lambda: thread.period_origin == PeriodOrigin.UNKNOWN)
    assert thread.reason == "period unknown: it needs CAP_PERFMON"
    assert len(world.observed) == 1


async def test_what_is_short_for_a_moment_is_tried_again(world: World) -> None:
    thread = world.attach()
    world.answers.put_nowait(NoCapacityError("no descriptor"))
    world.answers.put_nowait(Inference(40 * MS, confidence=1.0))
    await until(lambda: thread.period_origin == PeriodOrigin.INFERRED)
    assert len(world.observed) == 2


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
async def test_a_drain_that_is_short_of_something_is_no_try(world: World, number: int) -> None:
    thread = world.attach()
    for _ in range(7):
        world.answers.put_nowait(OSError(number, "can't"))
    world.answers.put_nowait(Inference(40 * MS, confidence=1.0))
    await until(lambda: thread.period_origin == PeriodOrigin.INFERRED)
    assert (len(world.observed), thread.tries, thread.reason) == (8, 0, "")


async def test_one_that_ended_is_the_monitor_s_to_notice(world: World) -> None:
    thread = world.attach()
    world.answers.put_nowait(GoneError("it ended"))
    await until(lambda: len(world.observed) == 2)
    world.gone = True
    world.answers.put_nowait(Inference(40 * MS, confidence=1.0))
    await world.turns()
    assert thread.period_origin is PeriodOrigin.OBSERVING


async def test_an_answer_that_comes_too_late_changes_nothing(world: World) -> None:
    thread = world.attach()
    await until(lambda: world.observed)
    thread.period_origin = PeriodOrigin.GIVEN  # its policy was changed
    also, left = world.attach(), world.attach()
    await until(lambda: len(world.observed) == 3)
    also.period_origin = PeriodOrigin.GIVEN
    del world.auto[3].threads[left.tid]
    for answer in (Inference(40 * MS, confidence=1.0), DeniedError("CAP_PERFMON"), Inference(40 * MS, confidence=1.0)):
        world.answers.put_nowait(answer)
    await until(world.answers.empty)
    await world.turns()
    assert world.set == []
    assert (thread.period_origin, thread.confidence) == (PeriodOrigin.GIVEN, 0.0)
    assert (also.period_origin, also.reason) == (PeriodOrigin.GIVEN, "")
    assert left.period_origin is PeriodOrigin.OBSERVING


async def test_a_period_that_is_refused_is_not_marked_as_set(world: World) -> None:
    thread = world.attach()
    world.refuse = True
    world.answers.put_nowait(Inference(40 * MS, confidence=1.0))
    await until(lambda: len(world.observed) == 2)
    assert thread.period_origin is PeriodOrigin.OBSERVING
    world.refuse = False
    world.answers.put_nowait(Inference(40 * MS, confidence=1.0))
    await until(lambda: thread.period_origin == PeriodOrigin.INFERRED)
    assert world.set == [(thread.tid, 40 * MS)] * 2


async def test_the_end_ends_all_observations(world: World) -> None:
    for _ in range(3):
        world.attach()
    await until(lambda: len(world.observed) == 3)
    # The fixture ends the task; a task that was left behind would fail the test.
