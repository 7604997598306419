"""deadlinectl's commands that look and change nothing."""

import asyncio
import shutil
import sys
import time

import click

from deadlined import cli_show
from deadlined.cli_options import ATTACHMENT, ask
from edgehold.api.deadlined import DeadlinedClient
from edgehold.cli import Output

_TABLE = 20
"""Samples in the table of `show`, where --last is not given."""
_PICTURE = 600
"""Samples that its picture is drawn of at most."""


@click.command("list")
@click.pass_obj
def list_attachments(output: Output) -> None:
    """Everything that is held.

    \b
    BUDGET    in force, in each period; - where nothing is
    WANTED    what the rule wants
    PERIOD    ~: inferred; ?: not known (yet), the default stays
    EXECUTED  in each period, in the last cycle
    WAITED    runnable and not running: others ran, or the budget was used up
    NOTE      saturated: it never slept, and used its budget up
              less: it gets less than the rule wants; the reason stands below

    EXECUTED can be above BUDGET for a cycle: its window lies before the change that made the budget smaller.
    """
    found = ask(output, DeadlinedClient.list_attachments)
    output.show(found, lambda: cli_show.listing(found))


@click.command(short_help="One attachment and its last samples.")
@ATTACHMENT
@click.option("--last", type=click.IntRange(0, 10**9), help=f"So many samples.  [default: {_TABLE}; with --json: all]")
@click.pass_obj
def show(output: Output, *, attachment: int, last: int | None) -> None:
    """One attachment: its policy, a picture, and its last samples.

    The picture has a line for budgets and one for what was executed, both per period and on the same scale. With --json
    it is what `deadlinectl replay` takes.
    """
    asked = last if output.as_json else max(last or _TABLE, _PICTURE)
    detail = ask(output, lambda client: client.attachment(attachment, last=asked))
    rows = _TABLE if last is None else last
    output.show(
        detail,
        lambda: cli_show.detail(
            detail,
            now_ns=time.monotonic_ns(),
            rows=rows,
            width=shutil.get_terminal_size().columns,
            blocks=(sys.stdout.encoding or "").lower().replace("-", "") == "utf8",
        ),
    )


@click.command(short_help="A live table, until ^C.")
@click.option(
    "--interval", type=click.FloatRange(0.05), default=0.5, show_default=True, help="Seconds between two looks."
)
@click.option("--count", type=click.IntRange(1), help="Stop after so many looks.")
@click.pass_obj
def watch(output: Output, *, interval: float, count: int | None) -> None:
    """A live table of everything that is held, until ^C. With --json a line a look."""

    async def run(client: DeadlinedClient) -> None:
        looks = 0
        while True:
            found = await client.list_attachments()
            terminal = sys.stdout.isatty()
            if terminal and not output.as_json:
                click.clear()
            output.event(found, cli_show.listing(found, lines=shutil.get_terminal_size().lines if terminal else None))
            looks += 1
            if looks == count:
                return
            await asyncio.sleep(interval)

    ask(output, run)


@click.command(short_help="What is left, held and wanted.")
@click.pass_obj
def capacity(output: Output) -> None:
    """What the kernel would still admit, as a probe finds it, and what is held and wanted.

    The probe takes all that is left for some milliseconds, at most once a second.
    """
    found = ask(output, DeadlinedClient.capacity)
    output.show(found, lambda: cli_show.capacity(found))
