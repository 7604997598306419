"""Processes that are activated in a known pattern: what the inference of periods is held against.

    with Patterns(["periodic 0.010 0.002", "poisson 0.020 0.001"]) as patterns:
        periodic, random = patterns.pids

Times in seconds; work is CPU time of the process' only thread. All of them end with the block, or with their starter.
"""

import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

# One interpreter, forked for each pattern: fifty of them cost little more than one. A line on stdout once all live;
# they end when stdin does, or when they lose their parent.
_CHILD = """
import os, random, signal, sys, time
parent = os.getpid()
def work(seconds):
    until = time.thread_time() + seconds
    while time.thread_time() < until: pass
def sleep(seconds):
    if os.getppid() != parent: os._exit(0)
    if seconds > 0: time.sleep(seconds)
def due_times(step):
    due = time.monotonic() + random.random() * step
    while True:
        yield due
        due += step
def periodic(period, c, jitter=0.0, blocks=1):
    for due in due_times(period):
        sleep(due + random.uniform(-jitter, jitter) * period - time.monotonic())
        for block in range(int(blocks)):
            if block: sleep(period / 20)
            work(c / blocks)
def relative(pause, c):
    while True: sleep(pause); work(c)
def two(one, other, c):
    steps = [due_times(one), due_times(other)]
    dues = [next(step) for step in steps]
    while True:
        which = dues.index(min(dues))
        sleep(dues[which] - time.monotonic()); work(c)
        dues[which] = next(steps[which])
def poisson(mean, c):
    while True: sleep(random.expovariate(1 / mean)); work(c)
def uniform(mean, c, spread=1.0):
    while True: sleep(mean * random.uniform(1 - spread, 1 + spread)); work(c)
def bursts(mean, c):
    while True:
        sleep(random.expovariate(1 / mean))
        for _ in range(random.randint(2, 8)): sleep(0.002); work(c)
def hog():
    while True: pass
pids = []
for line in sys.argv[1:]:
    name, *numbers = line.split()
    pid = os.fork()
    if pid == 0:
        os.close(0)
        random.seed(os.getpid())
        globals()[name](*map(float, numbers))
    pids.append(pid)
print(*pids, flush=True)
sys.stdin.read()
for pid in pids: os.kill(pid, signal.SIGKILL)
for pid in pids: os.waitpid(pid, 0)
"""


class Patterns:
    """One process for each line; use as a context manager. See `_CHILD` for names and numbers."""

    def __init__(self, lines: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, *lines], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if self._process.stdout is None:
            raise RuntimeError("the child has no stdout")
        self.pids = [int(pid) for pid in self._process.stdout.readline().split()]
        """In the order of the lines."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.communicate()
