"""What deadlinectl prints for people: pure."""

import pytest

from deadlined import cli_show
from edgehold.api.deadlined import (
    Actuator,
    AttachmentDetail,
    Capacity,
    GroupStatus,
    PeriodOrigin,
    Policy,
    Rule,
    Target,
    TargetKind,
    ThreadState,
)
from tests.unit.deadlined_fake import MS, attachment, sample, thread


def test_nothing_is_told_so() -> None:
    assert cli_show.listing([]) == "nothing is attached"


def test_a_row_has_marks_where_they_belong() -> None:
    threads = [
        thread(1, saturated=True),
        thread(22, wanted_ns=80 * MS, period_ns=33_300_000, period_origin=PeriodOrigin.INFERRED),
        thread(3, state=ThreadState.WAITING, budget_ns=0, period_origin=PeriodOrigin.OBSERVING),
        thread(4, wanted_ns=11 * MS + 9_999),
    ]
    assert cli_show.listing([attachment(1, *threads)]).splitlines() == [
        "ID  TARGET        TID  NAME    STATE    BUDGET/ms  WANTED/ms  PERIOD/ms  EXECUTED/ms  WAITED/ms  NOTE",
        " 1  process 4711    1  camera  held         11.00      11.00     100.00        10.00       0.00  saturated",
        " 1  process 4711   22  camera  held         11.00      80.00     ~33.30        10.00       0.00  less",
        " 1  process 4711    3  camera  waiting          -      11.00    ?100.00        10.00       0.00",
        " 1  process 4711    4  camera  held         11.00      11.01     100.00        10.00       0.00",
    ]


def test_reasons_stand_below_and_the_same_one_once() -> None:
    threads = [thread(tid, reason="the host is full") for tid in range(1, 11)]
    found = attachment(3, *threads, thread(99, reason="pinned"), reason="2 threads are left out")
    assert cli_show.reasons(found) == [
        "3: 2 threads are left out",
        "3, threads 1, 2, 3, 4, 5, 6, 7, 8 and 2 more: the host is full",
        "3, thread 99: pinned",
    ]


def test_a_suspended_guest_is_told_in_any_case() -> None:
    assert "suspended" in cli_show.reasons(attachment(1, thread(), suspended=True))[0]
    assert cli_show.reasons(attachment(1, suspended=True, reason="so it is")) == ["1: so it is"]


GROUP = GroupStatus(
    path="/batch", budget_ns=150 * MS, wanted_ns=160 * MS, period_ns=100 * MS, executed_ns=140 * MS,
    throttled_ns=20 * MS, saturated=False, reason="the host has no more",
)  # fmt: skip


def test_a_group_has_a_row_of_its_own() -> None:
    unit = Target(kind=TargetKind.UNIT, name="batch.service")
    lines = cli_show.listing([attachment(1, target=unit, group=GROUP), attachment(2, thread())]).splitlines()
    row = " 1  unit batch.service     -  -       held      150.00     160.00     100.00       140.00      20.00  less"
    assert lines[1] == row
    assert lines[3:] == ["1: the host has no more"]


def test_no_threads_is_a_row_too() -> None:
    found = attachment(1, policy=Policy(period_ns="auto"), reason="the unit is not active")
    lines = cli_show.listing([found]).splitlines()
    assert lines[1].split() == ["1", "process", "4711", *"-----", "?100.00", "-", "-"]
    assert lines[2] == "1: the unit is not active"


def test_a_name_can_t_command_the_terminal() -> None:
    told = cli_show.listing([attachment(1, thread(name="\x1b[2Jroot\n", reason="a\x07b"))])
    assert "?[2Jroot?" in told
    assert "a?b" in told
    assert "\x1b" not in told


def test_a_long_target_keeps_its_ends() -> None:
    path = "/system.slice/docker-" + "0123456789abcdef" * 4 + ".scope"
    told = cli_show.listing([attachment(1, thread(), target=Target(kind=TargetKind.CGROUP, name=path))])
    assert " cgroup /system.sli...3456789abcdef.scope " in told
    assert path not in told


