"""``vmanctl console``: a guest's console as a terminal, or what was printed there last."""

import signal
import sys
from typing import Any

import click

from edgehold.api.vmand import VmandClient, Which
from edgehold.cli import Output
from vmand.cli_options import PARTITION, ask, option


class KeyType(click.ParamType):  # type: ignore[type-arg] # as in cli_options.py
    """A key, as ``^]`` or as one character."""

    name = "key"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The byte that the key sends (ascii(7): with Ctrl, the lower five bits)."""
        text = str(value).upper() if str(value).startswith("^") and len(str(value)) == 2 else str(value)
        if len(text) == 2 and "@" < text[1] <= "_":
            return ord(text[1]) & 0x1F
        if len(text) != 1 or not text.isascii():
            self.fail(f"{value!r}: write ^] for Ctrl and ], or one character", param, ctx)
        return ord(text)


@click.command()
@PARTITION
@option("tail", is_flag=True, help="Print the last output, and end.")
@option("lines", type=click.IntRange(1), help="With --tail: at most so many lines of it.")
@option("follow", is_flag=True, help="With --tail: go on until interrupted or the partition is gone.")
@option(
    "escape",
    type=KeyType(),
    default="^]",
    show_default=True,
    metavar="KEY",
    help="The key that ends it: ^X or a character.",
)
@click.pass_obj
def console(output: Output, *, partition: Which, tail: bool, lines: int | None, follow: bool, escape: int) -> None:
    """A guest's console: what it printed last, what it prints, and what you type.

    The guest goes on when you leave.
    """
    if tail or follow or lines:
        _tail(output, partition, lines=lines, follow=follow)
    elif output.as_json:
        raise click.UsageError("a terminal is no JSON; --tail prints the last output")
    elif not sys.stdin.isatty():
        raise click.UsageError("stdin is no terminal; --tail prints the last output, --tail --follow what comes too")
    else:
        _attach(output, partition, escape)


def _tail(output: Output, partition: Which, *, lines: int | None, follow: bool) -> None:
    async def work(vmand: VmandClient) -> None:
        if not follow:
            text = _last(await vmand.console(partition), lines)
            output.show({"text": text}, text.rstrip)
            return
        _print(output, _last(await vmand.subscribe(partition, console=True), lines))
        async for event in vmand.events():
            if event.kind == "console":
                _print(output, event.text)
            elif event.kind == "gone":
                return

    ask(output, work)


def _last(text: str, lines: int | None) -> str:
    return text if lines is None else "".join(text.splitlines(keepends=True)[-lines:])


def _print(output: Output, text: str) -> None:
    if output.as_json:
        output.event({"text": text}, "")
    else:
        click.echo(text, nl=False)


def _attach(output: Output, partition: Which, escape: int) -> None:
    from vmand import terminal  # noqa: PLC0415 - --tail needs none

    with ask(output, lambda vmand: vmand.attach_console(partition)) as stream:
        click.echo(f"the console of partition {partition}; {_name(escape)} ends it, the guest goes on", err=True)
        ended = terminal.converse(stream, keyboard=0, screen=1, escape=escape)
    if ended.why is terminal.Why.TERMINAL:  # nobody is there to be told
        raise click.exceptions.Exit(128 + signal.SIGHUP)
    if ended.why is terminal.Why.SIGNAL:
        click.echo(f"\n{signal.strsignal(ended.signal)}", err=True)
        raise click.exceptions.Exit(128 + ended.signal)
    if ended.why is terminal.Why.GUEST:
        click.echo(f"\nthe console has ended; vmanctl status {partition} says why", err=True)
    else:
        click.echo(f"\nthe guest goes on; vmanctl console {partition} comes back", err=True)


def _name(key: int) -> str:
    return f"^{chr(key | 0x40)}" if key < 0x20 else chr(key)
