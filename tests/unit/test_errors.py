"""Errors: the wire form is the error, whoever sends it."""

import pytest

from edgehold import errors


@pytest.mark.parametrize("kind", errors.EdgeholdError.__subclasses__())
def test_wire_round_trip(kind: type[errors.EdgeholdError]) -> None:
    sent = kind("core 3 is taken; destroy a partition first")
    back = errors.from_wire(sent.to_wire())
    assert type(back) is kind
    assert (back.code, back.message, back.retryable) == (sent.code, sent.message, sent.retryable)


def test_codes_are_stable() -> None:
    assert sorted(kind.code for kind in errors.EdgeholdError.__subclasses__()) == [
        "bad-request", "bad-settings", "bad-state", "denied", "failed", "no-capacity", "not-found", "timeout",
        "unavailable", "unsupported",
    ]  # fmt: skip


def test_unknown_code_is_kept() -> None:
    error = errors.from_wire({"code": "from-the-future", "message": "text", "retryable": True})
    assert (type(error), error.code, error.retryable) == (errors.EdgeholdError, "from-the-future", True)


@pytest.mark.parametrize("garbage", [None, [], "x", {}, {"code": 3}, {"message": "m"}])
def test_garbage_becomes_internal(garbage: object) -> None:
    assert errors.from_wire(garbage).code == "internal"
