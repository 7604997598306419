"""The daemon: settings, directories, recovery, then the control socket."""

import asyncio
import contextlib
import functools
import logging
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgehold import directories, settings
from edgehold.errors import SettingsError
from edgehold.service import Runtime, daemon_arguments, run, take_descriptors
from edgehold.systemd import activation, journal
from edgehold.wire import later
from edgehold.wire.control import ControlServer, bind_unix
from edgehold.wire.peer import Roles, socket_mode
from vmand.api import Api
from vmand.backend import Host, backends, users
from vmand.config import Config
from vmand.model import GIB
from vmand.placement import Topology
from vmand.recovery import recover
from vmand.service import Service
from vmand.store import Store

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

log = logging.getLogger(__name__)


def main() -> None:
    """``vmand [--config FILE] [--check-config] [--version]``."""
    options = daemon_arguments("vmand", "Hard partitions on this host.")
    try:
        config = settings.load(Config, "vmand", path=options.config)
        config.check()
        kind = backends.kind_of(config)
        topology, pool = backends.pool_of(config)
        roles = Roles.from_groups(read=config.access.read, operate=config.access.operate)
    except SettingsError as error:
        print(f"vmand: {error}", file=sys.stderr)  # noqa: T201 - there is no logging yet
        sys.exit(error.exit_status)
    if options.check_config:
        print("vmand: the settings are right")  # noqa: T201 - what --check-config is for
        return
    journal.setup("vmand", config.log_level)
    take_descriptors()
    sys.exit(run("vmand", lambda runtime: _alive(runtime, config, roles, kind=kind, topology=topology, pool=pool)))


@contextlib.asynccontextmanager
async def _alive(
    runtime: Runtime, config: Config, roles: Roles, *, kind: str, topology: Topology, pool: frozenset[int]
) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        passed = activation.listen_sockets()
        # A QEMU of another user walks through two of them to what is its own.
        for directory, mode in ((config.runtime, 0o755), (Path(config.state_dir), 0o700), (config.memory, 0o711)):
            stack.enter_context(directories.owned(directory, mode=mode, who="vmand"))
        if kind == "qemu":
            stack.enter_context(users.claimed(users.uids_from(config.uid_first)))
        store = stack.enter_context(contextlib.closing(Store(config.journal)))
        service = Service(
            backend=backends.make(kind, config, topology=topology, pool=pool),
            store=store,
            clock=runtime.clock,
            pool=pool,
            topology=topology,
            max_partitions=config.limits.partitions,
            memory_limit=int(config.pool.memory_gib * GIB),
            shutdown_timeout_s=config.shutdown_timeout_s,
            on_fault=lambda: runtime.stop(70),
        )
        stack.push_async_callback(service.close)
        await recover(service)
        api = Api(service, config=config, host_cores=max(os.cpu_count() or 1, max(topology.online, default=0) + 1))
        # The first deploy needs the answer; trying may take seconds and must delay neither the start nor the stop.
        probe = asyncio.create_task(service.backend.host(), name="which accelerator")
        stack.push_async_callback(_drop, probe)
        listeners = passed.get("control", [])
        server = ControlServer(api.handle, roles=roles)
        if not listeners:
            listeners = [bind_unix(config.control_socket, mode=socket_mode(roles))]
            stack.callback(config.control_socket.unlink, missing_ok=True)
        for listener in listeners:
            await server.listen(listener)
        stack.push_async_callback(server.close)
        if config.http:
            metrics = functools.partial(_registry, service, api)
            runtime.spawn(later.serve_health(config.http_socket, roles, metrics), name="http")
        yield


async def _drop(task: asyncio.Task[Host]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _registry(service: Service, api: Api) -> "CollectorRegistry":
    from vmand.metrics import registry  # noqa: PLC0415 - loaded when somebody first asks

    return registry(service, api)


if __name__ == "__main__":
    main()
