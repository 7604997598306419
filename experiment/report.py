"""What the experiment leaves: a table for the terminal, a page with the pictures, and everything as JSON."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from edgehold.cli import table
from experiment.analysis import Run, Summary
from experiment.bars import Verdict

PATH_CYCLES = 8
HEADER = [
    "RULE", "FROM", "THREAD", "BUDGET IN MS AFTER CYCLES 1 TO 8", "GOOD IN CYCLE", "PEAK", "SETTLED", "STEADY Q/C",
    "WORST RESPONSE", "LATE", "CALLS",
]  # fmt: skip
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Edgehold: budgets that size themselves, by two rules</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1d2329; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }} svg {{ width: 100%; height: auto; }}
pre {{ overflow-x: auto; font-size: .8rem; background: #f5f6f8; padding: .8rem; }}
table {{ border-collapse: collapse; }} td {{ padding: .2rem .8rem; border-bottom: 1px solid #e2e5e9; }}
</style></head><body>
<h1>Budgets that size themselves, by two rules</h1>
<p>Two real threads execute 10 and 20 ms every 100 ms; each is given far too small a SCHED_DEADLINE budget, and
deadlined finds the right one (after NANCY D3.4, Figures 24 to 27).</p>
{pictures}
<h2>The table</h2><pre>{rows}</pre>
<h2>The bars</h2><pre>{bars}</pre>
<h2>The host</h2><table>{facts}</table>
</body></html>
"""


def cells(one: Summary, calls: str) -> list[str]:
    """A row of the table."""
    path = " ".join(f"{budget:.1f}" for budget in one.path_ms[:PATH_CYCLES])
    good = "never" if one.good_cycle is None else f"{one.good_cycle} ({one.good_ms:.0f} ms)"
    low, mean, high = one.steady
    settled = "never" if one.settled_cycle is None else str(one.settled_cycle)
    return [
        one.variant, f"{one.first_budget_ms:g} ms", f"{one.work_ms:g} ms", path, good,
        f"{one.peak_ms:.1f} @{one.peak_cycle}", settled, f"{low:.2f} {mean:.2f} {high:.2f}",
        f"{one.worst_response_ms:.0f} ms", str(one.late), calls,
    ]  # fmt: skip


def show(runs: Sequence[Run], summaries: Sequence[Sequence[Summary]]) -> str:
    """All runs, a row for each thread; the calls are of both threads of a run together."""
    rows = [
        cells(one, f"{run.setattr_calls} in {run.cycles}" if index == 0 else "")
        for run, threads in zip(runs, summaries, strict=True)
        for index, one in enumerate(threads)
    ]
    return table(HEADER, rows)


def write(
    directory: Path,
    *,
    runs: Sequence[Run],
    summaries: Sequence[Sequence[Summary]],
    verdicts: Sequence[Verdict],
    facts: Mapping[str, str],
    pictures: Sequence[Path],
) -> Path:
    """Write ``results.json`` and ``report.html``. Returns the page's path."""
    directory.mkdir(parents=True, exist_ok=True)
    everything = {
        "facts": facts, "verdicts": [{"line": one.line(), "good": one.good} for one in verdicts],
        "summaries": summaries, "runs": runs,
    }  # fmt: skip
    (directory / "results.json").write_bytes(msgspec.json.encode(everything) + b"\n")
    drawn = [path.read_text(encoding="utf-8") for path in pictures if path.suffix == ".svg"]
    page = directory / "report.html"
    page.write_text(
        PAGE.format(
            pictures="\n".join(text[text.index("<svg") :] for text in drawn),
            rows=html.escape(show(runs, summaries)),
            bars=html.escape("\n".join(one.line() for one in verdicts)),
            facts="".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in facts.items()),
        ),
        encoding="utf-8",
    )
    return page


def document(
    directory: Path,
    *,
    runs: Sequence[Run],
    summaries: Sequence[Sequence[Summary]],
    verdicts: Sequence[Verdict],
    facts: Mapping[str, str],
) -> None:
    """Put the first repetition's table, the host and the bars of all into ``experiment.md``, between its marks."""
    page = directory / "experiment.md"
    first = [index for index, run in enumerate(runs) if run.number == 1]
    rows = show([runs[index] for index in first], [summaries[index] for index in first])
    told = "\n".join([
        rows, "", *(f"{name}: {text}" for name, text in facts.items()), "", *(one.line() for one in verdicts)
    ])  # fmt: skip
    block = "\n".join(f"    {line}".rstrip() for line in told.splitlines())
    page.write_text(between_marks(page.read_text(encoding="utf-8"), f"\n\n{block}\n\n"), encoding="utf-8")


def between_marks(text: str, new: str) -> str:
    """A page whose measured part is replaced.

    Raises:
        ValueError: it has no marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _old, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} and {END}")
    return f"{before}{begin}{new}{end}{after}"
