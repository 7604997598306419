"""Units are right and as closed as they can be: what systemd's own checks say of them, and a reason for each gap.

`systemd-analyze` is in the Debian package systemd; no systemd needs to run.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgehold.testing.capability import need_command

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "units"
ALL = sorted(one for one in UNITS.iterdir() if one.suffix in {".service", ".socket", ".slice", ".target"})
SERVICES = [one for one in ALL if one.suffix == ".service"]
DAEMONS = [one for one in SERVICES if (ROOT / "daemons" / one.stem).is_dir()]
LIMITS = {"vmand.service": 4.0}
"""The exposure (0 to 10) that systemd may find at most; 2.0 for all others."""
MARK = re.compile(r"^# ?", re.MULTILINE)
SYSTEM = next((one for one in map(Path, ("/usr/lib/systemd/system", "/lib/systemd/system")) if one.is_dir()), None)
# Findings of `systemd-analyze security` that every program of Debian's has: it runs in the host's root directory, it
# connects to sockets; and char-rtc, which ProtectClock= itself lets in.
EVERYBODYS = {"RootDirectory=/RootImage=", "RestrictAddressFamilies=~AF_UNIX"}


def settings(path: Path) -> dict[str, list[str]]:
    """All values of each setting, in their order."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def comments(path: Path) -> str:
    lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
    return re.sub(r"\s+", " ", MARK.sub("", "\n".join(lines)))


