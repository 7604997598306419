"""deadlinectl: what a person types to hold threads, processes and partitions by reservations, and to watch them."""

import asyncio
import math
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import click
import msgspec

from edgehold import cli
from edgehold.api.deadlined import (
    DEFAULT_SOCKET,
    Attachment,
    AttachmentDetail,
    Capacity,
    DeadlinedClient,
    Policy,
    Target,
    TargetKind,
)
from edgehold.clock import NS_PER_MS
from edgehold.kernel.limits import DL_MAX_PERIOD_NS, DL_MIN_PERIOD_NS, DL_MIN_RUNTIME_NS

T = TypeVar("T")
_HEADER = ("ID", "TARGET", "TID", "NAME", "STATE", "BUDGET/ms", "PERIOD/ms", "EXECUTED/ms", "WAITED/ms", "L")
_DEFAULT = Policy()


@cli.client_group(
    default_socket=DEFAULT_SOCKET,
    variable="DEADLINED_SOCKET",
    help_text="Hold threads by SCHED_DEADLINE reservations whose budgets size themselves.",
)
def deadlinectl() -> None:
    """The top of the command."""


def _ask(output: cli.Output, work: Callable[[DeadlinedClient], Awaitable[T]]) -> T:
    async def run() -> T:
        async with DeadlinedClient(output.socket) as client:
            return await work(client)

    return cli.wait_for(run())


def _ms(ns: int) -> str:
    return f"{ns / NS_PER_MS:.2f}"


_BUDGET_MS = click.FloatRange(DL_MIN_RUNTIME_NS / NS_PER_MS, DL_MAX_PERIOD_NS / NS_PER_MS)


def threads_table(attachments: list[Attachment]) -> str:
    """A row a thread, with the reasons below."""
    rows: list[Sequence[object]] = []
    reasons: list[str] = []
    for one in attachments:
        target = f"{one.target.kind.value} {one.target.id}"
        period = _ms(one.policy.period_ns)
        rows.extend(
            (
                one.id, target, thread.tid, thread.name, thread.state.value, _ms(thread.budget_ns), period,
                _ms(thread.executed_ns), _ms(thread.run_delay_ns), thread.multiplier,
            )
            for thread in one.threads
        )  # fmt: skip
        if not one.threads:
            rows.append((one.id, target, "-", "-", "-", "-", period, "-", "-", "-"))
        if one.reason:
            reasons.append(f"{one.id}: {one.reason}")
        reasons.extend(f"{one.id}, thread {thread.tid}: {thread.reason}" for thread in one.threads if thread.reason)
    if not rows:
        return "nothing is attached"
    return "\n".join([cli.table(_HEADER, rows), *reasons])


def _target(tid: int | None, pid: int | None, partition: int | None) -> Target:
    given = [
        (kind, one)
        for kind, one in ((TargetKind.THREAD, tid), (TargetKind.PROCESS, pid), (TargetKind.PARTITION, partition))
        if one is not None
    ]
    if len(given) != 1:
        raise click.UsageError("give one of --tid, --pid and --partition")
    return Target(kind=given[0][0], id=given[0][1])


def budgets(*, period_ms: float, cap: float, budget_ms: float | None, min_budget_ms: float | None) -> tuple[int, int]:
    """The first budget and the floor in nanoseconds; what was not given follows the rest.

    Raises:
        click.UsageError: they can't all be; names the options.
    """
    if any(math.isnan(one) for one in (period_ms, cap, budget_ms or 0, min_budget_ms or 0)):
        raise click.UsageError("nan is no number")
    largest_ns = int(cap * round(period_ms * NS_PER_MS))
    if largest_ns < DL_MIN_RUNTIME_NS:
        raise click.UsageError(
            f"--cap x --period-ms is {largest_ns / NS_PER_MS:g} ms, less than the kernel's smallest budget "
            f"({DL_MIN_RUNTIME_NS / NS_PER_MS:g} ms)"
        )
    floor_ns = round(min_budget_ms * NS_PER_MS) if min_budget_ms is not None else None
    if budget_ms is not None:
        budget_ns = round(budget_ms * NS_PER_MS)
    else:
        budget_ns = min(max(_DEFAULT.initial_budget_ns, floor_ns or 0), largest_ns)
    if floor_ns is None:
        floor_ns = min(_DEFAULT.min_budget_ns, budget_ns)
    for name, one in (("--budget-ms", budget_ns), ("--min-budget-ms", floor_ns)):
        if one > largest_ns:
            raise click.UsageError(
                f"{name} ({one / NS_PER_MS:g}) is above --cap x --period-ms ({largest_ns / NS_PER_MS:g} ms)"
            )
    if floor_ns > budget_ns:
        raise click.UsageError(
            f"--min-budget-ms ({floor_ns / NS_PER_MS:g}) is above --budget-ms ({budget_ns / NS_PER_MS:g})"
        )
    return budget_ns, floor_ns


