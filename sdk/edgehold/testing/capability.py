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


def guest_image(root: Path) -> tuple[Path, Path]:
    """Kernel and initial RAM disk of the small guest below a repository's (or ``BUILD``'s) build directory."""
    image = Path(os.environ.get("BUILD", root / "build")) / "guest" / "amd64"
    kernel, initrd = image / "vmlinuz", image / "initramfs.gz"
    if not (kernel.exists() and initrd.exists()):
        missing(f"the small guest is not built: {image} (run: make guest)")
    return kernel, initrd
