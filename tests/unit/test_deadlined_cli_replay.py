"""``deadlinectl replay``: recorded samples through a rule, without deadlined."""

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from deadlined.cli import deadlinectl
from deadlined.cli_replay import read
from edgehold.api.deadlined import AttachmentDetail, Policy, Rule, Sample
from edgehold.errors import BadRequestError
from tests.unit.deadlined_fake import MS, attachment, sample, thread

GROWING = tuple(
    sample(n, executed_ms=5 * executed, budget_ns=round(executed * MS), wanted_ns=3 * MS)
    for n, executed in enumerate([2, 2.4, 3.36, 6])
)


def replay(recording: bytes, *words: str) -> Result:
    return CliRunner().invoke(deadlinectl, ["--socket", "/nowhere", *words], input=recording)


def recorded(policy: Policy, history: tuple[Sample, ...]) -> bytes:
    return msgspec.json.encode(AttachmentDetail(attachment=attachment(1, thread(), policy=policy), history=history))


def test_the_recorded_policy_counts_where_no_option_is_given() -> None:
    recording = recorded(Policy(rule=Rule.REFERENCE, initial_budget_ns=2 * MS), GROWING)
    done = replay(recording, "replay", "-")
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines()]
    assert rows[0] == ["SECONDS", "TID", "EXECUTED/ms", "WAITED/ms", "BUDGET/ms", "RECORDED/ms", "WANTED/ms", "NOTE"]
    # The document's: c = 2, 2.4, 3.36, 6 and l = 2, 4, 8, 16.
    assert [row[6] for row in rows[1:]] == ["2.40", "3.36", "6.05", "15.60"]
    assert [row[5] for row in rows[1:]] == ["3.00"] * 4
    assert rows[-1][0] == "0.0"


def test_options_replace_what_was_recorded() -> None:
    recording = recorded(Policy(rule=Rule.FAST), GROWING)
    done = replay(recording, "--json", "replay", "-", "--rule", "fixed", "--budget-ms", "7")
    assert [one["wanted_ns"] for one in json.loads(done.output)] == [7 * MS] * 4


def test_each_thread_has_a_rule_of_its_own(tmp_path: Path) -> None:
    other = tuple(sample(n, tid=9, executed_ms=100) for n in range(4))
    file = tmp_path / "samples.json"
    file.write_bytes(msgspec.json.encode([*GROWING, *other]))
    options = ["--rule", "reference", "--budget-ms", "2"]
    both = json.loads(replay(b"", "--json", "replay", str(file), *options).output)
    file.write_bytes(msgspec.json.encode(other))
    alone = json.loads(replay(b"", "--json", "replay", str(file), *options).output)
    assert [one for one in both if one["tid"] == 9] == alone
    assert [one["tid"] for one in both] == [9, 4712] * 4


def test_a_period_that_was_found_counts_instead_of_auto() -> None:
    history = tuple(sample(n, executed_ms=50, period_ns=8 * MS, budget_ns=2 * MS) for n in range(3))
    done = replay(recorded(Policy(rule=Rule.REFERENCE, period_ns="auto"), history), "--json", "replay", "-")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)[-1]["wanted_ns"] == pytest.approx(0.8 * 1.1 * MS, abs=MS // 5)


def test_no_sample_is_told_so() -> None:
    assert replay(recorded(Policy(), ()), "replay", "-").output == "no sample in it\n"


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff", b'{"id": 1}', b"[" * 100_000])
def test_what_is_no_recording_is_refused(text: bytes) -> None:
    with pytest.raises(BadRequestError, match="FILE is nothing that"):
        read(text)


def test_a_policy_that_contradicts_itself_is_told_by_the_options_names() -> None:
    done = replay(recorded(Policy(), GROWING), "replay", "-", "--period-ms", "10")
    assert done.exit_code == 2
    told = " ".join(done.output.split())
    assert "--budget-ms, 10 ms, must lie between --min-budget-ms, 1 ms, and --cap x --period-ms, 8 ms" in told
