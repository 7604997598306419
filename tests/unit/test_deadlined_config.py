"""The settings, and what a policy becomes of which only some fields were given."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deadlined.config import Settings, load, policy_of
from deadlined.rules import rule_config
from edgehold.api.deadlined import Actuator, Policy, Rule, Target, TargetKind
from edgehold.errors import SettingsError
from edgehold.kernel.limits import DL_MAX_PERIOD_NS, DL_MIN_PERIOD_NS, DL_MIN_RUNTIME_NS

MS = 1_000_000


def read(directory: Path, text: str) -> Settings:
    file = directory / "deadlined.toml"
    file.write_text(text)
    return load(file)


def refusal(directory: Path, text: str) -> str:
    with pytest.raises(SettingsError) as caught:
        read(directory, text)
    return caught.value.message


def test_every_key_has_a_default(tmp_path: Path) -> None:
    found = read(tmp_path, "")
    assert found == Settings()
    assert (found.cycle_ms, found.fast_cycle_ms, found.policy, found.attach) == (500, 100, Policy(), ())
    assert (found.deny.users, found.deny.units, found.deny.names) == ((), (), ())


def test_what_the_manual_shows(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        """
        [policy]
        rule = "fast"
        cap = 0.5
        [[attach]]
        target = { kind = "unit", name = "camera.service" }
        policy = { period_ns = 40_000_000, weight = 500 }
        [[attach]]
        target = { kind = "domain", name = "vm", uri = "test:///default" }
        [deny]
        units = ["sshd.service", "systemd-*"]
        users = ["root", "1000"]
        names = ["kworker*"]
        """,
    )
    assert found.policy == Policy(cap=0.5)
    camera, domain = found.attach
    assert camera.target == Target(kind=TargetKind.UNIT, name="camera.service")
    assert policy_of(camera.policy, found.policy) == Policy(cap=0.5, period_ns=40 * MS, weight=500)
    assert (domain.target.uri, domain.policy) == ("test:///default", {})
    assert found.deny.units == ("sshd.service", "systemd-*")
    assert (found.deny.users, found.deny.names) == (("root", "1000"), ("kworker*",))


@pytest.mark.parametrize(
    ("text", "key", "why"),
    [
        ("cycle_ms = 9", "cycle_ms", ">= 10"),
        ("fast_cycle_ms = -1", "fast_cycle_ms", ">= 0"),
        ("unheard = 1", "unheard", "unknown key"),
        ("deny = 5", "deny", "object"),
        ("[deny]\nuser = ['x']", "deny.user", "unknown key"),
        ("[deny]\nunits = 'x'", "deny.units", "array"),
        ("[deny]\nnames = [1]", "deny.names", "str"),
        ("[policy]\ncap = 0.96", "policy.cap", "0.95"),
        ("[policy]\nunheard = 1", "policy", "unheard"),
        ("[policy]\ncap = 0.001", "policy", "min_budget_ns"),
        ("[attach]", "attach", "array"),
        ("[[attach]]", "attach", "target"),
        ("[[attach]]\ntarget = { kind = 'unit' }", "attach[0].target", "given by name"),
        ("[[attach]]\ntarget = { kind = 'unit', name = 'x', id = 3 }", "attach[0].target", "given by name"),
        ("[[attach]]\ntarget = { kind = 'nothing', name = 'x' }", "attach[0].target.kind", "nothing"),
        ("[[attach]]\ntarget = { kind = 'unit', name = 'x' }\npolicies = {}", "attach[0]", "policies"),
        ("[[attach]]\ntarget = { kind = 'process', id = 4711 }", "attach[0].target.kind", "after a restart"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, key: str, why: str) -> None:
    message = refusal(tmp_path, text)
    assert key in message
    assert why in message


GOOD = "[[attach]]\ntarget = { kind = 'unit', name = 'a.service' }\n"


@pytest.mark.parametrize(
    ("policy", "named"),
    [
        ("cap = 2", "cap"),
        ("unheard = 1", "unheard"),
        ("rule = 'slow'", "rule"),
        ("period_ns = 'never'", "period_ns"),
        ("min_budget_ns = 90_000_000", "min_budget_ns"),
        ("initial_budget_ns = 90_000_000", "initial_budget_ns"),
    ],
)
def test_a_policy_that_can_t_be_is_named_with_its_place(tmp_path: Path, policy: str, named: str) -> None:
    text = f"{GOOD}[[attach]]\ntarget = {{ kind = 'cgroup', name = '/b' }}\npolicy = {{ {policy} }}"
    message = refusal(tmp_path, text)
    assert message.startswith("attach[1].policy: ")
    assert named in message


@pytest.mark.parametrize(
    ("target", "policy", "why"),
    [
        ("kind = 'domain', name = 'vm'", "actuator = 'cpu.max'", "attach a unit or a cgroup"),
        ("kind = 'unit', name = 'x'", "actuator = 'cpu.max', period_ns = 'auto'", "period_ns auto is for threads"),
    ],
)
def test_a_policy_that_does_not_fit_its_target_is_refused_at_the_start(
    tmp_path: Path, target: str, policy: str, why: str
) -> None:
    """And not found out when its target appears, which may be days later."""
    message = refusal(tmp_path, f"{GOOD}[[attach]]\ntarget = {{ {target} }}\npolicy = {{ {policy} }}")
    assert message.startswith("attach[1].policy: ")
    assert why in message


def test_a_target_is_attached_once(tmp_path: Path) -> None:
    assert refusal(tmp_path, GOOD + GOOD).startswith("attach[1].target: unit a.service is attach[0]'s already")


def test_a_group_may_have_more_than_one_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    text = f"{GOOD}policy = {{ actuator = 'cpu.max', initial_budget_ns = 250_000_000 }}"
    found = read(tmp_path, text).attach[0]
    policy = policy_of(found.policy, Policy())
    assert (policy.actuator, policy.initial_budget_ns) == (Actuator.CPU_MAX, 250 * MS)


@pytest.mark.parametrize(
    ("given", "initial_ms", "floor_ms"),
    [
        ({}, 10, 1),
        ({"period_ns": 10 * MS}, 8, 1),  # the default budget would be more than the cap
        ({"period_ns": MS}, 0.8, 0.8),
        ({"cap": 0.05}, 5, 1),
        ({"initial_budget_ns": MS // 2}, 0.5, 0.5),
        ({"min_budget_ns": 20 * MS}, 20, 20),
        ({"period_ns": "auto", "rule": "reference"}, 10, 1),
        ({"period_ns": 10 * MS, "initial_budget_ns": 9 * MS}, 9, 1),  # given: refused, not bent
        ({"period_ns": 10 * MS, "min_budget_ns": 9 * MS}, 8, 9),
    ],
)
def test_what_was_not_given_fits_what_was(given: dict[str, Any], initial_ms: float, floor_ms: float) -> None:
    policy = policy_of(given, Policy())
    assert (policy.initial_budget_ns / MS, policy.min_budget_ns / MS) == (initial_ms, floor_ms)


@settings(deadline=None)
@given(
    period_ns=st.integers(DL_MIN_PERIOD_NS, DL_MAX_PERIOD_NS) | st.just("auto"),
    cap=st.floats(0.02, 0.95),
    default=st.sampled_from(
        [Policy(), Policy(period_ns=4 * MS, initial_budget_ns=MS, cap=0.3), Policy(rule=Rule.FIXED)]
    ),
)
def test_a_policy_without_budgets_is_always_possible(period_ns: int | str, cap: float, default: Policy) -> None:
    policy = policy_of({"period_ns": period_ns, "cap": cap}, default)
    assert rule_config(policy).problem() == ""
    assert DL_MIN_RUNTIME_NS <= policy.min_budget_ns <= default.min_budget_ns


@pytest.mark.parametrize("given", [{"cap": "0.5"}, {"weight": 0}, {"unheard": 1}, {"period_ns": 1.5}, {"dry_run": 1}])
def test_a_wrong_field_is_named(given: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError, match=next(iter(given))):
        policy_of(given, Policy())
