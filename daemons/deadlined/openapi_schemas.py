"""The schemas of deadlined's OpenAPI document, made from the contract's messages.

Texts are the contract's docstrings. Python does not keep those of fields, so the contract's source is read.
"""

import ast
import inspect
from collections.abc import Mapping
from typing import Any

import msgspec

from edgehold.api import deadlined as contract
from edgehold.api.deadlined import (
    DEFAULT_URI,
    Attachment,
    AttachmentDetail,
    AttachRequest,
    Capacity,
    Policy,
    TargetKind,
)

Json = dict[str, Any]

_FIXED_FIELDS = ("actuator", "dry_run")
"""Of a policy: what an attachment keeps from its beginning."""
_BY_NAME = (TargetKind.UNIT, TargetKind.CGROUP)


def ref(name: str) -> Json:
    """Points to a schema."""
    return {"$ref": f"#/components/schemas/{name}"}


def _field_texts() -> dict[str, dict[str, str]]:
    """The docstrings below the contract's fields and members, by class and name."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(contract)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            names = field.targets if isinstance(field, ast.Assign) else [getattr(field, "target", None)]
            if (
                isinstance(names[0], ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                found.setdefault(node.name, {})[names[0].id] = text.value.value
    return found


def schemas() -> Json:
    """All of them by name, in the alphabet's order."""
    _, found = msgspec.json.schema_components(
        [AttachRequest, Attachment, AttachmentDetail, Capacity, Policy], ref_template="#/components/schemas/{name}"
    )
    texts = _field_texts()
    for name, schema in found.items():
        schema.pop("title", None)
        _tell(schema, texts.get(name, {}), members=getattr(contract, name))
        if "properties" in schema and name not in {"Target", "AttachRequest"}:
            schema["required"] = list(schema["properties"])  # what deadlined answers leaves nothing out
    request = found["AttachRequest"]
    request["properties"]["policy"] = ref("PolicyFields") | {"description": texts["AttachRequest"]["policy"]}
    request["example"] = {"target": {"kind": "thread", "id": 4711}, "policy": {"initial_budget_ns": 2_000_000}}
    found["Target"] |= _target_rules()
    fields = found["Policy"]["properties"]
    # Defaults of a request are those of the settings, which nobody here knows.
    taken = {name: {key: value for key, value in one.items() if key != "default"} for name, one in fields.items()}
    found["PolicyFields"] = {
        "type": "object",
        "description": "Some or all fields of `Policy`. With those of the settings, min_budget_ns <= initial_budget_ns "
        "<= cap x period_ns must hold (for a group: times the number of CPUs).",
        "properties": taken,
        "additionalProperties": False,
    }
    found["PolicyChange"] = found["PolicyFields"] | {
        "description": "Fields of `Policy` that shall be another from now on.",
        "properties": {name: one for name, one in taken.items() if name not in _FIXED_FIELDS},
    }
    found["Error"] = _error_schema()
    return {name: _plain(found[name]) for name in sorted(found)}


def _tell(schema: Json, texts: Mapping[str, str], *, members: Any) -> None:
    """Add the texts of fields; those of an enumeration's members go into its own."""
    for name, one in schema.get("properties", {}).items():
        if name in texts:
            one["description"] = texts[name]
    if "enum" in schema:
        told = [f"- `{one.value}`: {' '.join(texts[one.name].split())}" for one in members if one.name in texts]
        schema["description"] = "\n".join([schema.get("description", ""), "", *told]).strip()


def _target_rules() -> Json:
    """Which fields go with which kind: what `Target` itself checks."""
    by_name = [one.value for one in _BY_NAME]
    by_id = [one.value for one in TargetKind if one not in {*_BY_NAME, TargetKind.DOMAIN}]
    nothing = {"const": ""}
    name = {"minLength": 1, "pattern": "^[^\\u0000]*$"}
    return {
        "required": ["kind"],
        "oneOf": [
            {
                "properties": {"kind": {"enum": by_id}, "id": {"minimum": 1}, "name": nothing, "uri": nothing},
                "required": ["kind", "id"],
            },
            {
                "properties": {"kind": {"enum": by_name}, "id": {"const": 0}, "name": name, "uri": nothing},
                "required": ["kind", "name"],
            },
            {
                "properties": {"kind": {"const": TargetKind.DOMAIN.value}, "id": {"const": 0}, "name": name},
                "required": ["kind", "name"],
            },
        ],
    }


def _error_schema() -> Json:
    return {
        "type": "object",
        "description": "Every refusal.",
        "properties": {
            "code": {"type": "string", "description": "Stable, for programs: `not-found`, `bad-state`, ..."},
            "message": {"type": "string", "description": "What is wrong and what would change it, for people."},
            "retryable": {"type": "boolean", "description": "The same request may succeed later."},
        },
        "required": ["code", "message", "retryable"],
    }


def _plain(schema: Any) -> Any:
    """Descriptions as Markdown: the contract's docstrings mark names by two backquotes."""
    if isinstance(schema, dict):
        return {
            key: inspect.cleandoc(value).replace("``", "`").replace("`DEFAULT_URI`", f"`{DEFAULT_URI}`").strip()
            if key == "description" and isinstance(value, str)
            else _plain(value)
            for key, value in schema.items()
        }
    return [_plain(one) for one in schema] if isinstance(schema, list) else schema
