"""The experiment's pictures: budgets above, response times below, every rule beside the others."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt

from edgehold.clock import NS_PER_MS, NS_PER_S
from experiment.analysis import Held, Run

COLOURS = ("#1f6fb2", "#d9822b")
GREY = "#8a8f98"
FIGURES = {2.0: ("24", "25"), 8.0: ("26", "27")}
"""Which figures of the document have budgets and response times from so many ms."""
BEFORE_S = 0.5
"""What is shown of the time before the attachment."""


def draw(runs: Sequence[Run], directory: Path) -> list[Path]:
    """One picture of runs with the same first budget, as PNG and SVG. Returns the paths, PNG first."""
    first_ms = runs[0].first_budget_ns / NS_PER_MS
    figure, axes = plt.subplots(
        2,
        len(runs),
        sharex=True,
        sharey="row",
        squeeze=False,
        figsize=(max(3.7 * len(runs), 6), 6),
        constrained_layout=True,
    )
    for run, above, below in zip(runs, axes[0], axes[1], strict=True):
        for thread, colour in zip(run.threads, COLOURS, strict=True):
            name = f"{thread.work_ns / NS_PER_MS:g} ms"
            times, budgets = budget_curve(thread)
            above.step(times, budgets, where="post", color=colour, lw=1.5, label=name)
            above.axhline(thread.work_ns / NS_PER_MS, color=colour, lw=0.8, ls=":")
            times, responses = response_curve(thread)
            below.plot(times, responses, ".-", ms=3, lw=0.6, color=colour, label=name)
            below.axhline(thread.work_ns / NS_PER_MS, color=colour, lw=0.8, ls=":")
        above.set_title(run.variant.title, loc="left")
        below.set_yscale("log")
        below.set_xlabel("seconds since the attachment")
        for axis in (above, below):
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            axis.axvline(0, color=GREY, lw=0.8)
    numbers = FIGURES.get(first_ms)
    labels = ("budget, ms per 100 ms", "response time, ms (log)")
    for row, label in enumerate(labels):
        after = f"\n(after NANCY D3.4, Figure {numbers[row]})" if numbers else ""
        axes[row][0].set_ylabel(f"{label}{after}")
    axes[0][-1].legend(title="executes", loc="upper right", frameon=False)
    figure.suptitle(
        f"Two threads, first budget {first_ms:g} ms; dotted: what each executes in 100 ms", x=0.01, ha="left"
    )
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"experiment-{first_ms:g}ms.{kind}" for kind in ("png", "svg")]
    with mpl.rc_context({"svg.hashsalt": "edgehold"}):  # the same runs, the same file
        for path in paths:
            figure.savefig(path, dpi=90, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return paths


def budget_curve(thread: Held) -> tuple[list[float], list[float]]:
    """Seconds since the attachment, and the budget in milliseconds from then on."""
    steps = thread.budgets()
    if thread.samples:
        steps.append((thread.samples[-1].time_ns, steps[-1][1]))
    return [_since(thread, at_ns) for at_ns, _ in steps], [budget / NS_PER_MS for _, budget in steps]


def response_curve(thread: Held) -> tuple[list[float], list[float]]:
    """When a job ended, in seconds since the attachment, and its response time in milliseconds."""
    jobs = [job for job in thread.jobs if _since(thread, job.end_ns) >= -BEFORE_S]
    return [_since(thread, job.end_ns) for job in jobs], [job.response_ns / NS_PER_MS for job in jobs]


def _since(thread: Held, time_ns: int) -> float:
    return (time_ns - thread.attached_ns) / NS_PER_S
