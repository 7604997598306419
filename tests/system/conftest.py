"""What the system tests share: for each Debian a machine with our packages, and empty ones.

``EDGEHOLD_SUITES`` says which releases of Debian (default: "bookworm trixie"), ``EDGEHOLD_DEBS`` where their packages
are: a directory with one for each suite, or with packages for all (default: what `make deb` built for this
architecture).
"""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edgehold.testing.capability import missing
from tests.system.house import ROOT, Machine, machine

if TYPE_CHECKING:
    from tests.system.guests import Guest

SUITES = os.environ.get("EDGEHOLD_SUITES", "bookworm trixie").split()
DAEMONS = ("vmand", "virtvmand", "deadlined")
SERVICES = tuple(f"{name}.service" for name in DAEMONS)
SOCKETS = ("virtvmand.socket", "virtvmand-ro.socket")
ARCH = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def packages(suite: str) -> list[Path]:
    """Our package files for a Debian; the test is skipped (or fails, see `missing`) where there are none."""
    built = Path(os.environ.get("EDGEHOLD_DEBS", ROOT / "build" / "deb"))
    for place in (built / suite / ARCH, built / suite, built):
        if found := sorted(place.glob("edgehold*.deb")):
            return found
    return missing(f"our packages for {suite} are not built: there are none in {built} (run: make deb DIST={suite})")


@pytest.fixture(scope="session", params=SUITES)
def suite(request: pytest.FixtureRequest) -> str:
    """The Debian that the test is about."""
    return str(request.param)


@pytest.fixture(scope="session")
def debs(suite: str) -> dict[str, Path]:
    """Our package files by the names of the packages."""
    return {one.name.partition("_")[0]: one for one in packages(suite)}


@pytest.fixture(scope="session")
def installed(suite: str, debs: dict[str, Path]) -> Iterator[Machine]:
    """A machine with all our packages, shared by all tests that leave it as it was: see `house`."""
    with machine(suite) as one:
        one.install(*debs.values(), "libvirt-clients")
        yield one


def is_well(one: Machine) -> None:
    """Every unit of ours is active, and none of the machine has failed."""
    assert one.system_state() == "running", one.run("systemctl", "--failed", check=False).output
    for unit in SERVICES:
        assert one.state(unit) == "active/running", one.status(unit)
    for unit in SOCKETS:
        assert one.state(unit).startswith("active/"), one.status(unit)


@pytest.fixture
def house(installed: Machine) -> Iterator[Machine]:
    """The shared machine, with all its starts before it. A test that does not leave all our units active fails."""
    # Another test's failure is not this one's.
    installed.run("systemctl", "reset-failed")
    installed.run("systemctl", "start", *SOCKETS, *SERVICES)
    yield installed
    is_well(installed)


@pytest.fixture
def fresh(suite: str) -> Iterator[Callable[[], Machine]]:
    """Makes machines of the test's own, booted, without our packages."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(machine(suite))


@pytest.fixture
def running(house: Machine) -> "Guest":
    """A partition of the shared machine whose guest works: the one of the test before, where that still does."""
    from tests.system.guests import working  # which imports this module

    return working(house)
