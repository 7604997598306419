"""The pure part: sizes, cores, names, the table's shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgehold.api.vmand import State
from edgehold.errors import BadRequestError, NoCapacityError
from vmand import model
from vmand.model import AFTER, GRANULE_BYTES, LIVE, MIB, TABLE, Found


@pytest.mark.parametrize(
    ("gib", "mib"), [(1, 1024), (0.25, 256), (0.5001, 514), (1 / 64, 16), (3.999, 4096), (2.5, 2560)]
)
def test_memory_is_rounded_up_to_the_granule(gib: float, mib: int) -> None:
    assert model.memory_bytes(gib) == mib * MIB


@given(st.floats(min_value=1 / 64, max_value=65536))
def test_memory_is_never_less_than_asked_and_less_than_a_granule_more(gib: float) -> None:
    size = model.memory_bytes(gib)
    assert size % GRANULE_BYTES == 0
    assert 0 <= size - int(gib * model.GIB) < GRANULE_BYTES


@pytest.mark.parametrize("gib", [1e300, 65537, float("inf"), float("nan"), 0.001])
def test_sizes_that_no_partition_has(gib: float) -> None:
    with pytest.raises(BadRequestError, match="memsize"):
        model.memory_bytes(gib)


def test_too_little_memory_says_what_is_left() -> None:
    model.check_memory(4 * MIB, 4 * MIB)
    with pytest.raises(NoCapacityError, match="6 MiB are wanted and 4 MiB are left"):
        model.check_memory(6 * MIB, 4 * MIB)


@pytest.mark.parametrize(("text", "cores"), [("", set()), ("1-3,5", {1, 2, 3, 5}), ("7", {7}), ("2-2, 4", {2, 4})])
def test_lists_of_cores(text: str, cores: set[int]) -> None:
    assert model.parse_cores(text) == cores


@pytest.mark.parametrize("text", ["x", "3-1", "1-", "-1", "1-2-3", "99999999999999", "1;2"])
def test_malformed_lists_of_cores(text: str) -> None:
    with pytest.raises(ValueError, match="write for example 1-3,5"):
        model.parse_cores(text)


@pytest.mark.parametrize("name", ["", "a" * 33, "a b", "ä", "a/b", "\n", "a,b", "7", "007", "-a", "--force"])
def test_bad_names(name: str) -> None:
    with pytest.raises(BadRequestError, match="name"):
        model.check_name(name, set())


def test_a_taken_name() -> None:
    model.check_name("web", {"db"})
    with pytest.raises(BadRequestError, match="taken"):
        model.check_name("db", {"db"})


@pytest.mark.parametrize("cmdline", ["x" * 2049, "a\nb", "a\0b", "é" * 1025])
def test_bad_command_lines(cmdline: str) -> None:
    with pytest.raises(BadRequestError, match="cmdline"):
        model.check_cmdline(cmdline)


def test_whatever_is_found_leads_to_a_state() -> None:
    assert set(AFTER) == set(Found)
    assert {AFTER[Found.RUNNING], AFTER[Found.PAUSED]} == LIVE


def test_every_state_can_be_left() -> None:
    for state in State:
        # BUSY ends by itself.
        assert any(TABLE.allows(command, state) for command in TABLE.table) == (state is not State.BUSY)