def analyze(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    program = need_command("systemd-analyze", "systemd")
    return subprocess.run([program, *argv], capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root directory with systemd's units, ours, and programs that they start."""
    need_command("systemd-analyze", "systemd")
    assert SYSTEM is not None
    made = tmp_path_factory.mktemp("root")
    directory = made / "usr/lib/systemd/system"
    shutil.copytree(SYSTEM, directory, symlinks=True, ignore_dangling_symlinks=True)
    (made / "lib").symlink_to("usr/lib")
    for one in ALL:
        shutil.copy(one, directory)
    for one in SERVICES:
        for line in settings(one)["ExecStart"]:
            program = made / line.split()[0].lstrip("/")
            program.parent.mkdir(parents=True, exist_ok=True)
            program.touch(mode=0o755)
    return made


@pytest.mark.parametrize("unit", ALL, ids=lambda one: one.name)
def test_systemd_finds_nothing_wrong(unit: Path, root: Path) -> None:
    done = analyze("verify", "--man=no", "--recursive-errors=no", f"--root={root}", unit.name)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_planted_fault_is_found(root: Path) -> None:
    directory = root / "usr/lib/systemd/system"
    good = (UNITS / "vmand.service").read_text()
    for planted, line in {
        "key": "MemoryMx=1G",
        "program": "ExecStartPre=/usr/bin/none",
        "value": "WatchdogSec=x",
    }.items():
        (directory / f"{planted}.service").write_text(good.replace("[Service]", f"[Service]\n{line}"))
        done = analyze("verify", "--man=no", "--recursive-errors=no", f"--root={root}", f"{planted}.service")
        assert line.partition("=")[2].split("/")[-1] in done.stderr or line.partition("=")[0] in done.stderr, planted


@pytest.mark.parametrize("unit", SERVICES, ids=lambda one: one.name)
def test_what_a_break_in_would_give_is_bounded(unit: Path) -> None:
    limit = LIMITS.get(unit.name, 2.0)
    done = analyze("security", "--offline=yes", "--no-pager", f"--threshold={limit * 10:.0f}", unit)
    assert done.returncode == 0, f"more than {limit}: {done.stdout[-200:]}"


def gaps(unit: Path) -> Iterator[str]:
    """The findings that count against a unit, and what its list of rights gives."""
    done = analyze("security", "--offline=yes", "--no-pager", "--json=short", unit)
    for finding in json.loads(done.stdout):
        if not finding["set"] and float(finding["exposure"] or 0) > 0 and finding["name"] not in EVERYBODYS:
            yield finding["name"]


def reasoned(gap: str, said: str, given: dict[str, list[str]]) -> bool:
    """Whether a unit's comments say why a finding is as it is."""
    name, _equals, value = gap.partition("=")
    match name:
        case "CapabilityBoundingSet" | "AmbientCapabilities":
            return all(one.removeprefix("CAP_") in said for line in given[name] for one in line.split())
        case "SystemCallFilter" | "RestrictAddressFamilies":
            # "~AF_(INET|INET6)" is found as soon as one of them is given.
            return any(one in said for one in re.findall(r"@[a-z-]+|AF_[A-Z0-9]+|[A-Z0-9]{4,}", value))
        case "SupplementaryGroups":
            return all(group in said for group in given[name])
        case "DeviceAllow":
            return name not in given or "PrivateDevices=" in said
        case _:
            return f"{name}=" in said


@pytest.mark.parametrize("unit", SERVICES, ids=lambda one: one.name)
def test_every_gap_has_its_reason(unit: Path) -> None:
    said, given = comments(unit), settings(unit)
    assert [gap for gap in gaps(unit) if not reasoned(gap, said, given)] == []


@pytest.mark.parametrize("unit", ALL, ids=lambda one: one.name)
def test_it_says_what_it_is_and_where_to_read_on(unit: Path) -> None:
    given = settings(unit)
    assert unit.read_text().startswith("# "), "begins with what the unit is for"
    (description,) = given["Description"]
    assert description.startswith("Edgehold")
    for page in " ".join(given["Documentation"]).split():
        if found := re.fullmatch(r"man:(\w+)\((\d)\)", page):
            assert (ROOT / "docs/man" / f"{found[1]}.{found[2]}").is_file(), page
        else:
            name = page.removeprefix("file:///usr/share/doc/edgehold-doc/")
            assert (ROOT / "docs" / name).is_file(), page


@pytest.mark.parametrize("unit", DAEMONS, ids=lambda one: one.name)
def test_a_daemon_is_watched_and_restarted(unit: Path) -> None:
    given = settings(unit)
    assert given["Type"] == ["notify"]
    assert given["WatchdogSec"] == ["30"]
    assert given["Restart"] == ["on-failure"]
    assert given["RestartPreventExitStatus"] == ["64 78"]  # edgehold.errors: usage and settings
    assert given["StartLimitBurst"]
    assert int(given["TimeoutStopSec"][0]) > 10  # edgehold.service.run: it ends by force after 10 s
    assert given["Slice"] == ["edgehold.slice"]
    assert given["PartOf"] == ["edgehold.target"]
    assert unit.name in " ".join(settings(UNITS / "edgehold.target")["Wants"]).split()
    # Pages of a tmpfs count for who touched them first: a limit would be one for all partitions together.
    assert ("MemoryMax" in given) == (unit.name != "vmand.service")


def test_no_slice_limits_the_memory_of_partitions() -> None:
    for one in (UNITS / "edgehold.slice", UNITS / "vmand.slice", UNITS / "vmand.service"):
        assert not {"MemoryMax", "MemoryHigh", "MemorySwapMax"} & set(settings(one)), one.name


@pytest.mark.parametrize("unit", DAEMONS, ids=lambda one: one.name)
def test_a_newer_systemd_waits_longer_each_time(unit: Path) -> None:
    """systemd 252 would warn of these, so that they are in a file of their own."""
    (drop_in,) = (UNITS / "trixie" / f"{unit.name}.d").iterdir()
    assert set(settings(drop_in)) <= {"RestartSec", "RestartSteps", "RestartMaxDelaySec", "StartLimitIntervalSec"}
    assert not {"RestartSteps", "RestartMaxDelaySec"} & set(settings(unit))


def test_sockets_are_those_that_virtvmand_asks_for() -> None:
    from virtvmand.__main__ import SOCKETS
    from virtvmand.config import Config

    named = {}
    for one in ALL:
        if one.suffix == ".socket":
            given = settings(one)
            (name,) = given["FileDescriptorName"]
            named[name] = given["ListenStream"]
            assert given["Service"] == ["virtvmand.service"]
    assert named == {name: [f"{Config().sockets}/{name}"] for name, _read_only in SOCKETS}


def test_groups_of_the_shipped_settings_are_made() -> None:
    import tomllib

    for name in ("vmand", "virtvmand", "deadlined"):
        access = tomllib.loads((ROOT / f"packaging/etc/{name}.toml").read_text()).get("access", {})
        # virtvmand's package depends on vmand's.
        made = [f"edgehold-{one}.conf" for one in {name, "vmand" if name == "virtvmand" else name}]
        text = "".join((UNITS / "sysusers.d" / one).read_text() for one in made)
        groups = set(re.findall(r"^[gu] (\S+)", text, re.MULTILINE))
        assert {*access.get("read", []), *access.get("operate", [])} <= groups, name
