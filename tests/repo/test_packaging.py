"""What the packages are made of is complete and agrees with the rest of the project; nothing is built here.

`make deb` builds them, `packaging/lintian.sh` judges them, tests/system installs them.
"""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
PACKAGING = ROOT / "packaging"
DEBIAN = PACKAGING / "debian"
SUITES = ("bookworm", "trixie")
DAEMONS = sorted(one.name for one in (ROOT / "daemons").iterdir() if (one / "__main__.py").exists())
HASHES = r"(?P<hashes>(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)"
WHEEL = re.compile(r"^(?P<name>[A-Za-z0-9_.-]+)==(?P<version>\S+) \\\n" + HASHES, re.MULTILINE)
MODULES = {"_cffi_backend": "cffi", "qemu": "qemu.qmp"}
"""Distributions whose module has another name."""
ELSEWHERE = {"libvirt": "python3-libvirt"}
"""Modules that a Debian package has: deadlined suggests it and does without."""


def paragraphs() -> dict[str, dict[str, str]]:
    """The fields of each binary package in control.in."""
    found: dict[str, dict[str, str]] = {}
    for text in (DEBIAN / "control.in").read_text().split("\n\n")[1:]:
        fields = dict(re.findall(r"^([A-Z][A-Za-z-]+): (.*(?:\n .*)*)", text, re.MULTILINE))
        found[fields["Package"]] = fields
    return found


def relations(fields: dict[str, str], name: str) -> list[str]:
    return [one.strip() for one in fields.get(name, "").split(",") if one.strip()]


def installed(package: str) -> list[str]:
    path = DEBIAN / f"{package}.install"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def wheels(suite: str) -> list[re.Match[str]]:
    return list(WHEEL.finditer((PACKAGING / f"wheels-{suite}.txt").read_text()))


def vendor() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vendor", PACKAGING / "vendor.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_of_our_packages_takes_the_others_of_its_own_version() -> None:
    packages = paragraphs()
    for name, fields in packages.items():
        for field in ("Depends", "Suggests"):
            for one in relations(fields, field):
                ours = re.match(r"edgehold[a-z-]*", one)
                assert ours is None or one == f"{ours[0]} (= ${{binary:Version}})", f"{name}: {one}"
                assert ours is None or ours[0] in packages, f"{name}: {one}"
        assert "${misc:Depends}" in fields["Depends"], name
        assert fields["Description"].count("\n"), name


def test_every_daemon_has_a_package_with_all_that_belongs_to_it() -> None:
    packages = paragraphs()
    assert DAEMONS
    for daemon in DAEMONS:
        package = f"edgehold-{daemon}"
        assert f"{package} (= ${{binary:Version}})" in relations(packages["edgehold"], "Depends")
        files = installed(package)
        for one in (f"daemons/{daemon}", f"packaging/etc/{daemon}.toml", f"units/sysusers.d/{package}.conf"):
            assert one in files, f"{package} has no {one}"
        assert any(Path(f"units/{daemon}.service").match(one) for one in files), f"{package} has no unit"
        assert f"docs/man/{daemon}.8" in (DEBIAN / f"{package}.manpages").read_text().split()
        assert f"/var/lib/{daemon}" in (DEBIAN / f"{package}.postrm").read_text(), f"{package}: purge leaves its state"
        assert daemon in re.search(r"^DAEMONS := (.*)$", (DEBIAN / "rules").read_text(), re.MULTILINE)[1].split()  # type: ignore[index]


def test_every_unit_and_man_page_is_in_a_package() -> None:
    files = [one for path in DEBIAN.glob("*.install") for one in installed(path.stem)]
    pages = [one for path in DEBIAN.glob("*.manpages") for one in path.read_text().split()]
    units = [one for one in (ROOT / "units").rglob("*") if one.is_file() and one.parent.parent.name != "trixie"]
    for one in units:
        assert any(one.relative_to(ROOT).match(pattern) for pattern in files), f"{one.name} is in no package"
    assert sorted(pages) == sorted(str(one.relative_to(ROOT)) for one in (ROOT / "docs/man").iterdir())
    for pattern in (*files, *pages):
        assert pattern.startswith("out/") or list(ROOT.glob(pattern)), f"nothing is called {pattern}"