@pytest.mark.parametrize("lines", [3, 10, 50])
def test_a_terminal_is_not_overrun(lines: int) -> None:
    found = [attachment(1, *(thread(tid) for tid in range(1, 41)))]
    told = cli_show.listing(found, lines=lines).splitlines()
    assert len(told) == min(lines - 1, 41)
    assert (told[-1] == f"... and {41 - (lines - 2)} lines more") is (lines < 41)


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (
            Policy(),
            (
                "policy: fast, overallocation 0.1, window 5, floor 1.00 ms, cap 0.8 of the period, period 100.00 ms, "
                "weight 100, by deadline"
            ),
        ),
        (
            Policy(rule=Rule.FIXED, actuator=Actuator.CPU_MAX, dry_run=True, period_ns="auto"),
            (
                "policy: fixed, budget 10.00 ms, cap 0.8 of the period and CPU, period auto, weight 100, by cpu.max, "
                "dry run: nothing is changed"
            ),
        ),
    ],
)
def test_a_policy_is_a_line(policy: Policy, text: str) -> None:
    assert cli_show.policy_text(policy) == text


def test_a_value_is_a_letter_of_the_picture() -> None:
    assert cli_show.spark([0, 1, 50, 100, 200, -1], top=100, blocks=True) == "▁▁▅██▁"
    assert cli_show.spark([0, 50, 100], top=100, blocks=False) == " =#"
    assert cli_show.spark([0], top=0, blocks=True) == "▁"


def test_show_has_a_picture_and_the_last_samples() -> None:
    one = attachment(1, thread(period_origin=PeriodOrigin.INFERRED, confidence=0.98))
    history = tuple(sample(n, executed_ms=50 if n % 2 else 0, saturated=n == 9) for n in range(10))
    detail = AttachmentDetail(attachment=one, history=history)
    parts = cli_show.detail(detail, now_ns=5_000 * MS, rows=2, width=80, blocks=False).split("\n\n")
    assert len(parts) == 5
    assert parts[2] == "thread 4712: 100.00 ms is inferred, 98% of its activations fit"
    assert parts[3].splitlines() == [
        "    4712 budget   ########## 11.00 ms at most",
        "    4712 executed  # # # # # 10.00 ms at most",
    ]
    assert parts[4].splitlines() == [
        "SECONDS   TID  EXECUTED/ms  WAITED/ms  BUDGET/ms  WANTED/ms  L  NOTE",
        "   -1.0  4712         0.00       0.00      11.00      11.00  1",
        "   -0.5  4712        10.00       0.00      11.00      11.00  1  saturated",
    ]


def test_show_without_samples() -> None:
    detail = AttachmentDetail(attachment=attachment(1, thread()))
    assert cli_show.detail(detail, now_ns=0, rows=20, width=80, blocks=True).endswith("no sample yet")
    many = AttachmentDetail(attachment=attachment(1, thread()), history=(sample(1),))
    assert "EXECUTED/ms  WAITED/ms  BUDGET" not in cli_show.detail(many, now_ns=0, rows=0, width=80, blocks=True)


def test_a_picture_of_many_threads_counts_the_rest() -> None:
    history = tuple(sample(n, tid=tid) for n in range(3) for tid in range(1, 12))
    told = cli_show.detail(
        AttachmentDetail(attachment=attachment(1), history=history), now_ns=0, rows=1, width=20, blocks=True
    )
    assert "... and 3 threads more" in told


def test_capacity_says_where_to_look_when_it_is_short() -> None:
    found = Capacity(
        cpus=2, available=0.1, held=1.5, wanted=2.4, resolution=0.001, monitor_policy="SCHED_FIFO 1", sampler="pread",
    )  # fmt: skip
    lines = cli_show.capacity(found).splitlines()
    assert lines[2] == "wanted     2.4000 CPUs by its rules; see the reasons in `deadlinectl list`"
    assert lines[4] == "samples    pread"