@deadlinectl.command()
@click.option("--tid", type=click.IntRange(1), help="One thread.")
@click.option("--pid", type=click.IntRange(1), help="A process: all its threads, and those that it starts later.")
@click.option("--partition", type=click.IntRange(1), help="The virtual CPUs of a shared partition of vmand's.")
@click.option(
    "--period-ms", type=click.FloatRange(DL_MIN_PERIOD_NS / NS_PER_MS, DL_MAX_PERIOD_NS / NS_PER_MS),
    default=_DEFAULT.period_ns / NS_PER_MS, show_default=True, help="P.",
)  # fmt: skip
@click.option(
    "--budget-ms", type=_BUDGET_MS, show_default=f"{_ms(_DEFAULT.initial_budget_ns)}, at most cap x period",
    help="The first budget; the rule finds the right one.",
)  # fmt: skip
@click.option(
    "--overallocation", type=click.FloatRange(0, 4, min_open=True), default=_DEFAULT.overallocation, show_default=True,
    help="The share above the measured need.",
)  # fmt: skip
@click.option(
    "--window", type=click.IntRange(1, 1000), default=_DEFAULT.window, show_default=True,
    help="Samples of which the largest counts.",
)  # fmt: skip
@click.option(
    "--cap", type=click.FloatRange(0, 0.95, min_open=True), default=_DEFAULT.cap, show_default=True,
    help="The largest share of the period.",
)  # fmt: skip
@click.option(
    "--min-budget-ms", type=_BUDGET_MS, show_default=f"{_ms(_DEFAULT.min_budget_ns)}, at most the first budget",
    help="The floor.",
)  # fmt: skip
@click.pass_obj
def attach(
    output: cli.Output, *, tid: int | None, pid: int | None, partition: int | None, period_ms: float,
    budget_ms: float | None, overallocation: float, window: int, cap: float, min_budget_ms: float | None,
) -> None:  # fmt: skip
    """Hold a thread, a process or a partition from now on."""
    target = _target(tid, pid, partition)
    budget_ns, floor_ns = budgets(period_ms=period_ms, cap=cap, budget_ms=budget_ms, min_budget_ms=min_budget_ms)
    policy = Policy(
        period_ns=round(period_ms * NS_PER_MS),
        initial_budget_ns=budget_ns,
        overallocation=overallocation,
        window=window,
        cap=cap,
        min_budget_ns=floor_ns,
    )
    one = _ask(output, lambda client: client.attach(target, policy))
    output.show(one, lambda: threads_table([one]))


@deadlinectl.command()
@click.argument("attachment", type=click.IntRange(1))
@click.pass_obj
def detach(output: cli.Output, *, attachment: int) -> None:
    """Give an attachment's threads their own policy back."""
    _ask(output, lambda client: client.detach(attachment))
    output.show({"detached": attachment}, lambda: f"attachment {attachment}: detached")


@deadlinectl.command("list")
@click.pass_obj
def list_(output: cli.Output) -> None:
    """Everything that is held."""
    found = _ask(output, lambda client: client.list_attachments())
    output.show(found, lambda: threads_table(found))


@deadlinectl.command()
@click.argument("attachment", type=click.IntRange(1))
@click.option("--last", type=click.IntRange(0, 10**9), help="So many samples.  [default: 20; with --json: all]")
@click.pass_obj
def show(output: cli.Output, *, attachment: int, last: int | None) -> None:
    """One attachment and its last samples."""
    wanted = 20 if last is None and not output.as_json else last
    detail = _ask(output, lambda client: client.attachment(attachment, last=wanted))
    output.show(detail, lambda: _detail_text(detail))


def _detail_text(detail: AttachmentDetail) -> str:
    now = time.monotonic_ns()
    rows = [
        (
            f"{(one.time_ns - now) / 1e9:.1f}", one.tid, _ms(one.executed_ns), _ms(one.run_delay_ns), one.multiplier,
            _ms(one.budget_ns),
        )
        for one in detail.history
    ]  # fmt: skip
    policy = detail.attachment.policy
    rule = (
        f"policy: overallocation {policy.overallocation:g}, window {policy.window}, cap {policy.cap:g} of the period, "
        f"floor {_ms(policy.min_budget_ns)} ms"
    )
    header = ("SECONDS", "TID", "EXECUTED/ms", "WAITED/ms", "L", "BUDGET/ms")
    return "\n\n".join([threads_table([detail.attachment]), rule, cli.table(header, rows) if rows else "no sample yet"])


@deadlinectl.command()
@click.option(
    "--interval", type=click.FloatRange(0.05), default=0.5, show_default=True, help="Seconds between two looks."
)
@click.option("--count", type=click.IntRange(1), help="Stop after so many looks.")
@click.pass_obj
def watch(output: cli.Output, *, interval: float, count: int | None) -> None:
    """A live table of everything that is held; ends with Ctrl-C. With --json a line a look."""

    async def run(client: DeadlinedClient) -> None:
        looks = 0
        while True:
            found = await client.list_attachments()
            if output.as_json:
                click.echo(msgspec.json.encode(found))
            else:
                if sys.stdout.isatty():
                    click.clear()
                click.echo(threads_table(found))
            looks += 1
            if looks == count:
                return
            await asyncio.sleep(interval)

    _ask(output, run)


@deadlinectl.command()
@click.pass_obj
def capacity(output: cli.Output) -> None:
    """Probe how much bandwidth the kernel would still admit."""
    found = _ask(output, lambda client: client.capacity())
    output.show(found, lambda: _capacity_text(found))


def _capacity_text(found: Capacity) -> str:
    return (
        f"available  {found.available:.4f} of {found.cpus} CPUs (steps of {found.resolution:.4f})\n"
        f"held       {found.held:.4f} CPUs by deadlined\n"
        f"deadlined  runs as {found.monitor_policy}"
    )


cli.completion_command(deadlinectl, "deadlinectl")


def main() -> None:
    """The command ``deadlinectl``."""
    cli.main(deadlinectl, "deadlinectl")


if __name__ == "__main__":
    main()
