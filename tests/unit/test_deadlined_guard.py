"""deadlined's own priority: taken, given up when it uses too much of a CPU, taken again. No policy is changed here."""

import errno
from dataclasses import dataclass, field

import pytest

from deadlined.guard import Guard
from deadlined.metrics import Metrics
from edgehold.kernel import sched
from edgehold.kernel.sched import Flag, Policy, SchedAttr

S = 1_000_000_000
OWN = SchedAttr(policy=Policy.BATCH, nice=3)


@dataclass
class Host:
    """The clock, the scheduler and this process' CPU time, as a test wants them."""

    now_ns: int = 100 * S
    used_ns: int = 7 * S
    policy: SchedAttr = OWN
    refused: OSError | None = None
    asked: list[SchedAttr] = field(default_factory=list)

    def monotonic_ns(self) -> int:
        return self.now_ns

    def wall_s(self) -> float:
        raise AssertionError

    def set_attr(self, tid: int, attr: SchedAttr) -> None:
        assert tid == 0
        self.asked.append(attr)
        if self.refused is not None and attr.policy is Policy.FIFO:
            raise self.refused
        self.policy = attr

    def spend(self, seconds: float, share: float) -> None:
        self.now_ns += round(seconds * S)
        self.used_ns += round(seconds * share * S)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    one = Host()
    monkeypatch.setattr(sched, "set_attr", one.set_attr)
    monkeypatch.setattr(sched, "get", lambda: one.policy)
    monkeypatch.setattr("time.process_time_ns", lambda: one.used_ns)
    return one


def slowed(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("deadlined_guard_total")


def test_it_rises_to_the_lowest_real_time_priority_and_its_children_do_not(host: Host) -> None:
    one = Guard(host, Metrics())
    assert (host.policy.policy, host.policy.priority) == (Policy.FIFO, 1)
    assert host.policy.flags is Flag.RESET_ON_FORK
    assert str(one) == "SCHED_FIFO priority 1"


@pytest.mark.parametrize(
    ("error", "why"), [(errno.EPERM, "CAP_SYS_NICE"), (errno.EINVAL, "Invalid argument")], ids=["EPERM", "EINVAL"]
)
def test_a_refusal_is_told_and_harms_nothing(host: Host, error: int, why: str) -> None:
    host.refused = OSError(error, "Invalid argument")
    one = Guard(host, Metrics())
    assert str(one).startswith("SCHED_BATCH nice 3: SCHED_FIFO was refused (")
    assert why in str(one)
    for _ in range(20):
        host.spend(1, 1.0)
        one.check()
    assert host.asked == [host.asked[0]]  # an ordinary process may use what it gets
    assert host.policy == OWN


def test_what_a_cycle_costs_is_no_reason(host: Host) -> None:
    metrics = Metrics()
    one = Guard(host, metrics)
    for _ in range(100):
        host.spend(0.5, 0.45)
        one.check()
    host.spend(1.9, 1.0)  # a moment of much
    one.check()
    host.spend(2.1, 0.0)
    one.check()
    assert host.policy.policy is Policy.FIFO
    assert slowed(metrics) == 0


def test_too_much_is_paused_and_then_taken_again(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    one = Guard(host, metrics)
    for _ in range(4):
        host.spend(0.5, 0.9)
        one.check()
    assert host.policy == OWN
    assert "it used 90% of a core" in str(one)
    assert "is its API flooded?" in caplog.text
    assert slowed(metrics) == 1
    for _ in range(19):
        host.spend(0.5, 1.0)
        one.check()
        assert host.policy == OWN
    host.spend(0.5, 1.0)
    one.check()
    assert host.policy.policy is Policy.FIFO
    assert str(one) == "SCHED_FIFO priority 1"
    host.spend(2, 0.1)  # what was used in the pause does not count
    one.check()
    assert host.policy.policy is Policy.FIFO
    host.spend(2, 0.9)
    one.check()
    assert host.policy == OWN
    assert slowed(metrics) == 2


def test_who_was_put_elsewhere_by_hand_is_left_there(host: Host) -> None:
    one = Guard(host, Metrics())
    host.policy = SchedAttr(policy=Policy.IDLE)
    host.spend(3, 1.0)
    one.check()
    assert host.policy.policy is Policy.IDLE
