"""Runs tests/guest/test_quota.py under the test kernel: hosts with cgroup v1 have no cpu.max to show."""

import os
import sys
from pathlib import Path

import pytest

from edgehold.errors import UnsupportedError
from edgehold.testing.capability import missing
from edgehold.testing.rig import Rig, kernel_image

REPO = Path(__file__).resolve().parents[2]
TIMEOUT_S = 600.0


@pytest.mark.slow
def test_quotas_in_the_guest() -> None:
    try:
        kernel_image()
    except UnsupportedError as error:
        missing(str(error))
    pytest_there = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=0"]
    ended = Rig(cpus=2, memory_mib=1024).run(
        [*pytest_there, "tests/guest/test_quota.py"], cwd=REPO, env=os.environ, timeout_s=TIMEOUT_S
    )
    assert ended.status == 0, f"in the guest:\n{ended.output}"
