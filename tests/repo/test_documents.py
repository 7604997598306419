"""Documents say what the code does: the table of states in ARCHITECTURE.md is the table of `vmand.model`."""

from pathlib import Path

from edgehold.api.vmand import State
from vmand.model import TABLE

ARCHITECTURE = Path(__file__).parents[2] / "ARCHITECTURE.md"


def test_the_state_table_is_the_code() -> None:
    text = ARCHITECTURE.read_text().partition("<!-- states: begin -->")[2].partition("<!-- states: end -->")[0]
    head, _rule, *rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.strip().splitlines()
    ]
    assert head == ["command", *(state.value for state in State)]
    told = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    code = {
        command: {
            state.value: ("gone" if target is None else target.value) if state in allowed else "–"  # noqa: RUF001
            for state in State
        }
        for command, (allowed, target) in TABLE.table.items()
    }
    assert told == code
