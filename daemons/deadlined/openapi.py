"""The OpenAPI 3.1 document of deadlined's REST API, built from the contract: what is true is the code.

``python -m deadlined.openapi > docs/deadlined.openapi.json`` writes the committed one; a test compares both, and the
paths with the routes.
"""

import functools
import json
import sys
from collections.abc import Mapping

from deadlined.openapi_schemas import Json, ref, schemas

_DESCRIPTION = """Holds threads by SCHED_DEADLINE reservations whose budgets size themselves (docs/deadlined.md).

Served on a unix socket, `/run/deadlined/api.sock`; the host in an address is ignored. GET needs the role *read*,
everything else *operate*: root and deadlined's own user have both, others by `access` in its settings. `/healthz` needs
the socket alone.

All times are nanoseconds. A refusal is always an `Error`, whatever the status.
"""

_ERRORS = {
    "400": "The request can't be read, or its fields contradict each other; the text names the field and the cure.",
    "403": "`denied`: this user may not, or the kernel refuses (privilege, pinning); the text has the cure.",
    "404": "`not-found`: no such attachment, or no such target.",
    "409": "`bad-state`: attached already, or held by somebody else. `no-capacity`: it does not fit.",
    "413": "The body is larger than 64 KiB.",
    "500": "`internal`: a bug; the journal has more.",
    "501": "`unsupported`: this host lacks what the target or the actuator needs; the text says what.",
    "502": "`failed`: the system refused in an unexpected way.",
    "503": "`unavailable`: vmand or libvirt is away, or deadlined is stopping. It may work later.",
    "504": "`timeout`: the other side did not answer in time.",
}


def _answer(text: str, schema: Json) -> Json:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _refusal(status: str) -> Json:
    return {"$ref": f"#/components/responses/{status}"}


def _operation(
    name: str, summary: str, *, done: Mapping[str, Json], errors: str = "", body: str = "", more: Json | None = None
) -> Json:
    """``errors``: the statuses beside 403 and 500, which anything can answer with; ``body``: its schema's name."""
    refusals = {status: _refusal(status) for status in sorted({"403", "500", *errors.split()})}
    taken = {"required": True, "content": {"application/json": {"schema": ref(body)}}} if body else None
    return {
        "operationId": name,
        "summary": summary,
        **(more or {}),
        **({"requestBody": taken} if taken else {}),
        "responses": {**done, **refusals},
    }


_ATTACHMENT = {
    "name": "attachment",
    "in": "path",
    "required": True,
    "description": "Its id; ids are never used twice.",
    "schema": {"type": "integer", "minimum": 1, "maximum": 10**18 - 1},
}
_LAST = {
    "name": "last",
    "in": "query",
    "description": "So many samples, the newest ones; all of them without it.",
    "schema": {"type": "integer", "minimum": 0, "maximum": 10**18 - 1},
}


def _paths() -> Json:
    one = ref("Attachment")
    return {
        "/v1/attachments": {
            "get": _operation(
                "listAttachments", "Everything that is held",
                done={"200": _answer("All of them, by id.", {"type": "array", "items": one})},
            ),
            "post": _operation(
                "attach", "Hold a target from now on", body="AttachRequest", errors="400 404 409 413 501 502 503 504",
                done={"201": _answer("It is held, or waits; each thread's state tells.", one)},
                more={
                    "description": "Answers when its threads were tried once. Fields of `policy` that are left out are "
                    "as the settings have them. Units, cgroups, partitions and domains are held again after a restart."
                },
            ),
        },
        "/v1/attachments/{attachment}": {
            "parameters": [_ATTACHMENT],
            "get": _operation(
                "showAttachment", "One attachment with its history", errors="400 404", more={"parameters": [_LAST]},
                done={"200": _answer("With its samples, oldest first.", ref("AttachmentDetail"))},
            ),
            "patch": _operation(
                "changeAttachment", "Size its budgets by another policy", body="PolicyChange", errors="400 404 413 502",
                done={"200": _answer("As it is from now on.", one)},
                more={"description": "Fields that are left out stay. `actuator` and `dry_run` can't be changed."},
            ),
            "delete": _operation(
                "detach", "Give every thread its own policy back", errors="404 502",
                done={"204": {"description": "It is forgotten."}},
            ),
        },
        "/v1/capacity": {
            "get": _operation(
                "capacity", "Probe the admission bandwidth that is left", errors="501 502 503 504",
                done={"200": _answer("In CPUs.", ref("Capacity"))},
                more={"description": "Takes all that is left for some milliseconds, at most once a second."},
            ),
        },
        "/v1/openapi.json": {
            "get": _operation(
                "openapi", "This document", done={"200": _answer("OpenAPI 3.1.", {"type": "object"})}
            ),
        },
        "/healthz": {
            "get": {
                "operationId": "health",
                "summary": "Whether the cycle turns",
                "responses": {
                    "200": _text("`ok`"),
                    "503": _answer("The last cycle was too long ago; the text says how long.", ref("Error")),
                },
            },
        },
        "/metrics": {
            "get": {
                "operationId": "metrics",
                "summary": "For Prometheus",
                "responses": {
                    "200": _text("Its text format; OpenMetrics for who accepts that.", "application/openmetrics-text"),
                    "403": _refusal("403"),
                },
            },
        },
    }  # fmt: skip


def _text(text: str, *more: str) -> Json:
    return {"description": text, "content": {kind: {"schema": {"type": "string"}} for kind in ("text/plain", *more)}}


@functools.cache
def document() -> Json:
    """The whole document. It is the same object each time: not to be changed."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "deadlined",
            "version": "1",
            "summary": "Reservations of CPU time that size themselves",
            "description": _DESCRIPTION,
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://deadlined", "description": "On /run/deadlined/api.sock."}],
        "paths": _paths(),
        "components": {
            "schemas": schemas(),
            "responses": {status: _answer(told, ref("Error")) for status, told in _ERRORS.items()},
        },
    }


@functools.cache
def text() -> str:
    """The document as it is committed, and as it is served."""
    return json.dumps(document(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
