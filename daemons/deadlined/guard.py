"""deadlined's own place in the scheduler: above ordinary load, so that a busy host does not blur the samples; and out
of it for a while when it uses so much CPU itself that the host would suffer.

The lowest real-time priority is enough; children (the capacity's probe) begin as ordinary processes.
"""

import logging
import time

from deadlined.metrics import Metrics
from edgehold.clock import NS_PER_S, Clock
from edgehold.kernel import sched
from edgehold.kernel.sched import Flag, Policy, SchedAttr

log = logging.getLogger(__name__)

_REAL_TIME = SchedAttr(policy=Policy.FIFO, priority=1, flags=Flag.RESET_ON_FORK)
# More of a core than this, for so long, is no monitoring: somebody floods the API, or there is a fault.
_TOO_MUCH = 0.5
_FOR_NS = 2 * NS_PER_S
_PAUSE_NS = 10 * NS_PER_S
_MESSAGE_SLOWED = "7d0a2f1c5b5e4a5f8c0e9d3b6a1f4c27"


class Guard:
    """Puts this process above ordinary load, and back below when it must."""

    def __init__(self, clock: Clock, metrics: Metrics) -> None:
        self._clock = clock
        self._metrics = metrics
        self._own = sched.get()
        self._why_not = ""
        self._since_ns, self._used_ns = clock.monotonic_ns(), time.process_time_ns()
        self._paused_until_ns = 0
        self._rise()

    def __str__(self) -> str:
        """What it is now, and why nothing better."""
        return f"{sched.get()}" + (f": {self._why_not}" if self._why_not else "")

    def check(self) -> None:
        """Once a cycle: see how much was used, and act on it."""
        now = self._clock.monotonic_ns()
        if self._paused_until_ns:
            if now >= self._paused_until_ns:
                self._paused_until_ns = 0
                self._rise()
                self._since_ns, self._used_ns = now, time.process_time_ns()
            return
        if now - self._since_ns < _FOR_NS:
            return
        used_ns = time.process_time_ns()
        share = (used_ns - self._used_ns) / (now - self._since_ns)
        self._since_ns, self._used_ns = now, used_ns
        if share > _TOO_MUCH and sched.get().policy is Policy.FIFO:
            sched.set_attr(0, self._own)
            self._paused_until_ns = now + _PAUSE_NS
            self._why_not = (
                f"it used {share:.0%} of a core, and real-time threads are not to do that; samples are less exact"
            )
            self._metrics.slowed.inc()
            log.warning(
                "deadlined used %.0f %% of a core for %d s and is an ordinary process for %d s: is its API flooded?",
                100 * share, _FOR_NS // NS_PER_S, _PAUSE_NS // NS_PER_S, extra={"message_id": _MESSAGE_SLOWED},
            )  # fmt: skip

    def _rise(self) -> None:
        try:
            sched.set_attr(0, _REAL_TIME)
            self._why_not = ""
        except OSError as error:
            why = "it lacks CAP_SYS_NICE, or its cgroup has no real-time share" if error.errno == 1 else str(error)
            self._why_not = f"SCHED_FIFO was refused ({why}); samples are less exact on a busy host"
