"""The operator's pages say what is there: MESSAGE_IDs, alerts and their metrics, packages, links between pages."""

import re
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

import deadlined.metrics
import virtvmand.metrics
import vmand.metrics
from edgehold.api.vmand import CoresGrade, MemoryGrade, State

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OPERATIONS = (DOCS / "operations.md").read_text(encoding="utf-8")
ALERTS = (DOCS / "alerts.yml").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("**/*.md")])
# Where each daemon's code is; what the SDK says, each of them says that uses that part of it.
CODE = {"vmand": "daemons/vmand", "virtvmand": "daemons/virtvmand", "deadlined": "daemons/deadlined"}
_IDENTIFIER = re.compile(r'"([0-9a-f]{32})"')
_METRIC = re.compile(r"\b((?:vmand|virtvmand|deadlined)_[a-z_]+)(?:\{([^}]*)\})?")
_LABEL = re.compile(r'([a-z_]+)(=~|=)"([^"]*)"')


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table of a section of docs/operations.md, without its head."""
    text = OPERATIONS.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    assert text, heading
    lines = text[text.index("\n|") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines[2:]]


# The journal.


def _identifiers(folder: str) -> set[str]:
    return {
        found
        for path in (ROOT / folder).rglob("*.py")
        for found in _IDENTIFIER.findall(path.read_text(encoding="utf-8"))
    }  # fmt: skip


def test_each_message_id_of_the_code_has_its_row() -> None:
    told = {(cells[0].strip("`"), cells[1].strip("`")) for cells in rows("Logs")}
    own = {(found, daemon) for daemon, folder in CODE.items() for found in _identifiers(folder)}
    # The SDK's: deadlined alone has requests by HTTP that change something.
    assert told == own | {(found, "deadlined") for found in _identifiers("sdk")}


def test_each_message_id_says_what_it_means_and_what_to_do() -> None:
    assert all(len(cells) == 4 and all(cells) for cells in rows("Logs"))
    identifiers = [cells[0] for cells in rows("Logs")]
    assert len(identifiers) == len(set(identifiers))


# Alerts.


def alerts() -> dict[str, str]:
    """Each alert's expression."""
    found = {}
    for block in re.split(r"^ +- alert: ", ALERTS, flags=re.MULTILINE)[1:]:
        name, _newline, rest = block.partition("\n")
        expression = rest.partition("expr: ")[2]
        found[name] = re.split(r"\n +(?:for|labels):", expression)[0].removeprefix(">-")
    return found


def test_each_alert_has_its_row_with_meaning_and_cure() -> None:
    told = rows("Alerts")
    assert [cells[0].strip("`") for cells in told] == list(alerts())
    assert all(len(cells) == 3 and all(cells) for cells in told)


@cache
def families() -> dict[str, list[Sample]]:
    """What each daemon's /metrics has, by name, with samples of all labels."""
    record = SimpleNamespace(
        id=1, memory_bytes=1, cpus=(1,), cores_grade=CoresGrade.PINNED, memory_grade=MemoryGrade.PLAIN,
        public=lambda: SimpleNamespace(state=State.READY),
    )  # fmt: skip
    service: Any = SimpleNamespace(records=[record], guest_ends=Counter())
    partitions = vmand.metrics.registry(service, cast("Any", SimpleNamespace(outcomes={("deploy", "failed"): 1})))
    server: Any = SimpleNamespace(connections=[], outcomes={(1, "failed"): 1})
    domains = virtvmand.metrics.registry(server, cast("Any", SimpleNamespace(in_sync=True)))
    reservations = deadlined.metrics.Metrics()
    reservations.tell(list, lambda: 1.0)
    reservations.refused("EBUSY")
    return {
        _full_name(family): family.samples
        for registry in (partitions, domains, reservations.registry)
        for family in _collected(registry)
    }


def _collected(registry: CollectorRegistry) -> list[Metric]:
    return list(registry.collect())


def _full_name(family: Metric) -> str:
    return f"{family.name}_total" if family.type == "counter" else family.name


@pytest.mark.parametrize("name", alerts())
def test_an_alert_asks_for_what_the_daemons_show(name: str) -> None:
    selectors = _METRIC.findall(alerts()[name])
    assert selectors
    for metric, labels in selectors:
        assert metric in families(), metric
        wanted = _LABEL.findall(labels)
        assert any(_fits(sample.labels, wanted) for sample in families()[metric]), f"{metric}{{{labels}}}"


def _fits(labels: dict[str, str], wanted: list[tuple[str, str, str]]) -> bool:
    return all(
        re.fullmatch(value if how == "=~" else re.escape(value), labels.get(name, "")) for name, how, value in wanted
    )


# Units, packages and pages.


def _unit(name: str) -> dict[str, str]:
    """What a unit's file gives its settings, the last one where there are several."""
    lines = (ROOT / "units" / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if re.match(r"[A-Z][A-Za-z]+=", line))


@pytest.mark.parametrize(("column", "daemon"), list(enumerate(CODE, 1)))
def test_what_a_unit_may_do_is_told(column: int, daemon: str) -> None:
    unit = _unit(f"{daemon}.service")
    told = {cells[0]: cells[column] for cells in rows("What the units may do")}
    assert told["runs as"].split(",")[0].strip("`") == unit.get("User", "root")
    capabilities = unit["CapabilityBoundingSet"].replace("CAP_", "").split()
    assert told["capabilities"] == (", ".join(capabilities) or "none")
    memory = unit.get("MemoryMax")
    assert told["memory at most"] == (memory.replace("M", " MiB") if memory else "no limit, see below")
    (cores,) = (name for name in told if name.startswith("CPU at most"))
    assert f"{told[cores]}00%" == unit["CPUQuota"]
    assert f"{cores.split()[-1]}00%" == _unit("edgehold.slice")["CPUQuota"]


def test_the_limit_of_starts_is_told() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert "it died ten times within ten minutes" in text
    for daemon in CODE:
        unit = _unit(f"{daemon}.service")
        assert (unit["StartLimitBurst"], unit["StartLimitIntervalSec"]) == ("10", "600"), daemon


def test_install_md_has_all_packages() -> None:
    text = (DOCS / "install.md").read_text(encoding="utf-8").partition("\n## The packages\n")[2].partition("\n## ")[0]
    told = re.findall(r"^\| `(edgehold[a-z-]*)` \|", text, re.MULTILINE)
    control = (ROOT / "packaging/debian/control.in").read_text(encoding="utf-8")
    assert sorted(told) == sorted(re.findall(r"^Package: (.*)$", control, re.MULTILINE))


def _anchors(page: Path) -> set[str]:
    """The names of a page's headings, as a forge makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    words = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", one).replace(" ", "-") for one in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _hash, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            assert anchor in _anchors(there), target
