"""systemd.exec(5), LoadCredential=: the only way by which a secret reaches a daemon."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from edgehold.errors import SettingsError

_NAME = re.compile(r"[A-Za-z0-9_.:@-]{1,255}")
_MAX_BYTES = 1024 * 1024  # systemd's own limit


def read(name: str, environ: Mapping[str, str] = os.environ) -> bytes:
    """The credential's bytes. They are never logged and never part of an error's text.

    Raises:
        SettingsError: it was not passed; the text says which line of the unit would pass it.
    """
    if not _NAME.fullmatch(name) or name in {".", ".."}:
        raise SettingsError(f"credential {name!r}: not a credential's name")
    directory = environ.get("CREDENTIALS_DIRECTORY")
    cure = f"add LoadCredential={name}:/path/of/the/secret to the unit (systemctl edit)"
    if not directory:
        raise SettingsError(f"credential {name!r}: this process was given none; {cure}")
    try:
        with (Path(directory) / name).open("rb") as file:
            secret = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise SettingsError(f"credential {name!r}: it was not passed; {cure}") from None
    except OSError as error:
        raise SettingsError(f"credential {name!r}: {error.strerror}") from error
    if len(secret) > _MAX_BYTES:
        raise SettingsError(f"credential {name!r}: larger than {_MAX_BYTES} bytes")
    return secret
