"""The daemon: settings, the conversation with vmand, then the sockets that libvirt's clients look for."""

from virtvmand import slim

# isort: split

import contextlib
import functools
import logging
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgehold import directories, settings
from edgehold.errors import EX_SOFTWARE, SettingsError, UnavailableError
from edgehold.service import Runtime, daemon_arguments, run, take_descriptors
from edgehold.systemd import activation, journal
from edgehold.wire import later
from edgehold.wire.control import bind_unix
from edgehold.wire.peer import Roles, socket_mode
from virtvmand.config import Config
from virtvmand.driver.assembly import Driver
from virtvmand.driver.context import Context
from virtvmand.keeper import Keeper
from virtvmand.mirror import Mirror
from virtvmand.server import Server

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

log = logging.getLogger(__name__)

SOCKETS = (("virtvmand-sock", False), ("virtvmand-sock-ro", True))
"""Where libvirt's clients look (and the names of systemd's descriptors), and whether one may only look there."""


def main() -> None:
    """``virtvmand [--config FILE] [--check-config] [--version]``."""
    options = daemon_arguments("virtvmand", "vman:///system for libvirt's clients: vmand's partitions as domains.")
    try:
        config = settings.load(Config, "virtvmand", path=options.config)
        config.check()
        roles = Roles.from_groups(read=config.access.read, operate=config.access.operate)
    except SettingsError as error:
        print(f"virtvmand: {error}", file=sys.stderr)  # noqa: T201 - there is no logging yet
        sys.exit(error.exit_status)
    if options.check_config:
        print("virtvmand: the settings are right")  # noqa: T201 - what --check-config is for
        return
    journal.setup("virtvmand", config.log_level)
    take_descriptors()
    sys.exit(run("virtvmand", lambda runtime: _alive(runtime, config, roles)))


@contextlib.asynccontextmanager
async def _alive(runtime: Runtime, config: Config, roles: Roles) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        passed = activation.listen_sockets()
        stack.enter_context(directories.owned(config.runtime, mode=0o755, who="virtvmand"))
        mirror = Mirror(
            Path(config.vmand_socket),
            # Lambdas, because what they call is made of the mirror.
            tell=lambda happening: driver.tell.happened(happening),  # noqa: PLW0108
            changed=lambda old, new: keeper.changed(old, new),  # noqa: PLW0108
            synced=lambda: keeper.synced(),  # noqa: PLW0108
        )
        context = Context(mirror=mirror, config=config, on_fault=lambda: runtime.stop(EX_SOFTWARE))
        driver = Driver(context, clients=lambda: server.connections)
        keeper = Keeper(context, driver.run, marker=config.runtime / "autostarted")
        server = Server(driver.handlers, roles=roles)
        runtime.spawn(mirror.run(), name="vmand")
        stack.push_async_callback(context.close)
        stack.push_async_callback(server.close)
        for name, read_only in SOCKETS:
            for listener in passed.get(name, []) or [_bind(config, name, roles, stack)]:
                await server.listen(listener, read_only=read_only)
        if config.http:
            metrics = functools.partial(_registry, server, mirror)
            runtime.spawn(later.serve_health(config.http_socket, roles, metrics), name="http")
        yield


def _bind(config: Config, name: str, roles: Roles, stack: contextlib.AsyncExitStack) -> socket.socket:
    """A socket of our own where systemd gave none. The directory is libvirt's, and may be there without it or not."""
    path = config.sockets / name
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise UnavailableError(f"{path.parent}: {error.strerror}; virtvmand's sockets belong there") from error
    listener = bind_unix(path, mode=socket_mode(roles))
    stack.callback(path.unlink, missing_ok=True)
    return listener


def _registry(server: Server, mirror: Mirror) -> "CollectorRegistry":
    slim.undo()  # aiohttp knows TLS
    from virtvmand.metrics import registry  # noqa: PLC0415 - loaded when somebody first asks

    return registry(server, mirror)


if __name__ == "__main__":
    main()
