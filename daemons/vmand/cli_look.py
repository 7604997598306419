"""vmanctl's commands that look and change nothing."""

import os
import shutil
import sys

import click

from edgehold.api.vmand import VmandClient, Which
from edgehold.cli import Output, table
from vmand import cli_show
from vmand.cli_options import PARTITION, PartitionType, ask, option


@click.command("list")
@click.pass_obj
def list_partitions(output: Output) -> None:
    """All partitions."""
    found = ask(output, VmandClient.list_partitions)
    output.show(found, lambda: cli_show.partitions(found))


@click.command()
@PARTITION
@click.pass_obj
def status(output: Output, *, partition: Which) -> None:
    """One partition, all that is known of it."""
    found = ask(output, lambda vmand: vmand.status(partition))
    output.show(found, lambda: cli_show.details(found))


@click.command()
@PARTITION
@click.pass_obj
def vcpus(output: Output, *, partition: Which) -> None:
    """The host's threads that run the guest's CPUs."""
    found = ask(output, lambda vmand: vmand.vcpus(partition))
    output.show(found, lambda: table(["VCPU", "TID"], [[one.index, one.tid] for one in found]))


@click.command()
@PARTITION
@click.pass_obj
def usage(output: Output, *, partition: Which) -> None:
    """What the guest's disks and network interfaces carry."""
    found = ask(output, lambda vmand: vmand.usage(partition))
    output.show(found, lambda: cli_show.usage(found))


@click.command()
@click.pass_obj
def capabilities(output: Output) -> None:
    """What this host can give, and why not where it can't."""
    found = ask(output, VmandClient.capabilities, doing="looking what guests can run with")
    output.show(found, lambda: cli_show.details(found))


@click.command()
@click.pass_obj
def doctor(output: Output) -> None:
    """What this host gives and what not, and what would change it."""
    found = ask(output, VmandClient.doctor, doing="looking at this host")
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else None
    colour = terminal and not os.environ.get("NO_COLOR")
    output.show(found, lambda: cli_show.findings(found, width=width, colour=colour))


@click.command()
@click.argument("partition", type=PartitionType(), required=False)
@option("console", "with_console", is_flag=True, help="The guests' consoles too.")
@click.pass_obj
def events(output: Output, *, partition: Which | None, with_console: bool) -> None:
    """Print what happens to a partition or to all, until interrupted.

    A line is the partition's id, the kind (state, grade, console or gone), and the new state or grades with the reason,
    or what the guest printed.
    """

    async def work(vmand: VmandClient) -> None:
        await vmand.subscribe(partition, console=with_console)
        async for one in vmand.events():
            output.event(one, cli_show.event(one))

    ask(output, work)
