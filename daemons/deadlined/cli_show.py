"""What deadlinectl prints for people. Pure: messages in, text out. Times are in milliseconds with two decimals."""

from collections.abc import Iterable, Sequence

from edgehold.api.deadlined import (
    Actuator,
    Attachment,
    AttachmentDetail,
    Capacity,
    GroupStatus,
    PeriodOrigin,
    Policy,
    Rule,
    Sample,
    ThreadStatus,
)
from edgehold.cli import table
from edgehold.clock import NS_PER_MS

_LIST = (
    "ID",
    "TARGET",
    "TID",
    "NAME",
    "STATE",
    "BUDGET/ms",
    "WANTED/ms",
    "PERIOD/ms",
    "EXECUTED/ms",
    "WAITED/ms",
    "NOTE",
)
_SAMPLES = ("SECONDS", "TID", "EXECUTED/ms", "WAITED/ms", "BUDGET/ms", "WANTED/ms", "L", "NOTE")
_TARGET_WIDTH = 40
_NUMBERS = frozenset("0123456789.-~?")
_MARKS = {PeriodOrigin.INFERRED: "~", PeriodOrigin.OBSERVING: "?", PeriodOrigin.UNKNOWN: "?"}
# Below this nobody sees that he gets less than is wanted for him.
_LESS_NS = 10_000
_TOLD_THREADS = 8
"""Threads that are named with a reason; the rest is counted."""
_PICTURES = 8
"""Threads that are drawn; the rest is counted."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII = " .:-=+*#"
_NARROWEST = 20


def ms(ns: int) -> str:
    """Nanoseconds in milliseconds."""
    return f"{ns / NS_PER_MS:.2f}"


def per_period(ns: int, one: Sample) -> int:
    """Of a whole window, as of one period."""
    return ns * one.period_ns // one.elapsed_ns if one.elapsed_ns else 0


def plain(text: str) -> str:
    """A name that somebody else chose must not command the terminal, nor look like a line of ours."""
    return "".join(one if one.isprintable() else "?" for one in text)


def columns(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in which a column of numbers stays one where some are missing (-) or marked (~, ?)."""
    cells = [[str(one) for one in row] for row in rows]
    lines = [list(header), *cells]
    for n in range(len(header)):
        own = [row[n] for row in cells]
        if any(one != "-" for one in own) and all(one and set(one) <= _NUMBERS for one in own):
            width = max(len(row[n]) for row in lines)
            for row in lines:
                row[n] = row[n].rjust(width)
    return table(lines[0], lines[1:])


def listing(found: Sequence[Attachment], *, lines: int | None = None) -> str:
    """A row a thread or group, with what a person should know below. ``lines``: no more than that, for a terminal."""
    if not found:
        return "nothing is attached"
    text = columns(_LIST, [row for one in found for row in _rows(one)])
    told = "\n".join([text, *(line for one in found for line in reasons(one))])
    every = told.splitlines()
    if lines is None or len(every) < lines:
        return told
    kept = max(lines - 2, 1)
    return "\n".join([*every[:kept], f"... and {len(every) - kept} lines more"])


def _rows(one: Attachment) -> list[tuple[object, ...]]:
    name = _short(plain(str(one.target)))
    if one.group is not None:
        return [(one.id, name, "-", "-", _group_state(one.group), *_group_figures(one.group))]
    if not one.threads:
        period = _period(one.policy)
        return [(one.id, name, "-", "-", "suspended" if one.suspended else "-", "-", "-", period, "-", "-", "")]
    return [(one.id, name, thread.tid, plain(thread.name), *_figures(thread)) for thread in one.threads]


def _figures(one: ThreadStatus) -> tuple[str, ...]:
    notes = ["saturated"] * one.saturated + ["less"] * bool(one.budget_ns and one.wanted_ns - one.budget_ns > _LESS_NS)
    return (
        one.state.value, _or_dash(one.budget_ns), ms(one.wanted_ns),
        _MARKS.get(one.period_origin, "") + ms(one.period_ns), ms(one.executed_ns), ms(one.run_delay_ns),
        ", ".join(notes),
    )  # fmt: skip


def _group_state(one: GroupStatus) -> str:
    return "held" if one.budget_ns else "free"


def _group_figures(one: GroupStatus) -> tuple[str, ...]:
    notes = ["saturated"] * one.saturated + ["less"] * bool(one.budget_ns and one.wanted_ns - one.budget_ns > _LESS_NS)
    return (
        _or_dash(one.budget_ns), ms(one.wanted_ns), ms(one.period_ns), ms(one.executed_ns), ms(one.throttled_ns),
        ", ".join(notes),
    )  # fmt: skip


def _or_dash(ns: int) -> str:
    return ms(ns) if ns else "-"


def _period(policy: Policy) -> str:
    return f"?{ms(policy.first_period_ns)}" if policy.period_ns == "auto" else ms(policy.first_period_ns)


def _short(text: str) -> str:
    """The two ends of it: a container's scope is longer than a line, and its end tells it from another."""
    if len(text) <= _TARGET_WIDTH:
        return text
    head = _TARGET_WIDTH // 2 - 2
    return f"{text[:head]}...{text[-(_TARGET_WIDTH - head - 3) :]}"


