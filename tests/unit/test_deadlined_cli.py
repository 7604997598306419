"""deadlinectl's own part: budgets that follow the rest, and errors in the options' names and units."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from deadlined.cli import budgets, deadlinectl
from edgehold.api.deadlined import DeadlinedClient
from edgehold.errors import UnavailableError

MS = 1_000_000


@pytest.mark.parametrize(
    ("period", "cap", "budget", "floor", "found"),
    [
        (100, 0.8, None, None, (10 * MS, 1 * MS)),
        (10, 0.8, None, None, (8 * MS, 1 * MS)),
        (1, 0.5, None, None, (MS // 2, MS // 2)),
        (100, 0.8, 0.5, None, (MS // 2, MS // 2)),
        (100, 0.8, None, 20, (20 * MS, 20 * MS)),
        (100, 0.8, 30, 2, (30 * MS, 2 * MS)),
    ],
)
def test_what_is_not_given_follows_the_rest(
    period: float, cap: float, budget: float | None, floor: float | None, found: tuple[int, int]
) -> None:
    assert budgets(period_ms=period, cap=cap, budget_ms=budget, min_budget_ms=floor) == found


@pytest.mark.parametrize(
    ("period", "cap", "budget", "floor", "text"),
    [
        (10, 0.8, 9, None, r"--budget-ms \(9\) is above --cap x --period-ms \(8 ms\)"),
        (10, 0.8, None, 9, r"--min-budget-ms \(9\) is above --cap"),
        (10, 0.8, 1, 2, r"--min-budget-ms \(2\) is above --budget-ms \(1\)"),
        (0.1, 0.001, None, None, "smallest budget"),
        (float("nan"), 0.8, None, None, "nan"),
    ],
)
def test_what_can_t_be_is_told_by_the_options_names(
    period: float, cap: float, budget: float | None, floor: float | None, text: str
) -> None:
    with pytest.raises(click.UsageError, match=text):
        budgets(period_ms=period, cap=cap, budget_ms=budget, min_budget_ms=floor)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--period-ms", "5000"), ("--budget-ms", "0"), ("--cap", "1"), ("--cap", "0"), ("--window", "0"),
     ("--overallocation", "5"), ("--min-budget-ms", "-1")],
)  # fmt: skip
def test_a_value_out_of_range_names_its_option(option: str, value: str) -> None:
    done = CliRunner().invoke(deadlinectl, ["attach", "--tid", "1", option, value])
    assert done.exit_code == 2
    assert f"Invalid value for '{option}'" in done.output


def test_the_help_has_the_ranges() -> None:
    text = " ".join(CliRunner().invoke(deadlinectl, ["attach", "--help"]).output.split())
    assert "0.1<=x<=4194.304" in text
    assert "0<x<=0.95" in text


async def test_a_socket_that_is_not_there_is_told_in_the_system_s_words(tmp_path: Path) -> None:
    async with DeadlinedClient(tmp_path / "none.sock") as client:
        with pytest.raises(UnavailableError) as told:
            await client.list_attachments()
    assert told.value.message == (
        f"deadlined does not answer at {tmp_path}/none.sock: No such file or directory; is it running?"
    )
