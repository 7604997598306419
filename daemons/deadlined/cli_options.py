"""What deadlinectl's commands share: how targets and policies are written, and asking deadlined.

An option that was not given is not sent: deadlined's settings have the rest. So little can be checked here; what
deadlined then says of fields and nanoseconds is told in options and milliseconds.
"""

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
from click.shell_completion import CompletionItem

from edgehold.api.deadlined import (
    DEFAULT_SOCKET,
    DEFAULT_URI,
    GROUPS,
    WINDOW_MAX,
    Actuator,
    Attachment,
    DeadlinedClient,
    Rule,
    Target,
    TargetKind,
)
from edgehold.cli import Output, wait_for
from edgehold.clock import NS_PER_MS
from edgehold.errors import BadRequestError, EdgeholdError
from edgehold.kernel.limits import DL_MAX_PERIOD_NS, DL_MIN_PERIOD_NS, DL_MIN_RUNTIME_NS

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

AUTO = "auto"
_LARGEST_CAP = 0.95
# A shell waits for this at each press of its key.
_COMPLETION_S = 1.0


class Number(click.FloatRange):
    """A range without what is no number: nan is in every range, and JSON has none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Refuses nan and infinity."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no number", param, ctx)
        return number


PERIOD_MS = Number(DL_MIN_PERIOD_NS / NS_PER_MS, DL_MAX_PERIOD_NS / NS_PER_MS)
BUDGET_MS = Number(DL_MIN_RUNTIME_NS / NS_PER_MS, DL_MAX_PERIOD_NS / NS_PER_MS)


# click.ParamType is generic only in newer versions than the oldest one that we take.
class PeriodType(click.ParamType):  # type: ignore[type-arg]
    """Milliseconds, or ``auto``."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        """Checks the range, too."""
        if str(value).lower() == AUTO:
            return AUTO
        return PERIOD_MS.convert(value, param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """``auto``: a number nobody can guess."""
        del ctx, param
        return (
            [CompletionItem(AUTO, help="found from the thread's own activations")]
            if AUTO.startswith(incomplete)
            else []
        )


class AttachmentType(click.IntRange):
    """An attachment's id; which there are, deadlined knows."""

    name = "id"

    def __init__(self) -> None:
        super().__init__(1)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The attachments that there are; none where deadlined can't be asked."""
        del param
        socket = ctx.find_root().params.get("socket") or DEFAULT_SOCKET
        try:
            found = asyncio.run(_attachments(socket))
        except (EdgeholdError, OSError, TimeoutError, msgspec.MsgspecError):
            return []
        told = [(str(one.id), str(one.target)) for one in found]
        return [CompletionItem(value, help=text) for value, text in told if value.startswith(incomplete)]


async def _attachments(socket: Path) -> list[Attachment]:
    async with DeadlinedClient(socket, timeout_s=_COMPLETION_S) as client:
        return await client.list_attachments()


def options(*several: Callable[[F], F]) -> Callable[[F], F]:
    """Several options, in this order in the help."""

    def decorate(function: F) -> F:
        for one in reversed(several):
            function = one(function)
        return function

    return decorate


ATTACHMENT = click.argument("attachment", type=AttachmentType(), metavar="ID")
_ID = click.IntRange(1)
_LARGEST_ID = 2**31 - 1

TARGET = options(
    click.option("--tid", type=_ID, metavar="TID", help="One thread."),
    click.option("--pid", type=_ID, metavar="PID", help="A process: all its threads, and those that it starts later."),
    click.option("--tree", type=_ID, metavar="PID", help="A process, its descendants, and all their threads."),
    click.option("--unit", metavar="NAME", help="A systemd unit, as nginx.service."),
    click.option("--cgroup", metavar="PATH", help="A cgroup and those below it, as /system.slice/docker-….scope."),
    click.option("--partition", type=_ID, metavar="ID", help="The virtual CPUs of a shared partition of vmand's."),
    click.option("--domain", metavar="NAME", help="The virtual CPUs of a libvirt domain of this host: name or UUID."),
    click.option("--uri", help=f"With --domain: where libvirt has it.  [default: {DEFAULT_URI}]"),
)
"""What to hold: one of these. Gives the keywords that `target` takes."""

_KINDS = {
    "tid": TargetKind.THREAD,
    "pid": TargetKind.PROCESS,
    "tree": TargetKind.TREE,
    "unit": TargetKind.UNIT,
    "cgroup": TargetKind.CGROUP,
    "partition": TargetKind.PARTITION,
    "domain": TargetKind.DOMAIN,
}


def target(given: Mapping[str, Any]) -> Target:
    """The target that the options of `TARGET` name.

    Raises:
        click.UsageError: none or several are named; says which there are.
    """
    named = [one for one in _KINDS if given.get(one) is not None]
    if len(named) != 1:
        every = ", ".join(f"--{one}" for one in _KINDS)
        raise click.UsageError(f"give one of {every}" + (f", not {len(named)}" if named else ""))
    which = named[0]
    uri = given.get("uri")
    if uri is not None and which != "domain":
        raise click.UsageError("--uri goes with --domain only")
    value = given[which]
    if isinstance(value, int):
        if value > _LARGEST_ID:
            raise click.UsageError(f"--{which} {value}: ids end at {_LARGEST_ID}")
        return Target(kind=_KINDS[which], id=value)
    try:
        return Target(kind=_KINDS[which], name=value, uri=uri or "")
    except ValueError:
        raise click.UsageError(f"--{which} is empty, or has a NUL in it") from None


