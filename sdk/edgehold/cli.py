"""What every client command shares: ``--json``, ``--socket``, errors with a cure, tables, progress, exit statuses,
completion."""

import asyncio
import contextlib
import importlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from edgehold import __version__
from edgehold.errors import EX_SOFTWARE, EX_USAGE, EdgeholdError

T = TypeVar("T")

INTERRUPTED = 130
"""The exit status after ^C, as a shell has it: 128 and the signal's number."""
# What ends before this is not worth a line that comes and goes.
_PROGRESS_AFTER_S = 0.5
_PROGRESS_EVERY_S = 0.2
_SPINNER = "|/-\\"


class Output:
    """Where results go: a table for people, JSON for machines."""

    def __init__(self, *, as_json: bool, socket: Path) -> None:
        self.as_json = as_json
        self.socket = socket

    def show(self, value: Any, text: Callable[[], str]) -> None:
        """Print ``value`` as JSON where ``--json`` was given, else what ``text`` makes of it."""
        if self.as_json:
            import msgspec  # noqa: PLC0415 - only for those who asked

            click.echo(json.dumps(msgspec.to_builtins(value), indent=2))
        elif line := text():
            click.echo(line)

    def event(self, value: Any, text: str) -> None:
        """Print one of many that come as time goes by: as JSON it is one line, so that a reader can take it at once."""
        if self.as_json:
            import msgspec  # noqa: PLC0415 - only for those who asked

            click.echo(msgspec.json.encode(value).decode())
        elif text:
            click.echo(text)


class LazyGroup(click.Group):
    """A group that loads a command's module when the command is asked for: the others cost nothing."""

    def __init__(self, *args: Any, lazy: Mapping[str, str], **options: Any) -> None:
        """``lazy``: ``module:attribute`` by the command's name; two names may mean the same command."""
        super().__init__(*args, **options)
        self._lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        return sorted({*super().list_commands(ctx), *self._lazy})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name, None where there is none."""
        if cmd_name not in self.commands and cmd_name in self._lazy:
            module, _colon, attribute = self._lazy[cmd_name].partition(":")
            self.add_command(getattr(importlib.import_module(module), attribute), cmd_name)
        return super().get_command(ctx, cmd_name)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as they need to be; numbers flush right."""
    cells = [[str(one) for one in row] for row in rows]
    widths = [max(len(row[n]) for row in [list(header), *cells]) for n in range(len(header))]
    right = [
        bool(cells) and all(row[n].replace(".", "", 1).lstrip("-").isdigit() for row in cells)
        for n in range(len(header))
    ]
    lines = [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        )
        for row in [list(header), *cells]
    ]
    return "\n".join(line.rstrip() for line in lines)


def client_group(
    *, default_socket: Path, variable: str, help_text: str, commands: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], click.Group]:
    """The top of a client command: options that stand before the subcommand, and the one place where errors end.

    The socket's path can also come from the environment, for a daemon that runs in a private directory.
    ``commands``: those that are loaded when they are asked for, see `LazyGroup`.
    """

    def decorate(function: Callable[..., None]) -> click.Group:
        @click.group(
            cls=LazyGroup,
            lazy=commands or {},
            help=help_text,
            context_settings={"help_option_names": ["-h", "--help"]},
            name=function.__name__,
        )
        @click.option("--json", "as_json", is_flag=True, help="Print JSON for machines instead of a table.")
        @click.option(
            "--socket",
            # Not looked at here: only connecting tells who may and whether somebody listens.
            type=click.Path(path_type=Path, readable=False),
            default=default_socket,
            envvar=variable,
            show_default=True,
            show_envvar=True,
            help="The daemon's socket.",
        )
        @click.version_option(__version__)
        @click.pass_context
        def group(context: click.Context, *, as_json: bool, socket: Path) -> None:
            context.obj = Output(as_json=as_json, socket=socket)

        return group

    return decorate


def completion_command(group: click.Group, program: str) -> None:
    """Add ``completion SHELL``, which prints the script that the shell evaluates."""

    @group.command("completion", short_help="Print shell completion for bash, zsh or fish.")
    @click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
    def completion(shell: str) -> None:
        """Print shell completion; for bash, put this into ~/.bashrc:

        eval "$(PROGRAM completion bash)"
        """
        from click.shell_completion import get_completion_class  # noqa: PLC0415 - rare

        kind = get_completion_class(shell)
        if kind is not None:
            click.echo(kind(group, {}, program, f"_{program.upper()}_COMPLETE").source())


def wait_for(work: Coroutine[Any, Any, T], *, interrupted: str = "") -> T:
    """Run a command's asynchronous part. ^C ends the command with status 130.

    ``interrupted``: what is said then, where the daemon goes on with what was asked for.
    """
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        if interrupted:
            click.echo(interrupted, err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None


@contextlib.asynccontextmanager
async def progress(doing: str, *, limit_s: float | None = None) -> AsyncIterator[None]:
    """While the block runs: one line on stderr that says what is done and for how long. It is gone at the end, and
    there is none where stderr is no terminal or ``doing`` is empty.

    ``limit_s``: seconds after which the daemon does something else.
    """
    if not doing or not sys.stderr.isatty():
        yield
        return
    teller = asyncio.create_task(_tell(doing, limit_s), name="progress")
    try:
        yield
    finally:
        teller.cancel()
        await asyncio.gather(teller, return_exceptions=True)


async def _tell(doing: str, limit_s: float | None) -> None:
    begun = time.monotonic()
    of = "" if limit_s is None else f" of {limit_s:g} s"
    await asyncio.sleep(_PROGRESS_AFTER_S)
    try:
        for sign in itertools.cycle(_SPINNER):
            text = f"{sign} {doing} … {int(time.monotonic() - begun)} s{of}"
            click.echo(f"\r{text[: _columns()]:{_columns()}}", nl=False, err=True)
            await asyncio.sleep(_PROGRESS_EVERY_S)
    finally:
        click.echo(f"\r{'':{_columns()}}\r", nl=False, err=True)


def _columns() -> int:
    return shutil.get_terminal_size().columns - 1  # in the last one some terminals begin a new line


def main(group: click.Group, program: str) -> None:
    """Run a client command: an `EdgeholdError` becomes one line on stderr and its exit status.

    ``--json`` may stand anywhere; the error is then its wire form. 0: done. 1: refused or failed. 64: wrong usage.
    75: try again later. 77: not permitted. 130: interrupted.
    """
    arguments = sys.argv[1:]
    for one in arguments:
        try:
            one.encode()
        except UnicodeEncodeError:  # os.fsdecode: bytes of a shell that are no text
            click.echo(f"{program}: {one!a} is not UTF-8, and what a daemon is told is", err=True)
            sys.exit(EX_USAGE)
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    as_json = "--json" in own
    if as_json:
        arguments = ["--json", *(one for one in own if one != "--json"), *arguments[len(own) :]]
    try:
        status = group.main(args=arguments, prog_name=program, standalone_mode=False)
        if isinstance(status, int):  # --help, --version and context.exit() end so
            sys.exit(status)
    except click.Abort:
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(EX_USAGE if isinstance(error, click.UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except EdgeholdError as error:
        again = " (it may work later)" if error.retryable else ""
        text = f"{program}: {error.code}: {error.message}{again}"
        click.echo(json.dumps({"error": error.to_wire()}) if as_json else text, err=True)
        sys.exit(error.exit_status)
    except BrokenPipeError:
        # The reader of our output left (`| head`): nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(EX_SOFTWARE)
