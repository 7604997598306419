"""Whom deadlined refuses to hold, by looking only: nothing here changes a policy."""

import threading

import pytest

from deadlined import targets
from edgehold.api.deadlined import Target, TargetKind
from edgehold.errors import DeniedError
from edgehold.kernel.procfs import GoneError


def test_init_is_never_held() -> None:
    # On the function that only reads: through the API, a fault in it would throttle the host's init.
    with pytest.raises(DeniedError, match="init"):
        targets.check_thread(1)


def test_our_own_threads_are_refused() -> None:
    with pytest.raises(DeniedError, match="deadlined's own"):
        targets.open_local(Target(kind=TargetKind.THREAD, id=threading.get_native_id()))
    with pytest.raises(GoneError):
        targets.check_thread(2**30)