def reasons(one: Attachment) -> list[str]:
    """What a person should know, a line each; threads of the same reason in one."""
    told = [f"{one.id}: {plain(one.reason)}"] if one.reason else []
    if one.suspended and not one.reason:
        told.append(f"{one.id}: the guest is suspended; its budgets are at the floor until it is resumed")
    if one.group is not None and one.group.reason:
        told.append(f"{one.id}: {plain(one.group.reason)}")
    by_reason: dict[str, list[int]] = {}
    for thread in one.threads:
        if thread.reason:
            by_reason.setdefault(thread.reason, []).append(thread.tid)
    for reason, tids in by_reason.items():
        more = f" and {len(tids) - _TOLD_THREADS} more" if len(tids) > _TOLD_THREADS else ""
        named = ", ".join(map(str, tids[:_TOLD_THREADS]))
        told.append(f"{one.id}, thread{'s' * (len(tids) > 1)} {named}{more}: {plain(reason)}")
    return told


def policy_text(policy: Policy) -> str:
    """A policy in a line."""
    period = "auto" if policy.period_ns == "auto" else f"{ms(policy.period_ns)} ms"
    if policy.rule is Rule.FIXED:
        sizing = f"fixed, budget {ms(policy.initial_budget_ns)} ms"
    else:
        sizing = (
            f"{policy.rule.value}, overallocation {policy.overallocation:g}, window {policy.window}, "
            f"floor {ms(policy.min_budget_ns)} ms"
        )
    per = "" if policy.actuator is Actuator.DEADLINE else " and CPU"
    dry = ", dry run: nothing is changed" if policy.dry_run else ""
    return (
        f"policy: {sizing}, cap {policy.cap:g} of the period{per}, period {period}, weight {policy.weight}, "
        f"by {policy.actuator.value}{dry}"
    )


def detail(found: AttachmentDetail, *, now_ns: int, rows: int, width: int, blocks: bool) -> str:
    """An attachment: policy, a picture of its history, the last samples. ``blocks``: the terminal has such letters."""
    one = found.attachment
    parts = [listing([one]), policy_text(one.policy)]
    parts += [
        f"thread {thread.tid}: {ms(thread.period_ns)} ms is inferred, {thread.confidence:.0%} of its activations fit"
        for thread in one.threads
        if thread.period_origin is PeriodOrigin.INFERRED
    ]
    if rows and (picture := _picture(found.history, width=width, blocks=blocks)):
        parts.append(picture)
    last = found.history[max(len(found.history) - rows, 0) :]
    parts.append(samples(last, now_ns=now_ns) if last else "no sample yet" if not found.history else "")
    return "\n\n".join(filter(None, parts))


def samples(found: Sequence[Sample], *, now_ns: int) -> str:
    """A row a sample, per period; L is the reference rule's multiplier."""
    return columns(
        _SAMPLES,
        [
            (
                f"{(one.time_ns - now_ns) / 1e9:.1f}", one.tid, ms(per_period(one.executed_ns, one)),
                ms(per_period(one.run_delay_ns, one)), ms(one.budget_ns), ms(one.wanted_ns), one.multiplier,
                "saturated" if one.saturated else "",
            )
            for one in found
        ],
    )  # fmt: skip


def _picture(history: Sequence[Sample], *, width: int, blocks: bool) -> str:
    """Two lines a thread, budget and executed, on one scale from 0; the newest at the right."""
    by_thread: dict[int, list[Sample]] = {}
    for one in history:
        by_thread.setdefault(one.tid, []).append(one)
    drawn = list(by_thread.items())[:_PICTURES]
    if not drawn or len(history) < 2:
        return ""
    room = max(width - 32, _NARROWEST)
    lines = []
    for tid, own in drawn:
        kept = own[-room:]
        executed = [per_period(one.executed_ns, one) for one in kept]
        budgets = [one.budget_ns for one in kept]
        top = max(*executed, *budgets, 1)
        for what, values in (("budget", budgets), ("executed", executed)):
            largest = f"{ms(max(values))} ms at most"
            lines.append(f"{tid or 'group':>8} {what:8} {spark(values, top=top, blocks=blocks)} {largest}")
    if len(by_thread) > len(drawn):
        lines.append(f"... and {len(by_thread) - len(drawn)} threads more")
    return "\n".join(lines)


def spark(values: Iterable[int], *, top: int, blocks: bool) -> str:
    """A character for each value: the lowest is 0, the highest ``top``."""
    steps = _BLOCKS if blocks else _ASCII
    return "".join(steps[min(max(value, 0) * len(steps) // max(top, 1), len(steps) - 1)] for value in values)


def capacity(found: Capacity) -> str:
    """What is left, held and wanted."""
    short = found.wanted - found.held > found.resolution
    return (
        f"available  {found.available:.4f} of {found.cpus} CPUs (steps of {found.resolution:.4f})\n"
        f"held       {found.held:.4f} CPUs by deadlined\n"
        f"wanted     {found.wanted:.4f} CPUs by its rules{'; see the reasons in `deadlinectl list`' if short else ''}\n"
        f"deadlined  runs as {found.monitor_policy}\n"
        f"samples    {found.sampler}"
    )
