"""What vmanctl prints for people: pure."""

import pytest

from edgehold.api.vmand import Check
from vmand import cli_show


@pytest.mark.parametrize(
    ("cores", "text"), [((), ""), ((3,), "3"), ((1, 2, 3), "1-3"), ((9, 1, 2, 5), "1-2,5,9"), ((0, 2, 4), "0,2,4")]
)
def test_ranges(cores: tuple[int, ...], text: str) -> None:
    assert cli_show.ranges(cores) == text


FOUND = [
    Check(subject="kvm", level="limited", found="guests are emulated because that is so", cure="another host"),
    Check(subject="memory", level="good", found="all is well"),
    Check(subject="a", level="missing", found="nothing"),
]


def test_what_is_missing_stands_first_and_its_cure_below() -> None:
    assert cli_show.findings(FOUND, width=None, colour=False) == (
        "missing  a       nothing\n"
        "limited  kvm     guests are emulated because that is so\n"
        "                 cure: another host\n"
        "good     memory  all is well"
    )
    assert cli_show.findings([], width=80, colour=True) == ""


def test_findings_are_as_wide_as_the_terminal() -> None:
    lines = cli_show.findings(FOUND, width=52, colour=False).splitlines()
    # 17 columns are taken, and 40 are used at least.
    assert lines[1] == "limited  kvm     guests are emulated because that is so"
    long = [Check(subject="kvm", level="limited", found=f"{'word ' * 8}more")]
    assert cli_show.findings(long, width=52, colour=False).splitlines() == [
        f"limited  kvm  {'word ' * 7}word",
        "              more",
    ]
    assert all(len(line) <= 70 for line in cli_show.findings(FOUND, width=70, colour=False).splitlines())


def test_colour_changes_no_column() -> None:
    plain = cli_show.findings(FOUND, width=60, colour=False)
    coloured = cli_show.findings(FOUND, width=60, colour=True)
    for code in ("\x1b[31m", "\x1b[33m", "\x1b[32m", "\x1b[0m"):
        assert code in coloured
        coloured = coloured.replace(code, "")
    assert coloured == plain
