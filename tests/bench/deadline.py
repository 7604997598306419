"""``make bench-deadline``: what deadlined costs and how steady it is, beside its bars; root and a quiet machine.

``python -m tests.bench.deadline overhead|sampling|calls|jitter|steady|overload …`` runs some parts alone; each writes
build/bench/deadline-PART.json. The daemon is a real one in a private directory; it is measured in CPU time, which other
load blurs less than it does wall time. The load average stands over each table.
"""

import argparse
import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable

from tests.bench.deadline_calls import calls, sampling
from tests.bench.deadline_cost import MANY, MORE, overhead
from tests.bench.deadline_host import Outcome, VoidError, report
from tests.bench.deadline_jitter import jitter
from tests.bench.deadline_rule import overload, steady
from tests.bench.figures import as_installed

PARTS: dict[str, Callable[[argparse.Namespace], Awaitable[Outcome]]] = {
    "overhead": overhead,
    "sampling": sampling,
    "calls": calls,
    "jitter": jitter,
    "steady": steady,
    "overload": overload,
}
TOOLS = ("gcc", "strace", "stress-ng")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.deadline", description="What deadlined costs.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each measurement (default: 60)")
    parser.add_argument("--minutes", type=float, default=10.0, help="steady: length of each situation (default: 10)")
    parser.add_argument("--settle", type=float, default=15.0, help="seconds before steadiness counts (default: 15)")
    parser.add_argument(
        "--threads", type=int, nargs="*", default=[MANY, MORE], help=f"how many are held (default: {MANY} {MORE})"
    )
    parser.add_argument("--passes", type=int, default=20, help="sampling: passes by each way (default: 20)")
    parser.add_argument("--traced", type=float, default=10.0, help="calls: seconds under strace (default: 10)")
    parser.add_argument("--busy", type=int, default=MANY, help=f"overhead: threads that work (default: {MANY})")
    parser.add_argument("--work-us", type=int, default=100, help="their work (default: 100)")
    parser.add_argument("--every-ms", type=int, default=250, help="how often they do it (default: 250)")
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - PARTS.keys()):
        parser.error(f"no such part: {', '.join(unknown)} (there are {', '.join(PARTS)})")
    return options


async def main() -> None:
    """Measure, print, write."""
    options = arguments()
    if os.geteuid() != 0:
        raise SystemExit("this benchmark holds threads by SCHED_DEADLINE: it needs root")
    if missing := [name for name in TOOLS if shutil.which(name) is None]:
        raise SystemExit(f"missing: {', '.join(missing)} (run: make bench-deadline, which installs them)")
    as_installed()
    void = []
    for name in options.parts or PARTS:
        load = os.getloadavg()
        try:
            report(name, await PARTS[name](options), load_before=load, options=vars(options))
        except VoidError as why:
            void.append(f"{name} is VOID: {why}")
            print(f"\n{void[-1]}", flush=True)
    if void:
        raise SystemExit("\n".join(void))


if __name__ == "__main__":
    asyncio.run(main())
