"""``deadlined run`` and ``deadlined recover``: what a person types where no daemon is asked."""

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from deadlined import command, leftovers
from deadlined.cli_options import DRY_RUN, SIZING, in_options, options, policy
from deadlined.config import load, policy_of
from deadlined.rules import rule_config
from edgehold.api.deadlined import Policy
from edgehold.cli import table
from edgehold.clock import NS_PER_MS, NS_PER_S, SystemClock
from edgehold.errors import EX_USAGE, BadRequestError, EdgeholdError, UnavailableError

if TYPE_CHECKING:  # loading it takes a tenth of a second
    from deadlined.run import Report

_HEADER = ("TID", "NAME", "STATE", "MEAN/ms", "PEAK/ms", "PERIOD/ms", "WANTED/ms", "BUDGET/ms")
# What the daemon's unit gives it too: policies are changed by the first, and root's files are written by the second.
_RIGHTS = "+sys_nice,+dac_override"
_CONTEXT = {"help_option_names": ["-h", "--help"]}

_REPORT = options(
    click.option("--json", "as_json", is_flag=True, help="At the end, a line of JSON on stderr: what was measured."),
    click.option("-v", "--verbose", is_flag=True, help="At the end, the table also where stderr is no terminal."),
)


def sized(given: Mapping[str, Any]) -> Policy:
    """The policy that the options make; a budget or a floor that is not given is made to fit.

    Raises:
        BadRequestError: it can't be; names the options.
    """
    wanted = policy_of(policy(given), Policy())
    if problem := rule_config(wanted).problem():
        raise BadRequestError(in_options(problem))
    return wanted


@click.command(
    short_help="Run a command under reservations.", context_settings=_CONTEXT | {"allow_interspersed_args": False}
)
@SIZING
@DRY_RUN
@_REPORT
@click.argument("argv", metavar="COMMAND [ARGUMENT]...", nargs=-1, required=True, type=click.UNPROCESSED)
def run(*, argv: tuple[str, ...], as_json: bool, verbose: bool, **given: Any) -> None:
    """Run a command, and hold it and all that it starts by reservations that size themselves until it ends.

    No daemon is needed, the privilege is (CAP_SYS_NICE). What the command leaves running gets its own policy back.
    Signals are passed on to the command.

    Exit status: the command's; 128 and the signal's number if one ended it; 127 it was not found, 126 it could not be
    run, 125 a fault of deadlined's own: wrong options, or it may make no reservations. The command was not started
    then.

    \b
    Examples:
      deadlined run -- ./control --rate 100
      deadlined run --period-ms auto -v -- ./control
      deadlined run --dry-run -- make        measures only; anybody may
    """
    from deadlined import run as work  # noqa: PLC0415 - who asks for --help need not wait for it

    logging.basicConfig(level=logging.WARNING, format="deadlined: %(message)s")
    report = work.run(argv, sized(given))
    if as_json:
        click.echo(msgspec.json.encode(report).decode(), err=True)
    elif verbose or sys.stderr.isatty():
        click.echo(table_of(report), err=True)
    raise click.exceptions.Exit(report.status)


def table_of(report: "Report") -> str:
    """What was measured, a row a thread, with the reasons below."""
    head = f"deadlined: {report.elapsed_ns / NS_PER_S:.1f} s, executed per period:"
    rows = [
        (
            one.tid, one.name, one.state.value, _ms(one.mean_executed_ns), _ms(one.peak_executed_ns),
            _ms(one.period_ns), _ms(one.wanted_ns), _ms(one.budget_ns),
        )
        for one in report.threads
        if one.windows
    ]  # fmt: skip
    short = sum(not one.windows for one in report.threads)
    lines = [head, table(_HEADER, rows)] if rows else []
    if not rows:
        lines.append("deadlined: the command ended before there was anything to measure")
    elif short:
        lines.append(f"and {short} that ended before there was anything to measure")
    lines += [f"thread {one.tid} ({one.name}): {one.reason}" for one in report.threads if one.reason]
    return "\n".join(lines)


def _ms(ns: int) -> str:
    return f"{ns / NS_PER_MS:.2f}"


@click.command(short_help="Restore what a killed deadlined left.", context_settings=_CONTEXT)
@click.option(
    "--config", type=click.Path(path_type=Path, readable=False), help="deadlined's settings: where its journal is."
)
def recover(*, config: Path | None) -> None:
    """Give back what a deadlined, or a `deadlined run`, that was killed has left: each thread its own policy, each
    group its own limit. What is restored is told. It does no harm where nothing is.

    A running deadlined has done it when it began; then this is refused.
    """
    from deadlined.engine import Engine  # noqa: PLC0415 - who asks for --help need not wait for it

    logging.basicConfig(level=logging.WARNING, format="deadlined: %(message)s")
    settings = load(config)
    _become_owner(Path(settings.state_dir))
    clock = SystemClock()
    try:
        engine = Engine(clock, Path(settings.state_dir), cycle_ms=500, fast_cycle_ms=0, history=1, max_threads=1)
    except UnavailableError as error:
        text = f"{error.message}. Where deadlined runs, it put right what was left when it began"
        raise UnavailableError(text, retryable=False) from None
    try:
        runs = leftovers.adopt(engine.journal, clock)
        found = engine.recover()
        left = len(engine.journal.held()) + len(engine.journal.quotas())
    finally:
        engine.close()
    click.echo(f"restored: {found.threads} threads, {found.groups} groups; killed runs found: {runs}")
    if left:
        click.echo(f"not restored: {left}; see above, and try again", err=True)
        raise click.exceptions.Exit(1)


def _become_owner(state_dir: Path) -> None:
    """Begin anew as the daemon's own user, if root calls and the state is that user's.

    So a row that it wrote is believed no further than its own rights reach, and what is written stays its own.

    Raises:
        UnavailableError: that can't be.
    """
    try:
        found = state_dir.stat()
    except OSError:
        return
    if os.geteuid() != 0 or found.st_uid == 0:
        return
    argv = [
        "setpriv", f"--reuid={found.st_uid}", f"--regid={found.st_gid}", "--clear-groups",
        *(f"--{one}=-all,{_RIGHTS}" for one in ("inh-caps", "ambient-caps", "bounding-set")),
        "--no-new-privs", "--", *sys.orig_argv,
    ]  # fmt: skip
    try:
        os.execvp(argv[0], argv)  # noqa: S606 - no shell is wanted
    except OSError as error:
        text = f"setpriv (util-linux) is needed to become the user of {state_dir}: {error.strerror}"
        raise UnavailableError(text, retryable=False) from error


def main(name: str, arguments: Sequence[str]) -> int:
    """One of the two. Returns the exit status."""
    one, usage = (run, command.REFUSED) if name == "run" else (recover, EX_USAGE)
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    as_json = one is run and "--json" in own
    try:
        status = one.main(args=list(arguments), prog_name=f"deadlined {name}", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        error.show()
        return usage
    except EdgeholdError as error:
        text = json.dumps({"error": error.to_wire()}) if as_json else f"deadlined: {error.code}: {error.message}"
        click.echo(text, err=True)
        return command.REFUSED if one is run else error.exit_status
    except command.CommandError as error:
        click.echo(f"deadlined: {error}", err=True)
        return error.status
