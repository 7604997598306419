"""``make experiment``: NANCY D3.4's Figures 24 to 27 on this host, by the document's rule and by the fast one.

Exit status 0 only if every bar was kept in every repetition, 1 where one was missed, 2 where this host can't show it.
"""

import argparse
import asyncio
import os
import shutil
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

from demo import host
from edgehold.errors import EdgeholdError
from edgehold.testing.load import deadline_refusal
from experiment import picture, report
from experiment.analysis import VARIANTS, Run, Summary, summary
from experiment.bars import verdicts
from experiment.run import least_seconds, play

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "build/experiment"
FIRST_BUDGETS_MS = (2.0, 8.0)
SECONDS = 18.0


@dataclass(slots=True)
class Book:
    """What has been measured so far."""

    runs: list[Run] = field(default_factory=list)
    summaries: list[tuple[Summary, ...]] = field(default_factory=list)

    def add(self, run: Run) -> None:
        """Reckon with one run, and tell whoever watches."""
        threads = tuple(summary(run, thread) for thread in run.threads)
        self.runs.append(run)
        self.summaries.append(threads)
        for one, thread in zip(threads, run.threads, strict=True):
            path = " ".join(f"{budget:.1f}" for budget in one.path_ms[: report.PATH_CYCLES])
            good = "never" if one.good_cycle is None else f"after {one.good_ms:.0f} ms, cycle {one.good_cycle}"
            print(
                f"{run.number}  {one.variant:10}  from {one.first_budget_ms:g} ms, {one.work_ms:g} ms thread: {path}; "
                f"good {good}; steady Q/C {one.steady[1]:.2f}; others used {run.others_cpus:.2f} CPUs"
                f"{'; ' if thread.reason else ''}{thread.reason}",
                flush=True,
            )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiment", description="Budgets that size themselves.")
    parser.add_argument("--repeat", type=int, default=1, help="so often each run (default: 1)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"length of a run (default: {SECONDS:g})")
    parser.add_argument(
        "--rule", choices=[one.key for one in VARIANTS], action="append", help="only this one; may be repeated"
    )
    parser.add_argument(
        "--first-budget-ms", type=float, choices=FIRST_BUDGETS_MS, action="append", help="only this one"
    )
    parser.add_argument("--phase-ms", type=float, default=0.0, help="from the attachment to the first job (default: 0)")
    parser.add_argument(
        "--docs", type=Path, help="a directory whose experiment.md gets the new table, and whose figures/ the pictures"
    )
    options = parser.parse_args()
    least = max(least_seconds(one) for one in VARIANTS)
    if options.repeat < 1 or options.seconds < least:
        parser.error(f"--repeat is at least 1, --seconds at least {least:g}")
    return options


async def measure(book: Book, options: argparse.Namespace) -> None:
    """All runs, one after the other."""
    variants = [one for one in VARIANTS if not options.rule or one.key in options.rule]
    for number in range(1, options.repeat + 1):
        for first_ms in options.first_budget_ms or FIRST_BUDGETS_MS:
            for variant in variants:
                book.add(
                    await play(variant, first_ms, seconds=options.seconds, number=number, phase_ms=options.phase_ms)
                )


async def interruptible(book: Book, options: argparse.Namespace) -> int:
    """`measure`, which Ctrl-C ends in order. Returns the exit status as far as it goes."""
    measuring = asyncio.create_task(measure(book, options))
    for sign in (signal.SIGINT, signal.SIGTERM):  # a second one changes nothing: it is being undone already
        asyncio.get_running_loop().add_signal_handler(sign, lambda: measuring.cancelling() or measuring.cancel())
    try:
        await measuring
    except asyncio.CancelledError:
        print("experiment: interrupted", file=sys.stderr)
        return 130
    except (EdgeholdError, ValueError) as error:
        print(f"experiment: stopped: {error}", file=sys.stderr)
        return 2
    return 0


def main() -> int:
    """Measure, print, draw. Returns the exit status."""
    options = arguments()
    if why := "it needs root" if os.geteuid() != 0 else deadline_refusal():
        print(f"experiment: this host can't show it: {why}", file=sys.stderr)
        return 2
    facts = host.facts()
    book = Book()
    status = asyncio.run(interruptible(book, options))
    if not book.runs:
        return status
    facts["others' CPU time"] = f"{max(run.others_cpus for run in book.runs):.2f} CPUs in the busiest run"
    facts["admission bandwidth"] = f"at least {min(run.capacity_cpus for run in book.runs):.2f} CPUs before each run"
    slowest = max(thread.request_ms for run in book.runs for thread in run.threads)
    facts["slowest attachment"] = f"{slowest:.0f} ms for the request"
    facts["load after"] = " ".join(f"{one:.2f}" for one in os.getloadavg())
    pictures = [
        path
        for first_ms in FIRST_BUDGETS_MS
        if (runs := [one for one in book.runs if one.number == 1 and one.first_budget_ns == round(first_ms * 1e6)])
        for path in picture.draw(runs, RESULTS)
    ]
    found = verdicts([one for threads in book.summaries for one in threads])
    page = report.write(
        RESULTS, runs=book.runs, summaries=book.summaries, verdicts=found, facts=facts, pictures=pictures
    )
    print(f"\n{report.show(book.runs, book.summaries)}\n")
    print("\n".join([*(f"{name}: {text}" for name, text in facts.items()), "", *(one.line() for one in found)]))
    print(f"report: {page.relative_to(ROOT)}")
    if options.docs:
        report.document(options.docs, runs=book.runs, summaries=book.summaries, verdicts=found, facts=facts)
        for path in pictures:
            if path.suffix == ".png":
                shutil.copy(path, options.docs / "figures")
    return status or (0 if all(one.good for one in found) else 1)


if __name__ == "__main__":
    sys.exit(main())
