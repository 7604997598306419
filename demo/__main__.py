"""``make demo``: both daemons in a private directory, a real guest, its vCPU held by a reservation that sizes itself.

Exit status 0 only if every step's condition held; each that failed is named. The report is build/demo/report.html.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from demo import host, report
from demo.story import BUDGET_OVER_NEED, RESPONSE_OVER_NEED, Job, Step, Story
from edgehold.api.deadlined import Attachment, DeadlinedClient, Policy, Target, TargetKind, ThreadState
from edgehold.api.vmand import Mode, State, VmandClient
from edgehold.clock import NS_PER_MS, NS_PER_S
from edgehold.errors import EdgeholdError
from edgehold.kernel import sched
from edgehold.testing.daemons import Daemon
from edgehold.testing.partitions import private_vmand

ROOT = Path(__file__).parents[1]
GUEST = Path(os.environ.get("EDGEHOLD_GUEST", ROOT / "build/guest/amd64"))
REPORT = ROOT / "build/demo/report.html"
CMDLINE = "console=ttyS0 quiet no_timer_check tsc=reliable edgehold.job_ms=10 edgehold.period_ms=100"
PERIOD_MS, FIRST_BUDGET_MS = 100, 2
SUSPENDED_S = 3.0
HEADER = f"{'time':>7}  {'budget':>9}  {'executed':>9}  {'waited':>9}  {'response':>10}   per period of {PERIOD_MS} ms"


class Failed(Exception):  # noqa: N818 - a condition, not a fault
    """A condition without which the rest makes no sense."""


def say(story: Story, name: str, detail: str, *, good: bool) -> None:
    """Record one step, and tell whoever watches."""
    at_s = (time.monotonic_ns() - story.started_ns) / NS_PER_S
    story.steps.append(Step(name, detail, good, at_s))
    print(f"{'  ok  ' if good else 'FAILED'} {at_s:6.1f} s  {name}: {detail}", flush=True)


class Demo:
    """The steps, in order, each with its condition."""

    def __init__(self, vmand: VmandClient, deadlined: DeadlinedClient, story: Story) -> None:
        self.vmand = vmand
        self.deadlined = deadlined
        self.story = story
        self.partition = 0
        self.console = ""

    def step(self, name: str, detail: str, *, good: bool, fatal: bool = False) -> None:
        """Record and say one step."""
        say(self.story, name, detail, good=good)
        if fatal and not good:
            raise Failed(name)

    async def listen(self) -> None:
        """Collect what the guest prints, for ever."""
        async for event in self.vmand.events():
            if event.kind == "console":
                self.console = (self.console + event.text)[-65536:]
                self.story.add_console(event.text, time.monotonic_ns())

    async def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Whether the condition comes true in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not condition():  # noqa: ASYNC110 - the guest's lines have no event of their own
                    await asyncio.sleep(0.05)
                return True
        return False

    async def create_and_deploy(self) -> None:
        self.partition = await self.vmand.create_partition(cores=1, memsize_gb=0.25, mode=Mode.SHARED, name="demo")
        status = await self.vmand.status(self.partition)
        self.step(
            "create",
            f"partition {self.partition} ({status.mode}) is {status.state}, {status.memory_bytes >> 20} MiB are taken",
            good=status.state is State.READY, fatal=True,
        )  # fmt: skip
        await self.vmand.subscribe(self.partition, console=True)
        await self.vmand.deploy(
            self.partition, kernel=GUEST / "vmlinuz", initrd=GUEST / "initramfs.gz", cmdline=CMDLINE
        )
        status = await self.vmand.status(self.partition)
        self.story.facts["guest's CPUs run by"] = status.accelerator
        good = status.state is State.DEPLOYED and await self.until(lambda: len(self.story.jobs) >= 10, 90)
        seen = f"a job of {self.story.work_ms:.1f} ms every {PERIOD_MS} ms answers in {self._last_response():.1f} ms"
        self.step("deploy", f"{status.state} with {status.accelerator}; {seen}", good=good, fatal=True)

    async def attach(self) -> Attachment:
        policy = Policy(
            period_ns=PERIOD_MS * NS_PER_MS,
            initial_budget_ns=FIRST_BUDGET_MS * NS_PER_MS,
            overallocation=0.1,
            window=10,
        )
        self.story.marks.append((time.monotonic_ns(), f"attached with {FIRST_BUDGET_MS} ms"))
        held = await self.deadlined.attach(Target(kind=TargetKind.PARTITION, id=self.partition), policy)
        (thread,) = held.threads
        kernel = sched.get(thread.tid)
        self.step(
            "attach",
            f"vCPU thread {thread.tid} is in {kernel.policy.name} with {thread.budget_ns / NS_PER_MS:.1f} ms a period",
            good=thread.state is ThreadState.HELD and kernel.policy is sched.Policy.DEADLINE, fatal=True,
        )  # fmt: skip
        return held

    async def watch(self, attachment: int, seconds: float, *, at_least: float = 0) -> bool:
        """Show the live table until things are steady (True) or the time is over (False)."""
        print(f"\n{HEADER}")
        begin = time.monotonic()
        mark_ns = time.monotonic_ns()
        while (spent := time.monotonic() - begin) < seconds:
            detail = await self.deadlined.attachment(attachment)
            for sample in self.story.add_samples(detail.history):
                jobs = self.story.jobs_between(mark_ns, mark_ns := time.monotonic_ns())
                at_s = (sample.time_ns - self.story.started_ns) / NS_PER_S
                cells = "  ".join(
                    f"{one / NS_PER_MS:6.2f} ms"
                    for one in (sample.budget_ns, sample.executed_per_period_ns, sample.run_delay_per_period_ns)
                )
                print(f"{at_s:6.1f}s  {cells}  {worst(jobs):>10}", flush=True)
            if spent >= at_least and self.story.converged():
                print()
                return True
            await asyncio.sleep(0.25)
        print()
        return False

    async def rise_and_settle(self, attachment: int) -> None:
        good = await self.watch(attachment, 45, at_least=12)
        budgets = [sample.budget_ns / NS_PER_MS for sample in self.story.samples]
        worst_ms = max((job.response_ms for job in self.story.jobs), default=0)
        self.step("the budget rises", f"from {FIRST_BUDGET_MS} ms up to {max(budgets, default=0):.1f} ms",
                  good=max(budgets, default=0) > 2 * FIRST_BUDGET_MS)  # fmt: skip
        self.settled("the guest's response comes down", good=good, more=f", after {worst_ms:.0f} ms at worst")

    def settled(self, name: str, *, good: bool, more: str = "") -> None:
        """The condition of a steady reservation: response about the need, budget a little above it."""
        if not self.story.samples or not self.story.jobs or not self.story.need_ms():
            self.step(name, "there was nothing to see", good=False, fatal=True)
        need, response = self.story.need_ms(), self.story.last_response_ms()
        budget = self.story.samples[-1].budget_ns / NS_PER_MS
        low, high = BUDGET_OVER_NEED
        self.step(name, f"to {response:.1f} ms, the vCPU executes {need:.1f} ms a period{more}",
                  good=good and response <= RESPONSE_OVER_NEED * need)  # fmt: skip
        self.step("the budget fits the need", f"{budget:.1f} ms are {budget / need:.2f} times {need:.1f} ms",
                  good=low <= budget / need <= high)  # fmt: skip

    async def suspend_and_restore(self, attachment: int) -> None:
        self.story.marks.append((time.monotonic_ns(), "suspended"))
        await self.vmand.suspend(self.partition)
        status = await self.vmand.status(self.partition)
        await asyncio.sleep(0.2)  # what the guest had printed before is on its way
        quiet_from = len(self.story.jobs)
        await self.watch(attachment, SUSPENDED_S, at_least=SUSPENDED_S)
        still = len(self.story.jobs) - quiet_from
        self.step("suspend", f"{status.state}; the guest printed {still} lines in {SUSPENDED_S:g} s",
                  good=status.state is State.SUSPENDED and still == 0)  # fmt: skip
        self.story.marks.append((time.monotonic_ns(), "restored"))
        await self.vmand.restore(self.partition)
        status = await self.vmand.status(self.partition)
        good = await self.until(lambda: len(self.story.jobs) > quiet_from, 20)
        self.step("restore", f"{status.state}; the guest's job goes on", good=good and status.state is State.DEPLOYED)
        good = await self.watch(attachment, 45, at_least=12)
        self.settled("the response is back", good=good)

    async def detach(self, held: Attachment) -> None:
        await self.deadlined.detach(held.id)
        policy = sched.get(held.threads[0].tid).policy
        listed = await self.deadlined.list_attachments()
        self.step("detach", f"vCPU thread {held.threads[0].tid} is back in {policy.name}",
                  good=policy is sched.Policy.OTHER and not listed)  # fmt: skip

    async def shutdown_and_destroy(self) -> None:
        await self.vmand.shutdown(self.partition)
        status = await self.vmand.status(self.partition)
        said = await self.until(lambda: "edgehold-guest power-off" in self.console, 2)
        self.step("shutdown", f"{status.state}; the guest obeyed the power button: {'yes' if said else 'no'}",
                  good=status.state is State.READY and said)  # fmt: skip
        await self.vmand.destroy_partition(self.partition)
        left = await self.vmand.list_partitions()
        self.step("destroy", "cores and memory are given back", good=not left)

    def _last_response(self) -> float:
        return self.story.jobs[-1].response_ms if self.story.jobs else 0.0

    async def run(self) -> None:
        """All steps."""
        await self.create_and_deploy()
        held = await self.attach()
        await self.rise_and_settle(held.id)
        await self.suspend_and_restore(held.id)
        await self.detach(held)
        await self.shutdown_and_destroy()


def worst(jobs: list[Job]) -> str:
    """The worst response of some jobs."""
    return f"{max(job.response_ms for job in jobs):7.1f} ms" if jobs else "-"


@contextlib.asynccontextmanager
async def node() -> AsyncIterator[tuple[Path, VmandClient, DeadlinedClient]]:
    """Both daemons in a private directory, and a client of each. Whatever happens, no guest outlives the demo."""
    async with private_vmand() as vmand:
        directory = vmand.directory
        deadlined = Daemon("deadlined", directory=directory, settings={
            "socket": str(directory / "dl.sock"), "state_dir": str(directory / "dl-state"),
            "vmand_socket": str(vmand.socket),
        })  # fmt: skip
        try:
            await deadlined.start()
            async with await vmand.client() as vmand_client, DeadlinedClient(directory / "dl.sock") as deadlined_client:
                yield directory, vmand_client, deadlined_client
        finally:
            await deadlined.stop()


async def play(story: Story) -> None:
    """Both daemons and all steps; what was begun is undone, however it ends."""
    async with node() as (directory, vmand, deadlined):
        story.directory = directory
        demo = Demo(vmand, deadlined, story)
        listening = asyncio.create_task(demo.listen())
        try:
            await demo.run()
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)


async def interruptible(story: Story) -> int:
    """`play`, which Ctrl-C ends in order. Returns the exit status as far as it goes."""
    playing = asyncio.create_task(play(story))
    for number in (signal.SIGINT, signal.SIGTERM):  # a second one changes nothing: it is being undone already
        asyncio.get_running_loop().add_signal_handler(number, lambda: playing.cancelling() or playing.cancel())
    try:
        await playing
    except asyncio.CancelledError:
        say(story, "all steps", "interrupted", good=False)
        return 130
    except (EdgeholdError, Failed) as error:
        if not isinstance(error, Failed):
            say(story, "the next step", str(error), good=False)
        print(f"demo: stopped: {error}", file=sys.stderr)
        return 1
    return 0


async def main() -> int:
    """Run the demo. Returns the exit status: 0 only if every condition held."""
    story = Story(time.monotonic_ns(), facts=host.facts())
    try:
        before = host.traces()
    except EdgeholdError as error:
        print(f"demo: this host can't show it: {error}", file=sys.stderr)
        return 1
    story.facts["admission bandwidth"] = f"{before.capacity:.2f} CPUs (probed)"
    status = await interruptible(story)
    left = await settled_traces(before, story)
    seen = "; ".join(left) or f"no thread, process or cgroup; {before.capacity:.2f} CPUs can be reserved as before"
    say(story, "nothing is left behind", seen, good=not left)
    report.write(story, REPORT)
    failed = [step for step in story.steps if not step.good]
    for step in failed:
        print(f"demo: condition failed: {step.name}: {step.detail}", file=sys.stderr)
    if not failed:
        print(f"all {len(story.steps)} conditions held")
    print(f"report: {REPORT.relative_to(ROOT)}")
    return status or (1 if failed else 0)


async def settled_traces(before: host.Traces, story: Story) -> list[str]:
    """Bandwidth comes back at a thread's 0-lag time (some periods), so look again for a while before judging."""
    for _attempt in range(10):
        held = {sample.tid for sample in story.samples}
        try:
            left = host.left_behind(before, host.traces(), directory=story.directory, held=held)
        except EdgeholdError as error:
            return [error.message]
        if not left:
            break
        await asyncio.sleep(0.5)
    return left


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
