"""Starts a command as a shell would, passes signals on to it, and tells how it ended. It holds nothing.

Ctrl-C and its like go from the terminal to every process of the foreground, the command among them; only what somebody
sends to this process alone is passed on. Who sent a signal, siginfo tells (sigaction(2)), so signals are blocked and
taken by a thread.
"""

import asyncio
import os
import signal
import threading
from collections.abc import Iterable, Sequence

NOT_FOUND, NOT_RUN, REFUSED = 127, 126, 125
"""Exit statuses as of a shell, and of env(1), timeout(1) and nohup(1) for a fault of their own."""

# asm-generic/siginfo.h: sent by the kernel, as a terminal's signals are.
_SI_KERNEL = 0x80
_PASSED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)


def block_signals() -> tuple[frozenset[signal.Signals], frozenset[int]]:
    """Block what is passed on, before any thread begins. Returns it, and the mask as it was, which the command gets.

    What was ignored from the start (nohup) stays ignored by both.
    """
    caught = frozenset(one for one in _PASSED if signal.getsignal(one) is not signal.SIG_IGN)
    return caught, frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, caught))


class CommandError(Exception):
    """It can't be run. ``status`` is that of a shell."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Command:
    """A running command."""

    def __init__(self, argv: Sequence[str], *, caught: Iterable[signal.Signals], mask: Iterable[int]) -> None:
        """Start it, with this process' own scheduling policy, terminal and directory. Needs a running loop.

        Raises:
            CommandError: it can't be run.
        """
        try:
            self.pid = os.posix_spawnp(
                argv[0], list(argv), os.environ,
                setsigmask=list(mask), setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # Python ignores these
            )  # fmt: skip
        except FileNotFoundError:
            raise CommandError(f"{argv[0]}: not found", NOT_FOUND) from None
        except (OSError, ValueError) as error:
            raise CommandError(f"{argv[0]}: {getattr(error, 'strerror', None) or error}", NOT_RUN) from None
        self._pidfd = os.pidfd_open(self.pid)  # our child, not waited for yet: it is that one
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._reap)
        threading.Thread(target=self._listen, args=(frozenset(caught),), name="signals", daemon=True).start()

    async def wait(self) -> int:
        """Until it ends: its exit status, or 128 and the signal that ended it."""
        return await asyncio.shield(self._ended)

    def send(self, number: int) -> None:
        """A signal to the command; none where it has ended."""
        if not self._ended.done():
            signal.pidfd_send_signal(self._pidfd, number)

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._ended.set_result(128 - status if status < 0 else status)

    def _listen(self, caught: frozenset[signal.Signals]) -> None:
        while caught:
            found = signal.sigwaitinfo(caught)
            if found.si_code != _SI_KERNEL:
                self._loop.call_soon_threadsafe(self.send, found.si_signo)
