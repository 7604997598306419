"""The ABI of /dev/vmanager through a real kernel: the cases of tests/vmanager with the module loaded. One boot for all.

The module has the double's model below, so a case that passes in one and fails in the other shows a double that is not
like the system calls it stands for.
"""

import os
import shlex
import sys
from pathlib import Path

import pytest

from edgehold.errors import UnsupportedError
from edgehold.kernel.vmanager import Cap
from edgehold.testing.capability import missing
from edgehold.testing.rig import Rig, kernel_image
from edgehold.testing.vmanager import MODULE_DEVICE, ROOT, build_module

TIMEOUT_S = 1500.0


@pytest.mark.slow
def test_the_cases(tmp_path: Path) -> None:
    """Twice: a firmware that can everything, and one that can only do what every firmware can."""
    try:
        kernel_image()
    except UnsupportedError as error:
        missing(str(error))
    module = build_module(tmp_path / "module")
    cases = shlex.join([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rs", "tests/vmanager"])
    static = Cap.KEEP | Cap.SECURE | Cap.CLEARS
    # A module that can't be unloaded afterwards has lost a reference.
    script = (
        f"set -e; insmod {module}; test -c {MODULE_DEVICE.path}; {cases}; rmmod vmanager_model; "
        f"insmod {module} caps={int(static)}; {cases}; rmmod vmanager_model; test ! -e {MODULE_DEVICE.path}; "
        "if dmesg | grep -E 'BUG|WARNING|Oops|Call Trace'; then exit 99; fi"
    )
    environment = {**os.environ, **MODULE_DEVICE.environment()}
    ended = Rig(cpus=2, memory_mib=1024).run(["sh", "-c", script], cwd=ROOT, env=environment, timeout_s=TIMEOUT_S)
    assert ended.status == 0, f"in the machine:\n{ended.output}"
    first, _, second = ended.output.partition(" passed")
    assert "this firmware has no" not in first, ended.output
    assert " passed" in second, ended.output
