"""The next version of our packages, for tests of upgrades: the same with another version and other default settings.

It is made of the packages themselves, without a build: maintainer scripts and all else are what is shipped. That one
conffile differs is on purpose: where it does not, dpkg has nothing to ask about.
"""

import hashlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

VERSION = "99.1.0"
CONFFILE = "/etc/edgehold/vmand.toml"
"""Whose default text is another in the newer version."""
NEW_TEXT = "# Of the newer version.\n"
_CHANGED: dict[str, Callable[[str], str]] = {
    CONFFILE: lambda text: text + NEW_TEXT,
    "/usr/lib/python3/dist-packages/edgehold/__init__.py": lambda text: re.sub(
        r'(?m)^__version__ = ".*"$', f'__version__ = "{VERSION}"', text
    ),
}


def newer(debs: dict[str, Path], out: Path) -> dict[str, Path]:
    """Make them in ``out``; by the names of the packages."""
    return {name: _next(deb, out) for name, deb in debs.items()}


def _next(deb: Path, out: Path) -> Path:
    tree = out / deb.stem
    subprocess.run(["dpkg-deb", "--raw-extract", deb, tree], check=True)
    control = tree / "DEBIAN/control"
    text = control.read_text()
    release = re.search(r"(?m)^Version: [^~\n]+(.*)$", text)
    assert release is not None, text
    old = release[0].removeprefix("Version: ")
    version = VERSION + release[1]
    control.write_text(text.replace(f"Version: {old}", f"Version: {version}").replace(f"(= {old})", f"(= {version})"))
    sums = tree / "DEBIAN/md5sums"
    for path, change in _CHANGED.items():
        file = tree / path[1:]
        if file.exists():
            before = file.read_bytes()
            file.write_text(change(before.decode()))
            assert file.read_bytes() != before, file
            sums.write_text(sums.read_text().replace(_md5(before), _md5(file.read_bytes())))
    made = out / f"{deb.name.partition('_')[0]}_{version}_{deb.stem.rpartition('_')[2]}.deb"
    # Quickly: nobody keeps it.
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "--build", tree, made],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return made


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
