"""Unpacks the wheels of edgehold-vendor into one directory, as the package has it.

Wheels are archives that pip only has to unpack; done here, nothing of this machine or of pip gets into the package, and
the same wheels give the same files. What a running daemon does not need stays out.

vendor.py WHEELS DIRECTORY LICENCES
"""

import sys
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

# By distribution: cffi's runtime is one extension, the rest is its compiler; these parts of qemu.qmp are programs with
# another licence than the library; the others are the libraries' own tests.
LEFT_OUT = {
    "cffi": ("cffi/*",),
    "qemu_qmp": ("qemu/qmp/legacy.py", "qemu/qmp/qmp_shell.py", "qemu/qmp/qmp_tui.py"),
    "aiohttp": ("aiohttp/.hash/*", "aiohttp/*/.hash/*", "aiohttp/pytest_plugin.py", "aiohttp/test_utils.py"),
    "multidict": ("multidict/_testcapi*",),
    "click": ("click/testing.py",),
}
# Sources of extensions.
SOURCES = (".c", ".h", ".pyx", ".pxd", ".pxi", ".cpp")


def wanted(distribution: str, name: str) -> bool:
    """Whether this file of a wheel belongs into the package."""
    return not name.endswith(SOURCES) and not any(fnmatch(name, one) for one in LEFT_OUT.get(distribution, ()))


def without_interpreter(name: str, content: bytes) -> bytes:
    """A module's text without the name of an interpreter: some are left from programs, and nobody runs modules."""
    return b"#" + content[content.index(b"\n") :] if name.endswith(".py") and content.startswith(b"#!") else content


def unpack(wheel: Path, *, into: Path, licences: Path) -> None:
    """Unpack one wheel. Of its metadata remain METADATA, which tells scanners its version, and the licences."""
    distribution = wheel.name.split("-")[0]
    with ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            path = PurePosixPath(name)
            if name.endswith("/") or ".." in path.parts or path.is_absolute():
                continue
            if path.parts[0].endswith(".dist-info"):
                if "licenses" in path.parts:
                    target = licences / "-".join((distribution, *path.parts[path.parts.index("licenses") + 1 :]))
                elif path.name == "METADATA":
                    target = into / path
                else:
                    continue
            elif wanted(distribution, name):
                target = into / path
            else:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(without_interpreter(name, archive.read(name)))
            target.chmod(0o644)


def main() -> None:
    """Unpack all wheels of a directory."""
    wheels, into, licences = (Path(one) for one in sys.argv[1:])
    for wheel in sorted(wheels.glob("*.whl")):
        unpack(wheel, into=into, licences=licences)


if __name__ == "__main__":
    main()
