"""deadlinectl's commands that change what is held."""

from typing import Any

import click

from deadlined import cli_show
from deadlined.cli_options import ACTUATOR, ATTACHMENT, DRY_RUN, SIZING, TARGET, ask, check_actuator, policy, target
from edgehold.cli import Output

_TARGETS = ("tid", "pid", "tree", "unit", "cgroup", "partition", "domain", "uri")


@click.command(short_help="Hold a thread, a process, a group or a guest.")
@TARGET
@SIZING
@ACTUATOR
@DRY_RUN
@click.pass_obj
def attach(output: Output, /, **given: Any) -> None:
    """Hold a thread, a process, a group or a guest from now on.

    Each thread gets a budget every period, and the budget follows what the thread executes. What is not given is as
    deadlined's settings have it ([policy]).

    \b
    Examples:
      deadlinectl attach --pid 4711 --dry-run           what would be set; changes nothing
      deadlinectl attach --tid 4712 --period-ms 40      a thread that works every 40 ms
      deadlinectl attach --pid 4711 --period-ms auto    find the period by itself
      deadlinectl attach --unit camera.service --weight 500
      deadlinectl attach --unit batch.service --actuator cpu.max --cap 0.5
      deadlinectl attach --partition 1
      deadlinectl attach --domain web --uri qemu:///system
    """
    wanted = target(given)
    fields = policy({name: value for name, value in given.items() if name not in _TARGETS})
    check_actuator(fields, wanted)
    one = ask(output, lambda client: client.attach(wanted, fields))
    output.show(one, lambda: cli_show.listing([one]))


@click.command(short_help="Size budgets by another policy.")
@ATTACHMENT
@SIZING
@click.pass_obj
def change(output: Output, /, *, attachment: int, **given: Any) -> None:
    """Size an attachment's budgets by another policy from now on; what is not given stays.

    \b
    Examples:
      deadlinectl change 1 --rule reference
      deadlinectl change 1 --cap 0.5 --weight 200
    """
    fields = policy(given)
    if not fields:
        raise click.UsageError("nothing to change: give an option, as --cap 0.5 (--help has all)")
    one = ask(output, lambda client: client.change(attachment, fields))
    output.show(one, lambda: cli_show.listing([one]))


@click.command(short_help="Give everything back and forget the target.")
@ATTACHMENT
@click.pass_obj
def detach(output: Output, *, attachment: int) -> None:
    """Give every thread of an attachment its own policy back, and forget the target."""
    ask(output, lambda client: client.detach(attachment))
    output.show({"detached": attachment}, lambda: f"attachment {attachment}: detached")
