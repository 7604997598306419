"""One small tree of errors for every daemon, client and command.

Each error has a stable ``code`` for programs, a text that says what to do next for people, and ``retryable``: whether
the same request may succeed later with nothing changed by the caller. The wire form is the same three fields, so an
error that a daemon raises is the error that its client raises.
"""

from typing import Any, ClassVar

# sysexits(3): wrong usage, temporary failure, wrong settings; a unit's RestartPreventExitStatus= names the last.
EX_USAGE = 64
EX_SOFTWARE = 70
EX_TEMPFAIL = 75
EX_CONFIG = 78


class EdgeholdError(Exception):
    """Anything that a person or a program can act on. Subclasses fix the code; ``str()`` is the text."""

    code: str = "internal"
    retryable: bool = False
    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, *, code: str | None = None, retryable: bool | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        if retryable is not None:
            self.retryable = retryable

    def to_wire(self) -> dict[str, Any]:
        """The three fields that travel: code, message, retryable."""
        return {"code": self.code, "message": self.message, "retryable": self.retryable}


class BadRequestError(EdgeholdError):
    """The request itself is wrong: the caller's fault, nothing was changed."""

    code = "bad-request"
    exit_status = EX_USAGE


class NotFoundError(EdgeholdError):
    """The thing that the request names does not exist (any more)."""

    code = "not-found"


class BadStateError(EdgeholdError):
    """The thing exists, but its state does not allow the request; the text names the state."""

    code = "bad-state"


class DeniedError(EdgeholdError):
    """The caller's role, or the daemon's own privilege, is too small."""

    code = "denied"
    exit_status = 77  # EX_NOPERM


class NoCapacityError(EdgeholdError):
    """Not enough cores, memory or admission bandwidth is left; the text says how much is."""

    code = "no-capacity"
    retryable = True


class UnsupportedError(EdgeholdError):
    """This host or back end can't do it; the text says why."""

    code = "unsupported"


class TimedOutError(EdgeholdError):
    """It was asked for, and did not happen in time."""

    code = "timeout"
    retryable = True
    exit_status = EX_TEMPFAIL


class UnavailableError(EdgeholdError):
    """The peer is not there, or went away in the middle."""

    code = "unavailable"
    retryable = True
    exit_status = EX_TEMPFAIL


class SettingsError(EdgeholdError):
    """The settings are wrong; the text names file and key. A daemon exits with 78 and is not restarted."""

    code = "bad-settings"
    exit_status = EX_CONFIG


class FailedError(EdgeholdError):
    """The daemon tried and the world refused (a process died, the kernel said no); the text has the reason."""

    code = "failed"


_BY_CODE: dict[str, type[EdgeholdError]] = {
    kind.code: kind
    for kind in (
        BadRequestError,
        NotFoundError,
        BadStateError,
        DeniedError,
        NoCapacityError,
        UnsupportedError,
        TimedOutError,
        UnavailableError,
        SettingsError,
        FailedError,
    )
}


def from_wire(error: object) -> EdgeholdError:
    """The error that a peer sent. A malformed one becomes an ``internal`` error that shows what came."""
    if not isinstance(error, dict) or not isinstance(error.get("code"), str):
        return EdgeholdError(f"the peer sent an error that can't be read: {error!r:.200}")
    code, message = error["code"], str(error.get("message", ""))
    kind = _BY_CODE.get(code, EdgeholdError)
    return kind(message, code=code, retryable=bool(error.get("retryable", False)))
