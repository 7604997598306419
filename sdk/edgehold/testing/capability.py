"""What a test needs of its host: skipped with a reason where it is missing, failed where everything is required.

``EDGEHOLD_REQUIRE=1`` (as CI sets it) turns every skip into a failure: nothing is passed over in silence there.
"""

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest


def missing(reason: str) -> NoReturn:
    """This host can't run the test."""
    if os.environ.get("EDGEHOLD_REQUIRE") == "1":
        pytest.fail(f"{reason} (EDGEHOLD_REQUIRE=1)")
    pytest.skip(reason)


def need_command(name: str, package: str) -> str:
    """The path of a program."""
    path = shutil.which(name)
    return path if path is not None else missing(f"{name} is not installed (Debian package {package})")


def need_root() -> None:
    """The test acts on the host."""
    if os.geteuid() != 0:
        missing("needs root")


def need_open_root() -> None:
    """Another user can walk to a place that is everybody's. Skipped, never failed: it is nobody's fault."""
    if closed := [one for one in ("/", "/tmp") if not Path(one).stat().st_mode & 0o001]:  # noqa: S108 - looked at only
        pytest.skip(f"{closed[0]} is closed to other users here: no user but root can name any file")


def guest_image(root: Path, arch: str = "amd64") -> tuple[Path, Path]:
    """Kernel and initial RAM disk of the small guest below a repository's (or ``BUILD``'s) build directory.

    ``arch`` in Debian's words: ``amd64`` or ``arm64``.
    """
    image = Path(os.environ.get("BUILD", root / "build")) / "guest" / arch
    kernel, initrd = image / "vmlinuz", image / "initramfs.gz"
    if not (kernel.exists() and initrd.exists()):
        missing(f"the small guest is not built: {image} (run: make guest)")
    return kernel, initrd
