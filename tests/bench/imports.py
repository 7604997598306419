"""What each import costs a daemon: resident memory and CPU of every package, in a fresh interpreter."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

# Every module's execution is measured around its loader; what it imports itself is taken off. Reading the memory is
# slower than most imports, so that the reading itself is left out of the time.
_CHILD = """
import importlib.abc, importlib.machinery, json, sys, time
costs, stack = {}, []
def rss():
    with open("/proc/self/smaps_rollup") as rollup:
        return next(int(line.split()[1]) for line in rollup if line.startswith("Rss"))
class Loader(importlib.abc.Loader):
    def __init__(self, inner): self.inner = inner
    def __getattr__(self, name): return getattr(self.inner, name)
    def create_module(self, spec): return self.inner.create_module(spec)
    def exec_module(self, module):
        outer, kib = time.process_time_ns(), rss()
        stack.append([0, 0]); begin = time.process_time_ns()
        try: self.inner.exec_module(module)
        finally:
            spent = time.process_time_ns() - begin
            kib = rss() - kib; inner_ns, inner_kib = stack.pop()
            mine = costs.setdefault(module.__name__.partition(".")[0], [0, 0, 0])
            mine[0] += kib - inner_kib; mine[1] += spent - inner_ns; mine[2] += 1
            if stack:
                stack[-1][0] += time.process_time_ns() - outer; stack[-1][1] += kib
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        for one in sys.meta_path:
            if one is not self and (spec := one.find_spec(name, path, target)):
                if hasattr(spec.loader, "exec_module"): spec.loader = Loader(spec.loader)
                return spec
start, began = rss(), time.process_time_ns()
sys.meta_path.insert(0, Finder())
steps = []
for name in sys.argv[1:]:
    before = dict((key, list(value)) for key, value in costs.items())
    __import__(name)
    for key, value in costs.items():
        old = before.get(key, [0, 0, 0])
        if value != old: steps.append([name, key, *(a - b for a, b in zip(value, old))])
print(json.dumps({"start_kib": start, "end_kib": rss(), "steps": steps}))
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """A package's part in one step, without what it imports itself."""

    step: str
    package: str
    mb: float
    ms: float
    modules: int


@dataclass(frozen=True, slots=True)
class Imports:
    """All steps; MB are 10^6 bytes."""

    interpreter_mb: float
    whole_mb: float
    costs: list[Cost]


def of(steps: Sequence[str]) -> Imports:
    """Import these modules one after another. A package that is loaded in two steps has a row in both."""
    done = subprocess.run([sys.executable, "-c", _CHILD, *steps], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    costs = [
        Cost(step, package, kib * 1024 / 1e6, ns / 1e6, modules) for step, package, kib, ns, modules in found["steps"]
    ]
    return Imports(found["start_kib"] * 1024 / 1e6, found["end_kib"] * 1024 / 1e6, costs)
