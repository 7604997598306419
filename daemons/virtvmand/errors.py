"""Errors as libvirt's clients know them: a number of virErrorNumber, and a text.

The numbers are facts of libvirt's ABI (libvirt/virterror.h); clients such as Nova act on them.
"""

from enum import IntEnum

from edgehold.errors import (
    BadRequestError,
    BadStateError,
    DeniedError,
    EdgeholdError,
    FailedError,
    NoCapacityError,
    NotFoundError,
    TimedOutError,
    UnavailableError,
    UnsupportedError,
)


class Code(IntEnum):
    """virErrorNumber, as far as we answer it."""

    INTERNAL_ERROR = 1
    NO_SUPPORT = 3
    INVALID_ARG = 8
    OPERATION_FAILED = 9
    XML_ERROR = 27
    OPERATION_DENIED = 29
    SYSTEM_ERROR = 38
    RPC = 39
    NO_DOMAIN = 42
    AUTH_FAILED = 45
    OPERATION_INVALID = 55
    CONFIG_UNSUPPORTED = 67
    OPERATION_TIMEOUT = 68
    ARGUMENT_UNSUPPORTED = 74
    NO_DOMAIN_METADATA = 80
    OPERATION_UNSUPPORTED = 84
    ACCESS_DENIED = 88
    DEVICE_MISSING = 99


class LibvirtError(Exception):
    """A refusal that a client gets: ``code`` for programs, ``str()`` for people.

    ``retryable``: the same may succeed later, with nothing changed by whoever asks; for our own use.
    """

    def __init__(self, code: Code, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable or code in {Code.SYSTEM_ERROR, Code.OPERATION_TIMEOUT}


# Nova takes 42 for gone, 55 for "look at the state", 38 and 68 for "try again".
_CODES: dict[type[EdgeholdError], Code] = {
    BadRequestError: Code.INVALID_ARG,
    NotFoundError: Code.NO_DOMAIN,
    BadStateError: Code.OPERATION_INVALID,
    DeniedError: Code.ACCESS_DENIED,
    NoCapacityError: Code.OPERATION_FAILED,
    UnsupportedError: Code.CONFIG_UNSUPPORTED,
    TimedOutError: Code.OPERATION_TIMEOUT,
    UnavailableError: Code.SYSTEM_ERROR,
    FailedError: Code.OPERATION_FAILED,
}


def from_edgehold(error: EdgeholdError) -> LibvirtError:
    """What vmand answered, in libvirt's numbers; the text stays."""
    return LibvirtError(_CODES.get(type(error), Code.INTERNAL_ERROR), error.message)
