"""deadlined's settings: /etc/edgehold/deadlined.toml and its drop-ins."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from deadlined.deny import DenySettings
from deadlined.rules import rule_config
from edgehold import settings
from edgehold.api.deadlined import DURABLE, GROUPS, Actuator, Policy, Target
from edgehold.errors import SettingsError
from edgehold.kernel.limits import DL_MIN_RUNTIME_NS
from edgehold.wire.peer import Access


class Standing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A target to attach at every start."""

    target: Target
    policy: dict[str, Any] = {}
    """Fields of `Policy`; the rest is the settings' policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What can be set; every key has a default that works."""

    socket: str = "/run/deadlined/api.sock"
    state_dir: str = "/var/lib/deadlined"
    """What to restore, and what to attach after a restart."""
    vmand_socket: str = "/run/vmand/control.sock"
    cycle_ms: Annotated[int, msgspec.Meta(ge=10, le=60_000)] = 500
    """T: every so often budgets are sized anew."""
    fast_cycle_ms: Annotated[int, msgspec.Meta(ge=0, le=60_000)] = 100
    """A saturated thread's window under the fast rule, at least its period; 0: none is shorter than T."""
    policy: Policy = field(default_factory=Policy)
    """Of attachments that do not say otherwise, field by field."""
    attach: tuple[Standing, ...] = ()
    deny: DenySettings = field(default_factory=DenySettings)
    history: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 600
    """Samples that are kept for each thread; more than 32 threads share 32 times that."""
    max_attachments: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1000
    max_threads: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 5000
    """Threads in all: each keeps a descriptor open."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    access: Access = field(default_factory=Access)

    def __post_init__(self) -> None:
        """Raises `SettingsError`: what the types can't say."""
        if problem := rule_config(self.policy).problem():
            raise SettingsError(f"policy: {problem}")
        for number, one in enumerate(self.attach):
            if one.target.kind not in DURABLE:
                kinds = ", ".join(sorted(kind.value for kind in DURABLE))
                raise SettingsError(
                    f"attach[{number}].target.kind: a {one.target.kind.value}'s id is another's after a restart; here "
                    f"only {kinds}"
                )


def policy_of(given: dict[str, Any], default: Policy) -> Policy:
    """The fields that were given, and the rest of a default; budgets that were not given fit what was.

    Raises:
        msgspec.ValidationError: a field that is unknown, of a wrong type or out of range; the text names it.
    """
    policy: Policy = msgspec.convert({**msgspec.to_builtins(default), **given}, Policy)
    largest_ns = rule_config(policy).max_budget_ns
    floor_ns, initial_ns = policy.min_budget_ns, policy.initial_budget_ns
    if "min_budget_ns" not in given:
        floor_ns = min(floor_ns, largest_ns, initial_ns if "initial_budget_ns" in given else largest_ns)
    if "initial_budget_ns" not in given:
        initial_ns = min(max(initial_ns, floor_ns), largest_ns)
    return msgspec.structs.replace(
        policy, min_budget_ns=max(floor_ns, DL_MIN_RUNTIME_NS), initial_budget_ns=max(initial_ns, DL_MIN_RUNTIME_NS)
    )


def policy_problem(target: Target, policy: Policy) -> str:
    """Why this target can't have this policy, or an empty text."""
    if policy.actuator is Actuator.DEADLINE:
        return rule_config(policy).problem()
    if target.kind not in GROUPS:
        return (
            f"actuator {policy.actuator.value} is of a whole cgroup: attach a unit or a cgroup, or use the actuator "
            f"deadline for a {target.kind.value}"
        )
    if policy.period_ns == "auto":
        return "period_ns auto is for threads; give a group's period"
    return rule_config(policy, cpus=os.cpu_count() or 1).problem()


def load(path: Path | None) -> Settings:
    """Read and check everything.

    Raises:
        SettingsError: names the file and the key.
    """
    wanted = settings.load(Settings, "deadlined", path=path)
    targets = [one.target for one in wanted.attach]
    for number, one in enumerate(wanted.attach):
        if (first := targets.index(one.target)) < number:
            raise SettingsError(f"attach[{number}].target: {one.target} is attach[{first}]'s already")
        try:
            policy = policy_of(one.policy, wanted.policy)
        except msgspec.ValidationError as error:
            raise SettingsError(f"attach[{number}].policy: {error}") from None
        if problem := policy_problem(one.target, policy):
            raise SettingsError(f"attach[{number}].policy: {problem}")
    return wanted
