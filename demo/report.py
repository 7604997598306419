"""The demo's picture: budget and response time over time, the steps and the host's facts, in one HTML file."""

import html
import io
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from demo.story import Story
from edgehold.clock import NS_PER_MS, NS_PER_S

BLUE, ORANGE, GREEN, GREY = "#1f6fb2", "#d9822b", "#2e8b57", "#8a8f98"

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Edgehold: a reservation that sizes itself</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1d2329; }}
h1 {{ font-size: 1.6rem; margin-bottom: .2rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
p.sub {{ color: #5a6370; margin-top: 0; }} svg {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: .92rem; }}
td, th {{ text-align: left; padding: .3rem .7rem; border-bottom: 1px solid #e2e5e9; vertical-align: top; }}
td.n {{ white-space: nowrap; color: #5a6370; }} .good {{ color: #2e8b57; }} .bad {{ color: #c0392b; font-weight: 600; }}
</style></head><body>
<h1>A reservation that sizes itself</h1>
<p class="sub">{summary}</p>
{picture}
<h2>What was done, and whether it held</h2>
<table><tr><th>at</th><th>step</th><th>seen</th><th></th></tr>{steps}</table>
<h2>The host</h2>
<table>{facts}</table>
</body></html>
"""


def picture(story: Story) -> str:
    """Two curves over one time axis, as SVG."""
    seconds = lambda ns: (ns - story.started_ns) / NS_PER_S  # noqa: E731 - a unit, not a function of its own
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(11, 6.6), constrained_layout=True)
    times = [seconds(sample.time_ns) for sample in story.samples]
    above.step(times, [s.budget_ns / NS_PER_MS for s in story.samples], where="post", color=BLUE, label="budget Q")
    above.plot(
        times, [s.executed_per_period_ns / NS_PER_MS for s in story.samples], color=ORANGE, marker=".", label="executed"
    )
    above.set_ylabel("ms per period of 100 ms")
    above.legend(loc="upper right", frameon=False)
    above.set_title("Budget and executed time of the guest's vCPU thread", loc="left", pad=16)
    below.plot(
        [seconds(job.time_ns) for job in story.jobs], [job.response_ms for job in story.jobs], ".", ms=3, color=GREEN
    )
    if story.work_ms:
        below.axhline(story.work_ms, color=GREY, lw=1, ls="--", label=f"the job's work, {story.work_ms:.1f} ms")
        below.legend(loc="upper right", frameon=False)
    below.set_yscale("log")
    below.set_ylabel("response time, ms (log)")
    below.set_xlabel("seconds since the demo began")
    below.set_title("Response time of the job inside the guest", loc="left")
    for axis in (above, below):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        for at_ns, name in story.marks:
            axis.axvline(seconds(at_ns), color=GREY, lw=0.8, ls=":")
            if axis is above:
                axis.annotate(name, (seconds(at_ns), 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
                              textcoords="offset points", fontsize=8, color=GREY, ha="center")  # fmt: skip
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def write(story: Story, path: Path) -> None:
    """Write the report."""
    good = all(step.good for step in story.steps)
    failed = ", ".join(step.name for step in story.steps if not step.good)
    summary = (
        "A guest runs a job of about 10 ms every 100 ms. Its virtual CPU is given far too small a reservation, "
        "2 ms every 100 ms; deadlined sizes it from what is executed, with no help from the guest. "
    ) + (f"All {len(story.steps)} conditions held." if good else f"Failed: {failed}.")
    rows = "".join(
        f'<tr><td class="n">{step.at_s:.1f} s</td><td>{html.escape(step.name)}</td><td>{html.escape(step.detail)}</td>'
        f'<td class="{"good" if step.good else "bad"}">{"passed" if step.good else "FAILED"}</td></tr>'
        for step in story.steps
    )
    facts = "".join(
        f'<tr><td class="n">{html.escape(name)}</td><td>{html.escape(text)}</td></tr>'
        for name, text in story.facts.items()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        PAGE.format(
            summary=html.escape(summary), picture=picture(story) if story.samples else "", steps=rows, facts=facts
        ),
        encoding="utf-8",
    )
