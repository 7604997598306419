"""Runs tests/guest under the test kernel: isolated cpusets and what else most hosts can't show. One boot for most."""

import os
import sys
from pathlib import Path

import pytest

from edgehold.errors import UnsupportedError
from edgehold.testing.capability import guest_image, missing
from edgehold.testing.rig import Rig, kernel_image

REPO = Path(__file__).resolve().parents[2]
TIMEOUT_S = 1500.0


@pytest.mark.slow
def test_the_tests_of_the_guest_pass_there() -> None:
    guest_image(REPO)
    try:
        kernel_image()
    except UnsupportedError as error:
        missing(str(error))
    # Those that test_reservation_guest.py runs, under two kernels.
    others = [f"--ignore=tests/guest/test_{name}.py" for name in ("reservation", "quota")]
    pytest_there = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=0", *others, "tests/guest"]
    # Two memory nodes, each with all CPUs: enough for tests of where memory is taken from.
    ended = Rig(cpus=4, memory_mib=3072, cmdline="numa=fake=2").run(
        pytest_there, cwd=REPO, env=os.environ, timeout_s=TIMEOUT_S
    )
    assert ended.status == 0, f"in the guest:\n{ended.output}"
