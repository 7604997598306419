"""``deadlinectl replay``: what a rule would have wanted, from recorded samples. Asks nobody, changes nothing."""

from collections.abc import Sequence
from typing import IO, Any

import click
import msgspec

from deadlined import cli_show
from deadlined.cli_options import RULE, in_options, policy
from edgehold.api.deadlined import AttachmentDetail, Policy, Sample
from edgehold.cli import Output
from edgehold.clock import NS_PER_MS
from edgehold.errors import BadRequestError


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """A recorded sample, and what the rule makes of it. Times in nanoseconds."""

    time_ns: int
    tid: int
    executed_ns: int
    """Per period, as all of these."""
    run_delay_ns: int
    budget_ns: int
    recorded_ns: int
    """What the rule wanted then."""
    wanted_ns: int
    """What this one wants."""
    saturated: bool


def read(text: bytes) -> tuple[Policy, tuple[Sample, ...]]:
    """The policy and the samples of a recording: what ``deadlinectl --json show ID`` printed, or a list of samples.

    Raises:
        BadRequestError: it is neither; the text names the field.
    """
    try:
        if text.lstrip()[:1] == b"[":
            return Policy(), msgspec.json.decode(text, type=tuple[Sample, ...])
        detail = msgspec.json.decode(text, type=AttachmentDetail)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequestError(f"FILE is nothing that `deadlinectl --json show ID` prints: {error}") from None
    return detail.attachment.policy, detail.history


def run(samples: Sequence[Sample], how: Policy, *, cycle_ns: int) -> list[Replayed]:
    """Each thread's samples through a rule of its own; in the order of time.

    Raises:
        click.UsageError: the policy contradicts itself; names the options.
    """
    from deadlined import rules  # noqa: PLC0415 - the extension: only those who replay load it

    by_thread: dict[int, list[Sample]] = {}
    for one in samples:
        by_thread.setdefault(one.tid, []).append(one)
    fitting = {tid: _fitting(how, own[-1].period_ns) for tid, own in by_thread.items()}
    for fits in fitting.values():
        if problem := rules.rule_config(fits).problem():
            raise click.UsageError(in_options(problem))
    found = [
        Replayed(
            time_ns=one.time_ns,
            tid=tid,
            executed_ns=cli_show.per_period(one.executed_ns, one),
            run_delay_ns=cli_show.per_period(one.run_delay_ns, one),
            budget_ns=one.budget_ns,
            recorded_ns=one.wanted_ns,
            wanted_ns=wanted_ns,
            saturated=saturated,
        )
        for tid, own in by_thread.items()
        for one, (wanted_ns, saturated) in zip(own, rules.replay(own, fitting[tid], cycle_ns=cycle_ns), strict=True)
    ]
    return sorted(found, key=lambda one: (one.time_ns, one.tid))


def _fitting(how: Policy, last_period_ns: int) -> Policy:
    """With a period that was found in place of ``auto``, and budgets that fit it."""
    if how.period_ns != "auto":
        return how
    largest = int(how.cap * last_period_ns)
    return msgspec.structs.replace(
        how,
        period_ns=last_period_ns,
        initial_budget_ns=min(how.initial_budget_ns, largest),
        min_budget_ns=min(how.min_budget_ns, how.initial_budget_ns, largest),
    )


def text(found: Sequence[Replayed]) -> str:
    """A row a sample."""
    if not found:
        return "no sample in it"
    end = max(one.time_ns for one in found)
    header = ("SECONDS", "TID", "EXECUTED/ms", "WAITED/ms", "BUDGET/ms", "RECORDED/ms", "WANTED/ms", "NOTE")
    rows = [
        (
            f"{(one.time_ns - end) / 1e9:.1f}", one.tid, *map(cli_show.ms, (
                one.executed_ns, one.run_delay_ns, one.budget_ns, one.recorded_ns, one.wanted_ns,
            )), "saturated" if one.saturated else "",
        )
        for one in found
    ]  # fmt: skip
    return cli_show.columns(header, rows)


@click.command(short_help="What a rule makes of recorded samples.")
@click.argument("file", type=click.File("rb"))
@RULE
@click.option(
    "--cycle-ms", type=click.IntRange(10, 60_000), default=500, show_default=True,
    help="deadlined's cycle_ms when it was recorded.",
)  # fmt: skip
@click.pass_obj
def replay(output: Output, /, *, file: IO[bytes], cycle_ms: int, **given: Any) -> None:
    """Print what a rule would have wanted, from recorded samples: RECORDED is what was wanted then, WANTED what this
    policy wants. Asks nobody and changes nothing.

    FILE is what `deadlinectl --json show ID` printed; - is standard input. The policy is the recorded one, with the
    options that are given.

    Mind: the samples are those of a thread that had the recorded budgets. Under others it would have executed
    otherwise, most of all where it was saturated.

    \b
    Examples:
      deadlinectl --json show 1 > one.json
      deadlinectl replay one.json --rule reference --overallocation 0.2
      deadlinectl --json show 1 | deadlinectl replay - --window 10
    """
    recorded, samples = read(file.read())
    how = _with(recorded, policy(given))
    found = run(samples, how, cycle_ns=cycle_ms * NS_PER_MS)
    output.show(found, lambda: text(found))


def _with(recorded: Policy, fields: dict[str, Any]) -> Policy:
    return msgspec.convert(msgspec.to_builtins(recorded) | fields, Policy)
