"""deadlinectl: what a person types to hold threads, processes and partitions by reservations, and to watch them."""

import asyncio
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
from edgehold.errors import BadRequestError

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


@deadlinectl.command()
@click.option("--tid", type=click.IntRange(1), help="One thread.")
@click.option("--pid", type=click.IntRange(1), help="A process: all its threads, and those that it starts later.")
@click.option("--partition", type=click.IntRange(1), help="The virtual CPUs of a shared partition of vmand's.")
@click.option("--period-ms", type=float, default=_DEFAULT.period_ns / NS_PER_MS, show_default=True, help="P.")
@click.option(
    "--budget-ms", type=float, default=_DEFAULT.initial_budget_ns / NS_PER_MS, show_default=True,
    help="The first budget; the rule finds the right one.",
)  # fmt: skip
@click.option(
    "--overallocation", type=float, default=_DEFAULT.overallocation, show_default=True,
    help="The share above the measured need.",
)  # fmt: skip
@click.option(
    "--window", type=int, default=_DEFAULT.window, show_default=True, help="Samples of which the largest counts."
)
@click.option("--cap", type=float, default=_DEFAULT.cap, show_default=True, help="The largest share of the period.")
@click.option(
    "--min-budget-ms", type=float, default=_DEFAULT.min_budget_ns / NS_PER_MS, show_default=True, help="The floor."
)
@click.pass_obj
def attach(
    output: cli.Output, *, tid: int | None, pid: int | None, partition: int | None, period_ms: float, budget_ms: float,
    overallocation: float, window: int, cap: float, min_budget_ms: float,
) -> None:  # fmt: skip
    """Hold a thread, a process or a partition from now on."""
    target = _target(tid, pid, partition)
    try:
        # Through the codec, so that the bounds are those of the contract and the text names the field.
        policy = msgspec.convert(
            {
                "period_ns": round(period_ms * NS_PER_MS),
                "initial_budget_ns": round(budget_ms * NS_PER_MS),
                "overallocation": overallocation,
                "window": window,
                "cap": cap,
                "min_budget_ns": round(min_budget_ms * NS_PER_MS),
            },
            Policy,
        )
    except (msgspec.ValidationError, ValueError, OverflowError) as error:
        raise BadRequestError(f"policy: {error}") from None
    one = _ask(output, lambda client: client.attach(target, policy))
    output.show(one, lambda: threads_table([one]))


@deadlinectl.command()
@click.argument("attachment", type=click.IntRange(1))
@click.pass_obj
def detach(output: cli.Output, *, attachment: int) -> None:
    """Give an attachment's threads their own policy back."""
    _ask(output, lambda client: client.detach(attachment))
    output.show({"detached": attachment}, lambda: "")


@deadlinectl.command("list")
@click.pass_obj
def list_(output: cli.Output) -> None:
    """Everything that is held."""
    found = _ask(output, lambda client: client.list_attachments())
    output.show(found, lambda: threads_table(found))


@deadlinectl.command()
@click.argument("attachment", type=click.IntRange(1))
@click.pass_obj
def show(output: cli.Output, *, attachment: int) -> None:
    """One attachment and its last samples."""
    detail = _ask(output, lambda client: client.attachment(attachment))
    output.show(detail, lambda: _detail_text(detail))


def _detail_text(detail: AttachmentDetail) -> str:
    now = time.monotonic_ns()
    rows = [
        (
            f"{(one.time_ns - now) / 1e9:.1f}", one.tid, _ms(one.executed_ns), _ms(one.run_delay_ns), one.multiplier,
            _ms(one.budget_ns),
        )
        for one in detail.history[-20:]
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
