"""``deadlinectl limit``: no more than so much CPU, whatever it wants: a budget that never moves."""

from typing import Any

import click

from deadlined import cli_show
from deadlined.cli_options import (
    ACTUATOR,
    DRY_RUN,
    PERIOD_MS,
    TARGET,
    Number,
    ask,
    check_actuator,
    options,
    target,
)
from edgehold.api.deadlined import GROUPS, Actuator, Rule, Target
from edgehold.cli import Output
from edgehold.clock import NS_PER_MS
from edgehold.kernel.limits import DL_MAX_PERIOD_NS, DL_MIN_RUNTIME_NS

_LARGEST_CAP = 0.95
_PERIOD_MS = 100.0
_FLOOR_NS = NS_PER_MS

_LIMIT = options(
    click.option("--cpus", type=Number(0, 4096, min_open=True), required=True, help="CPUs: 0.2 is a fifth of one."),
    click.option("--period-ms", type=PERIOD_MS, default=_PERIOD_MS, show_default=True, help="P: in each of these."),
    ACTUATOR,
    DRY_RUN,
)


def fixed(wanted: Target, *, cpus: float, period_ms: float, actuator: str | None) -> dict[str, Any]:
    """The policy of a limit: a budget of ``cpus`` times the period that no rule moves.

    Raises:
        click.UsageError: it can't be; names the options.
    """
    how = actuator or (Actuator.CPU_MAX if wanted.kind in GROUPS else Actuator.DEADLINE).value
    period_ns = round(period_ms * NS_PER_MS)
    cap = min(cpus, _LARGEST_CAP)
    if how == Actuator.DEADLINE.value:
        if cpus > _LARGEST_CAP:
            raise click.UsageError(f"--cpus {cpus:g}: a thread can be given {_LARGEST_CAP} of a CPU at most")
        budget_ns = int(cap * period_ns)  # as deadlined takes the cap: never a nanosecond above it
    else:
        budget_ns = int(cpus * period_ns)  # a group's cap is for each CPU: deadlined knows how many there are
    if not DL_MIN_RUNTIME_NS <= budget_ns <= DL_MAX_PERIOD_NS:
        raise click.UsageError(
            f"--cpus x --period-ms is {budget_ns / NS_PER_MS:g} ms; a budget has "
            f"{DL_MIN_RUNTIME_NS / NS_PER_MS:g} to {DL_MAX_PERIOD_NS / NS_PER_MS:g} ms"
        )
    return {
        "rule": Rule.FIXED.value,
        "period_ns": period_ns,
        "initial_budget_ns": budget_ns,
        "cap": cap,
        "min_budget_ns": min(_FLOOR_NS, budget_ns),
        "actuator": how,
    }


@click.command(short_help="Let something have no more CPU than that.")
@TARGET
@_LIMIT
@click.pass_obj
def limit(
    output: Output, /, *, cpus: float, period_ms: float, actuator: str | None, dry_run: bool | None, **given: Any
) -> None:
    """Let something have no more CPU than that, whatever it wants: a process that has gone mad or bad.

    A unit or a cgroup is limited as a whole (cpu.max): the best limit there is. It only takes away, and what is forked
    is limited with it.

    Anything else is limited thread by thread (SCHED_DEADLINE): --cpus is what EACH of its threads may have. Mind what
    that does to priority: within its budget a held thread runs before every ordinary and every FIFO thread, so the
    limit is a guarantee, too. A process that forks escapes into its children: take --tree. New threads run freely
    until deadlined's next cycle.

    `deadlinectl detach ID` lifts the limit; `change ID --budget-ms N --cap X` moves it. What is attached already is
    limited by `change ID --rule fixed --budget-ms N`.

    \b
    Examples:
      deadlinectl limit --unit miner.service --cpus 0.2
      deadlinectl limit --cgroup /kubepods.slice/pod1 --cpus 1.5
      deadlinectl limit --tree 4711 --cpus 0.05
    """
    wanted = target(given)
    fields = fixed(wanted, cpus=cpus, period_ms=period_ms, actuator=actuator)
    check_actuator(fields, wanted)
    if dry_run is not None:
        fields["dry_run"] = dry_run
    one = ask(output, lambda client: client.attach(wanted, fields))
    whom = "together" if fields["actuator"] != Actuator.DEADLINE.value else "each of its threads, before ordinary ones"
    output.show(one, lambda: f"{cli_show.listing([one])}\n{one.target}: at most {cpus:g} CPUs, {whom}")
