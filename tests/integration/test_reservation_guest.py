"""Runs under both test kernels what deadlined's safety rests on, and its quotas: many hosts lack cgroup v2."""

import os
import sys
from pathlib import Path

import pytest

from edgehold.errors import UnsupportedError
from edgehold.testing.capability import missing
from edgehold.testing.rig import KERNELS, Rig, kernel_image

REPO = Path(__file__).resolve().parents[2]
TIMEOUT_S = 600.0


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_reservations_are_safe_under_this_kernel(kernel: str) -> None:
    try:
        kernel_image(kernel)
    except UnsupportedError as error:
        missing(str(error))
    # Its plugin imports all of hypothesis, which takes ten seconds there and is used by none of these tests.
    options = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest", "--durations=0"]
    ended = Rig(kernel=kernel, cpus=2, memory_mib=1024).run(
        [sys.executable, "-m", "pytest", *options, "tests/guest/test_reservation.py", "tests/guest/test_quota.py"],
        cwd=REPO,
        env=os.environ,
        timeout_s=TIMEOUT_S,
    )
    assert ended.status == 0, f"in the guest:\n{ended.output}"