def test_deadlined_alone_pulls_in_neither_machines_nor_brokers() -> None:
    packages = paragraphs()
    needed, todo = set(), ["edgehold-deadlined"]
    while todo:
        for one in relations(packages[todo.pop()], "Depends"):
            name = one.split()[0]
            if name in packages and name not in needed:
                todo.append(name)
            needed.add(name)
    others = {one for one in needed if one not in packages and not one.startswith("$")}
    assert others == {"default-dbus-system-bus", "python3", "systemd"}
    assert not any(re.search("qemu|libvirt|mosquitto", one) for one in others)
    assert not any("web3" in one["name"] for suite in SUITES for one in wheels(suite))


@pytest.mark.parametrize("suite", SUITES)
def test_wheels_are_those_that_were_tested_each_with_its_hashes(suite: str) -> None:
    text = (PACKAGING / f"wheels-{suite}.txt").read_text()
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    found = wheels(suite)
    assert len(found) == text.count("==") == len({one["name"] for one in found})
    for one in found:
        assert pins[one["name"]] == one["version"], f"{one['name']}: run packaging/renew-wheels.sh"
        # One for any machine, or one for each architecture.
        assert one["hashes"].count("sha256:") in {1, 2}, one["name"]
    assert [one["name"] for one in found] == [one["name"] for one in wheels(SUITES[0])]


def test_what_is_imported_is_packaged() -> None:
    names = {one["name"].replace("-", "_") for one in wheels("bookworm")}
    ours = {"edgehold", *DAEMONS}
    for path in (*(ROOT / "sdk").rglob("*.py"), *(ROOT / "daemons").rglob("*.py")):
        if (ROOT / "sdk/edgehold/testing") in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for module in {one.partition(".")[0] for one in modules} - sys.stdlib_module_names - ours - {*ELSEWHERE}:
                assert MODULES.get(module, module) in names, f"{path.relative_to(ROOT)}: {module} is in no package"


def test_programs_are_those_of_the_project(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    subprocess.run([PACKAGING / "launchers.sh", tmp_path], check=True, timeout=60)
    assert {one.name for one in tmp_path.iterdir()} == set(project["scripts"])
    packaged = {
        Path(one).name for daemon in DAEMONS for one in installed(f"edgehold-{daemon}") if one.startswith("out/")
    }
    assert packaged == set(project["scripts"])
    for name, target in project["scripts"].items():
        text = (tmp_path / name).read_text()
        assert text.startswith("#!/usr/bin/python3 -sEP\n")
        assert f"from {target.partition(':')[0]} import {target.partition(':')[2]}" in text
        ast.parse(text)


def test_maintainer_scripts_are_scripts_and_leave_room_for_debhelpers() -> None:
    scripts = [one for one in DEBIAN.iterdir() if one.suffix in {".preinst", ".postinst", ".prerm", ".postrm"}]
    assert scripts
    for one in scripts:
        subprocess.run(["sh", "-n", one], check=True, timeout=60)
        assert "\n#DEBHELPER#\n" in one.read_text(), one.name
        assert "set -e" in one.read_text(), one.name


def test_no_file_names_a_host_where_packages_come_from() -> None:
    for one in PACKAGING.rglob("*"):
        if one.is_file():
            text = one.read_text()
            hosts = set(re.findall(r"\b(?:https?|file)://([^/\s]+)", text)) - {"www.debian.org"}
            assert not hosts, f"{one.relative_to(ROOT)}: {hosts}"
            assert "--index-url" not in text, one.name
            assert "--find-links" not in text, one.name


def test_a_wheel_is_unpacked_without_what_no_daemon_needs(tmp_path: Path) -> None:
    wheel = tmp_path / "qemu_qmp-1-py3-none-any.whl"
    files = {
        "qemu/qmp/__init__.py": "#!/usr/bin/python\nx = 1\n",
        "qemu/qmp/qmp_tui.py": "",
        "qemu/qmp/fast.pyx": "",
        "qemu_qmp-1.dist-info/METADATA": "Name: qemu.qmp\n",
        "qemu_qmp-1.dist-info/RECORD": "",
        "qemu_qmp-1.dist-info/licenses/LICENSE": "mine\n",
        "../outside.py": "",
    }
    with ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    into, licences = tmp_path / "into", tmp_path / "licences"
    vendor().unpack(wheel, into=into, licences=licences)
    left = sorted(str(one.relative_to(into)) for one in into.rglob("*") if one.is_file())
    assert left == ["qemu/qmp/__init__.py", "qemu_qmp-1.dist-info/METADATA"]
    assert (into / "qemu/qmp/__init__.py").read_text() == "#\nx = 1\n"
    assert (licences / "qemu_qmp-LICENSE").read_text() == "mine\n"
    assert not (tmp_path / "outside.py").exists()
