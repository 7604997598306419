"""docs/deadlined.openapi.json is what the code says, and every route is in it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest

from deadlined import api, openapi
from edgehold.api import deadlined as contract
from edgehold.api.deadlined import AttachRequest, Policy, Target
from edgehold.errors import EdgeholdError, NoCapacityError
from edgehold.wire import http

if TYPE_CHECKING:
    from deadlined.service import Service

COMMITTED = Path(__file__).parents[2] / "docs/deadlined.openapi.json"
DOCUMENT = openapi.document()
SCHEMAS = DOCUMENT["components"]["schemas"]
METHODS = {"get", "post", "put", "patch", "delete"}


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in DOCUMENT["paths"].items():
        for method in METHODS & set(item):
            yield method.upper(), path, item[method]


def test_the_committed_file_is_that_of_the_code() -> None:
    hint = "python -m deadlined.openapi > docs/deadlined.openapi.json"
    assert COMMITTED.read_text(encoding="utf-8") == openapi.text(), hint


def test_each_route_has_its_operation_and_each_operation_its_route() -> None:
    served = {(method, path) for method, path, _handler in api.routes(cast("Service", None))}
    served |= {("GET", "/healthz"), ("GET", "/metrics")}  # those of edgehold.wire.http
    assert {(method, path) for method, path, _operation in operations()} == served


def test_operations_are_complete() -> None:
    names = [one["operationId"] for _method, _path, one in operations()]
    assert len(names) == len(set(names))
    for method, path, one in operations():
        assert one["summary"], path
        assert ("requestBody" in one) is (method in {"POST", "PATCH"})
        parameters = [*DOCUMENT["paths"][path].get("parameters", []), *one.get("parameters", [])]
        assert {p["name"] for p in parameters if p["in"] == "path"} == set(re.findall(r"{(\w+)}", path))


def test_references_lead_somewhere() -> None:
    for name in re.findall(r'"\$ref": "#/([^"]+)"', openapi.text()):
        found: Any = DOCUMENT
        for part in name.split("/"):
            found = found[part]


def test_refusals_have_the_statuses_that_are_sent() -> None:
    told = set(DOCUMENT["components"]["responses"])
    assert told == {str(status) for status in http._STATUS.values()} | {"413", "500"}
    used = {status for _method, _path, one in operations() for status in one["responses"]}
    assert told <= used
    wire = NoCapacityError("full").to_wire()
    assert set(SCHEMAS["Error"]["properties"]) == set(wire)
    assert isinstance(EdgeholdError("x").to_wire()["retryable"], bool)


def test_bodies_are_the_contract_s() -> None:
    for name, schema in SCHEMAS.items():
        kind = getattr(contract, name, None)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            assert set(schema["properties"]) == set(kind.__struct_fields__), name
    assert set(SCHEMAS["PolicyFields"]["properties"]) == set(Policy.__struct_fields__)
    assert set(SCHEMAS["PolicyChange"]["properties"]) == set(Policy.__struct_fields__) - {"actuator", "dry_run"}
    assert "default" not in json.dumps(SCHEMAS["PolicyFields"]["properties"])
    assert SCHEMAS["AttachRequest"]["required"] == ["target"]


def test_fields_have_the_texts_of_the_contract() -> None:
    assert SCHEMAS["Policy"]["properties"]["weight"]["description"].startswith("The attachment's part where the host")
    assert "- `reference`: The document's" in SCHEMAS["Rule"]["description"]
    assert "``" not in openapi.text()


def test_the_example_is_a_request() -> None:
    request = msgspec.convert(SCHEMAS["AttachRequest"]["example"], AttachRequest)
    assert msgspec.convert(request.policy, Policy).initial_budget_ns == 2_000_000


KINDS: list[dict[str, Any]] = [
    {"kind": "thread", "id": 1},
    {"kind": "tree", "id": 0},
    {"kind": "partition"},
    {"kind": "process", "id": 1, "name": "x"},
    {"kind": "unit", "name": "a.service"},
    {"kind": "unit", "name": "a.service", "id": 1},
    {"kind": "unit", "name": "a.service", "uri": "qemu:///system"},
    {"kind": "cgroup", "name": ""},
    {"kind": "cgroup", "name": "a\0b"},
    {"kind": "domain", "name": "web", "uri": "qemu:///system"},
    {"kind": "domain", "id": 4},
]


@pytest.mark.parametrize("target", KINDS, ids=str)
def test_the_rules_for_targets_are_those_of_the_contract(target: dict[str, Any]) -> None:
    """By hand: a validator of JSON Schema is no dependency of ours."""

    def fits(rule: dict[str, Any]) -> bool:
        if any(name not in target for name in rule["required"]):
            return False
        for name, wanted in rule["properties"].items():
            if name not in target:
                continue
            value = target[name]
            if value not in wanted.get("enum", [value]) or value != wanted.get("const", value):
                return False
            if isinstance(value, int) and value < wanted.get("minimum", value):
                return False
            if isinstance(value, str) and len(value) < wanted.get("minLength", 0):
                return False
            if "pattern" in wanted and not re.search(wanted["pattern"], value):
                return False
        return True

    try:
        msgspec.convert(target, Target)
        allowed = True
    except msgspec.ValidationError:
        allowed = False
    assert sum(fits(rule) for rule in SCHEMAS["Target"]["oneOf"]) == allowed