RULE = options(
    click.option("--rule", type=click.Choice([one.value for one in Rule]),
                 help="How the budget follows the need: fast, the document's (reference), or not at all (fixed)."),
    click.option("--period-ms", type=PeriodType(), metavar="N|auto",
                 help="P, 0.1 to 4194.304; auto: that of the thread's activations."),
    click.option("--budget-ms", type=BUDGET_MS, help="The first budget; the rule finds the right one."),
    click.option("--overallocation", type=Number(0, 4, min_open=True),
                 help="The share above the measured need: 0.1 is ten per cent."),
    click.option("--window", type=click.IntRange(1, WINDOW_MAX), help="Samples of which the largest counts."),
    click.option("--cap", type=Number(0, _LARGEST_CAP, min_open=True),
                 help="The largest share of the period; of a group, for each CPU of the host."),
    click.option("--min-budget-ms", type=BUDGET_MS, help="The floor: an idle thread keeps this much."),
)  # fmt: skip
"""What a rule is given."""
SIZING = options(
    RULE,
    click.option("--weight", type=click.IntRange(1, 10_000),
                 help="Its part where the host can't give everybody what he needs."),
)  # fmt: skip
"""The fields of a policy that can be changed at any time."""

ACTUATOR = click.option(
    "--actuator", type=click.Choice([one.value for one in Actuator]),
    help="deadline: guaranteed, each thread its own. cpu.max, cpu.rt.max: a limit for a unit or a cgroup as a whole.",
)  # fmt: skip
DRY_RUN = click.option(
    "--dry-run/--no-dry-run", default=None, help="Only measure and tell what would be set; change nothing."
)

_FIELDS = {"budget_ms": "initial_budget_ns", "min_budget_ms": "min_budget_ns", "period_ms": "period_ns"}


def policy(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a policy whose options were given, in the contract's names and units.

    Raises:
        click.UsageError: they contradict each other, whatever the rest is; names the options.
    """
    fields = {
        _FIELDS.get(name, name): round(value * NS_PER_MS) if name in _FIELDS and value != AUTO else value
        for name, value in given.items()
        if value is not None
    }
    _check(fields)
    return fields


def _check(fields: Mapping[str, Any]) -> None:
    floor, budget = fields.get("min_budget_ns"), fields.get("initial_budget_ns")
    if floor is not None and budget is not None and floor > budget:
        raise click.UsageError(f"--min-budget-ms ({_ms(floor)}) is above --budget-ms ({_ms(budget)})")
    period, actuator = fields.get("period_ns"), fields.get("actuator", Actuator.DEADLINE.value)
    if not isinstance(period, int) or actuator != Actuator.DEADLINE.value:
        return  # the settings have the period; a group's budget may be larger than it
    cap = fields.get("cap", _LARGEST_CAP)
    largest = int(cap * period)
    told = f"--cap x --period-ms ({_ms(largest)} ms)" if "cap" in fields else f"{cap} x --period-ms ({_ms(largest)} ms)"
    if largest < DL_MIN_RUNTIME_NS:
        raise click.UsageError(f"{told} is less than the kernel's smallest budget ({_ms(DL_MIN_RUNTIME_NS)} ms)")
    for name, one in (("--budget-ms", budget), ("--min-budget-ms", floor)):
        if one is not None and one > largest:
            raise click.UsageError(f"{name} ({_ms(one)}) is above {told}")


def check_actuator(fields: Mapping[str, Any], wanted: Target) -> None:
    """A quota belongs to a cgroup.

    Raises:
        click.UsageError: the target is none.
    """
    actuator = fields.get("actuator", Actuator.DEADLINE.value)
    if actuator != Actuator.DEADLINE.value and wanted.kind not in GROUPS:
        raise click.UsageError(
            f"--actuator {actuator} goes with --unit and --cgroup only: a {wanted.kind.value} has no quota"
        )


def _ms(ns: int) -> str:
    return f"{ns / NS_PER_MS:g}"


_TERMS = re.compile(r"(?:\bpolicy\.)?\b(initial_budget_ns|min_budget_ns|period_ns|dry_run|cap(?= x ))\b")
_OPTION_OF = {
    "initial_budget_ns": "--budget-ms",
    "min_budget_ns": "--min-budget-ms",
    "period_ns": "--period-ms",
    "dry_run": "--dry-run",
    "cap": "--cap",
}
# "10000000 ns (10 ms)", or the first part alone.
_NANOSECONDS = re.compile(r"\b(?P<ns>\d+) ns\b(?: \([\d.]+ ms\)|, [\d.]+ ms\b)?")


def in_options(text: str) -> str:
    """What deadlined said of a policy's fields, in this command's options and in milliseconds."""
    text = _NANOSECONDS.sub(lambda found: f"{_ms(int(found['ns']))} ms", text)
    return _TERMS.sub(lambda found: _OPTION_OF[found[1]], text).removeprefix("policy: ")


def ask(output: Output, work: Callable[[DeadlinedClient], Awaitable[T]]) -> T:
    """Connect, and do the command's work."""

    async def run() -> T:
        async with DeadlinedClient(output.socket) as client:
            return await work(client)

    try:
        return wait_for(run())
    except BadRequestError as error:
        raise BadRequestError(in_options(error.message)) from None
