"""deadlinectl against a deadlined that answers what it is told to: what it sends, what it refuses, how it ends."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import click
import pytest
import pytest_asyncio
from click.testing import CliRunner, Result

from deadlined.cli import COMMANDS, deadlinectl
from deadlined.cli_options import in_options
from edgehold.api.deadlined import DeadlinedClient
from edgehold.errors import BadRequestError, UnavailableError
from tests.unit.deadlined_fake import FakeDeadlined, attachment, fake_deadlined, thread

MS = 1_000_000
ATTACH = "POST /v1/attachments"


@pytest_asyncio.fixture
async def deadlined() -> AsyncIterator[FakeDeadlined]:
    async with fake_deadlined() as one:
        yield one


async def invoke(deadlined: FakeDeadlined, *words: str, **more: Any) -> Result:
    """In this process: cheaper, and without what `edgehold.cli.main` makes of errors."""
    arguments = ["--socket", str(deadlined.socket), *words]
    return await asyncio.to_thread(CliRunner().invoke, deadlinectl, arguments, **more)


def refused(*words: str) -> str:
    """What is said of a usage that is wrong whatever deadlined says."""
    done = CliRunner().invoke(deadlinectl, ["--socket", "/nowhere/at.all", *words])
    assert done.exit_code == 2, done.output
    return " ".join(done.output.split())


def test_each_name_is_a_command() -> None:
    context = click.Context(deadlinectl)
    assert set(deadlinectl.list_commands(context)) == {*COMMANDS, "completion"}
    for name in deadlinectl.list_commands(context):
        command = deadlinectl.get_command(context, name)
        assert command is not None
        assert command.help, name
        assert command.name == name
        assert not command.get_short_help_str(60).endswith("..."), name


@pytest.mark.parametrize("name", ["attach", "change", "limit", "replay"])
def test_the_help_has_examples(name: str) -> None:
    text = CliRunner().invoke(deadlinectl, [name, "--help"]).output
    assert f"Examples:\n    deadlinectl {'--json' if name == 'replay' else name}" in text


@pytest.mark.parametrize(
    ("words", "target", "policy"),
    [
        (["--tid", "7"], {"kind": "thread", "id": 7}, {}),
        (["--pid", "7"], {"kind": "process", "id": 7}, {}),
        (["--tree", "7"], {"kind": "tree", "id": 7}, {}),
        (["--unit", "a.service"], {"kind": "unit", "name": "a.service"}, {}),
        (["--cgroup", "/a/b"], {"kind": "cgroup", "name": "/a/b"}, {}),
        (["--partition", "7"], {"kind": "partition", "id": 7}, {}),
        (["--domain", "web"], {"kind": "domain", "name": "web"}, {}),
        (["--domain", "7", "--uri", "qemu:///session"], {"kind": "domain", "name": "7", "uri": "qemu:///session"}, {}),
        (["--tid", "7", "--dry-run"], {"kind": "thread", "id": 7}, {"dry_run": True}),
        (["--tid", "7", "--no-dry-run"], {"kind": "thread", "id": 7}, {"dry_run": False}),
        (["--tid", "7", "--period-ms", "auto"], {"kind": "thread", "id": 7}, {"period_ns": "auto"}),
        (
            ["--unit", "a.service", "--rule", "reference", "--period-ms", "33.3", "--budget-ms", "2", "--cap", ".5",
             "--overallocation", "0.2", "--window", "64", "--min-budget-ms", "0.5", "--weight", "1000",
             "--actuator", "cpu.max"],
            {"kind": "unit", "name": "a.service"},
            {"rule": "reference", "period_ns": 33_300_000, "initial_budget_ns": 2 * MS, "cap": 0.5,
             "overallocation": 0.2, "window": 64, "min_budget_ns": MS // 2, "weight": 1000, "actuator": "cpu.max"},
        ),
    ],
)  # fmt: skip
async def test_only_what_was_given_is_sent(
    deadlined: FakeDeadlined, words: list[str], target: dict[str, Any], policy: dict[str, Any]
) -> None:
    done = await invoke(deadlined, "attach", *words)
    assert done.exit_code == 0, done.output
    assert deadlined.asked == [(ATTACH, {"target": target, "policy": policy})]


@pytest.mark.parametrize(
    ("words", "policy"),
    [
        (
            ["--tree", "7", "--cpus", "0.2"],
            {"initial_budget_ns": 20 * MS, "cap": 0.2, "min_budget_ns": MS, "actuator": "deadline"},
        ),
        (
            ["--tid", "7", "--cpus", "0.001", "--dry-run"],
            {"initial_budget_ns": MS // 10, "cap": 0.001, "min_budget_ns": MS // 10, "actuator": "deadline",
             "dry_run": True},
        ),
        (
            ["--unit", "a.service", "--cpus", "1.5"],
            {"initial_budget_ns": 150 * MS, "cap": 0.95, "min_budget_ns": MS, "actuator": "cpu.max"},
        ),
        (
            ["--cgroup", "/a", "--cpus", "0.5", "--actuator", "deadline", "--period-ms", "10"],
            {"period_ns": 10 * MS, "initial_budget_ns": 5 * MS, "cap": 0.5, "min_budget_ns": MS,
             "actuator": "deadline"},
        ),
    ],
)  # fmt: skip
async def test_a_limit_is_a_budget_that_never_moves(
    deadlined: FakeDeadlined, words: list[str], policy: dict[str, Any]
) -> None:
    done = await invoke(deadlined, "limit", *words)
    assert done.exit_code == 0, done.output
    [(what, body)] = deadlined.asked
    assert what == ATTACH
    assert body["policy"] == {"rule": "fixed", "period_ns": 100 * MS} | policy
    assert "at most" in done.output


@pytest.mark.parametrize("cpus", ["0.07", "0.29", "0.57", "0.9499", "0.333333"])
async def test_a_limit_never_lies_above_its_own_cap(deadlined: FakeDeadlined, cpus: str) -> None:
    await invoke(deadlined, "limit", "--tid", "7", "--cpus", cpus, "--period-ms", "33.3")
    [(_what, body)] = deadlined.asked
    policy = body["policy"]
    assert policy["initial_budget_ns"] == int(policy["cap"] * policy["period_ns"])


async def test_change_sends_what_was_given(deadlined: FakeDeadlined) -> None:
    assert (await invoke(deadlined, "change", "1", "--cap", "0.5", "--rule", "fast")).exit_code == 0
    assert deadlined.asked == [("PATCH /v1/attachments/1", {"cap": 0.5, "rule": "fast"})]


async def test_detach(deadlined: FakeDeadlined) -> None:
    assert (await invoke(deadlined, "detach", "1")).output == "attachment 1: detached\n"
    assert deadlined.asked == [("DELETE /v1/attachments/1", None)]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["attach"], "give one of --tid, --pid, --tree, --unit, --cgroup, --partition, --domain"),
        (["attach", "--tid", "1", "--pid", "1"], "--domain, not 2"),
        (["attach", "--tid", "1", "--uri", "qemu:///system"], "--uri goes with --domain only"),
        (["attach", "--tid", "2147483648"], "--tid 2147483648: ids end at 2147483647"),
        (["attach", "--unit", ""], "--unit is empty"),
        (["attach", "--tid", "1", "--actuator", "cpu.max"], "--actuator cpu.max goes with --unit and --cgroup only"),
        (["attach", "--tid", "1", "--budget-ms", "1", "--min-budget-ms", "2"],
         "--min-budget-ms (2) is above --budget-ms (1)"),
        (["attach", "--tid", "1", "--period-ms", "10", "--budget-ms", "9", "--cap", "0.8"],
         "--budget-ms (9) is above --cap x --period-ms (8 ms)"),
        (["attach", "--tid", "1", "--period-ms", "10", "--min-budget-ms", "9.9"],
         "--min-budget-ms (9.9) is above 0.95 x --period-ms (9.5 ms)"),
        (["attach", "--tid", "1", "--period-ms", "0.1", "--cap", "0.001"], "smallest budget (0.001024 ms)"),
        (["attach", "--tid", "1", "--budget-ms", "nan"], "nan is no number"),
        (["attach", "--tid", "1", "--cap", "inf"], "'--cap'"),
        (["attach", "--tid", "1", "--period-ms", "5000"], "'--period-ms'"),
        (["attach", "--tid", "1", "--period-ms", "soon"], "'--period-ms'"),
        (["attach", "--tid", "1", "--budget-ms", "0"], "'--budget-ms'"),
        (["attach", "--tid", "1", "--cap", "1"], "'--cap'"),
        (["attach", "--tid", "1", "--window", "65"], "'--window'"),
        (["attach", "--tid", "1", "--overallocation", "5"], "'--overallocation'"),
        (["attach", "--tid", "1", "--weight", "0"], "'--weight'"),
        (["change", "1"], "nothing to change: give an option"),
        (["change", "0", "--cap", "0.5"], "'ID'"),
        (["limit", "--pid", "1"], "--cpus"),
        (["limit", "--pid", "1", "--cpus", "1"], "--cpus 1: a thread can be given 0.95 of a CPU at most"),
        (["limit", "--unit", "a.service", "--cpus", "100"], "--cpus x --period-ms is 10000 ms"),
        (["limit", "--pid", "1", "--cpus", "0.1", "--actuator", "cpu.max"], "--unit and --cgroup only"),
    ],
)  # fmt: skip
def test_what_can_t_be_is_told_by_the_options_names(words: list[str], text: str) -> None:
    assert text in refused(*words)


def test_a_group_s_budget_may_be_larger_than_its_period() -> None:
    done = CliRunner().invoke(
        deadlinectl,
        ["--socket", "/nowhere/at.all", "attach", "--unit", "a.service", "--actuator", "cpu.max", "--period-ms", "10",
         "--budget-ms", "15"],
    )  # fmt: skip
    assert isinstance(done.exception, UnavailableError)  # it went as far as asking


def test_a_refusal_is_told_in_options_and_milliseconds() -> None:
    told = (
        "policy: initial_budget_ns, 10000000 ns (10 ms), must lie between min_budget_ns, 1000000 ns (1 ms), "
        "and cap x period_ns, 8000000 ns (8 ms)"
    )
    assert in_options(told) == (
        "--budget-ms, 10 ms, must lie between --min-budget-ms, 1 ms, and --cap x --period-ms, 8 ms"
    )
    assert in_options("policy.period_ns: cpu.max takes 1 ms to 1 s") == "--period-ms: cpu.max takes 1 ms to 1 s"
    assert in_options("the capacity of 3 CPUs") == "the capacity of 3 CPUs"


async def test_what_deadlined_refuses_is_told_so(deadlined: FakeDeadlined) -> None:
    deadlined.answers[ATTACH] = BadRequestError("policy: min_budget_ns, 9000000 ns (9 ms), is above it")
    done = await invoke(deadlined, "attach", "--tid", "1")
    assert isinstance(done.exception, BadRequestError)
    assert done.exception.message == "--min-budget-ms, 9 ms, is above it"


async def test_list_and_capacity(deadlined: FakeDeadlined) -> None:
    assert "process 4711" in (await invoke(deadlined, "list")).output
    assert "available  1.6000 of 2 CPUs" in (await invoke(deadlined, "capacity")).output
    assert json.loads((await invoke(deadlined, "--json", "list")).output)[0]["threads"][0]["tid"] == 4712


async def test_show_asks_for_its_picture_and_json_for_all(deadlined: FakeDeadlined) -> None:
    text = (await invoke(deadlined, "show", "1")).output
    assert text.count(" 4712  ") >= 20
    await invoke(deadlined, "--json", "show", "1")
    await invoke(deadlined, "--json", "show", "1", "--last", "3")
    await invoke(deadlined, "show", "1", "--last", "1000")
    path = "GET /v1/attachments/1"
    assert [what for what, _body in deadlined.asked] == [
        f"{path}?last=600", path, f"{path}?last=3", f"{path}?last=1000",
    ]  # fmt: skip


async def test_watch_looks_so_often(deadlined: FakeDeadlined) -> None:
    done = await invoke(deadlined, "watch", "--count", "2", "--interval", "0.05")
    assert done.output.count("process 4711") == 2
    assert len(deadlined.asked) == 2
    lines = (await invoke(deadlined, "--json", "watch", "--count", "2", "--interval", "0.05")).output.splitlines()
    assert [json.loads(line)[0]["id"] for line in lines] == [1, 1]


async def test_the_shell_completes_what_there_is(deadlined: FakeDeadlined) -> None:
    deadlined.answers["GET /v1/attachments"] = [attachment(1, thread()), attachment(12), attachment(2)]

    async def complete(*words: str) -> list[str]:
        environment = os.environ | {
            "_DEADLINECTL_COMPLETE": "bash_complete",
            "DEADLINED_SOCKET": str(deadlined.socket),
            "COMP_WORDS": " ".join(["deadlinectl", *words]),
            "COMP_CWORD": str(len(words)),
        }
        command = [sys.executable, "-m", "deadlined.cli"]
        done = await asyncio.to_thread(
            subprocess.run, command, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.stderr == ""
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert await complete("show", "1") == ["1", "12"]
    assert await complete("attach", "--period-ms", "a") == ["auto"]
    assert await complete("attach", "--rule", "f") == ["fast", "fixed"]


async def test_a_socket_that_is_not_there_is_told_in_the_system_s_words(tmp_path: Path) -> None:
    async with DeadlinedClient(tmp_path / "none.sock") as client:
        with pytest.raises(UnavailableError) as told:
            await client.list_attachments()
    assert told.value.message == (
        f"deadlined does not answer at {tmp_path}/none.sock: No such file or directory; is it running?"
    )
