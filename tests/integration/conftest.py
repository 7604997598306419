"""What several integration tests need of the host."""

from collections.abc import Iterator

import pytest

from edgehold.testing.capability import missing
from edgehold.testing.load import Load, capacity_stays, deadline_refusal


@pytest.fixture
def deadline() -> Iterator[None]:
    """SCHED_DEADLINE works here, and the test leaves the admission bandwidth as it found it."""
    if why := deadline_refusal():
        missing(f"no SCHED_DEADLINE here: {why}")
    with capacity_stays():
        yield


@pytest.fixture
def load() -> Iterator[Load]:
    """Threads to hold."""
    with Load() as one:
        yield one
