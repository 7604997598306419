"""Which back end this host has, made from the settings. Each is imported only where it is used."""

from pathlib import Path

from edgehold.errors import SettingsError
from vmand import placement
from vmand.backend import Backend, cores, topology
from vmand.backend.cpuset import Cpusets
from vmand.config import Config
from vmand.model import parse_cores
from vmand.placement import Topology


def kind_of(config: Config) -> str:
    """``qemu`` or ``vmanager``.

    Raises:
        SettingsError: what the settings ask for is not there; names the key and the cure.
    """
    there = Path(config.vmanager_device).exists()
    if config.backend == "vmanager" and not there:
        raise SettingsError(
            f"backend: {config.vmanager_device} does not exist: the firmware's driver is not loaded; "
            "load it, set vmanager_device, or set backend to qemu or auto"
        )
    if _is_firmware(config):
        return "vmanager"
    from vmand.backend.launcher import check_launcher  # noqa: PLC0415 - see above
    from vmand.backend.memory import check_directory  # noqa: PLC0415

    check_launcher(config.launcher)
    check_directory(config.memory)
    return "qemu"


def pool_of(config: Config) -> tuple[Topology, frozenset[int]]:
    """The cores of the host or of the firmware, and those that dedicated partitions may get.

    Raises:
        SettingsError: pool.cores is malformed, or names cores that can't be given.
    """
    try:
        wanted = parse_cores(config.pool.cores) if config.pool.cores else None
        if _is_firmware(config):
            found, usable = _firmware(config.vmanager_device)
        else:
            found = topology.read()
            usable = cores.usable(found, Cpusets(), topology.isolated_by_boot())
        return found, placement.pool(found, wanted, usable)
    except ValueError as error:
        raise SettingsError(f"pool.cores: {error}") from None


def make(kind: str, config: Config, *, topology: Topology, pool: frozenset[int]) -> Backend:
    """The back end."""
    if kind == "vmanager":
        from vmand.backend.vmanager import VmanagerBackend  # noqa: PLC0415 - see above

        return VmanagerBackend(config, pool=pool)
    from vmand.backend.qemu import QemuBackend  # noqa: PLC0415

    return QemuBackend(config, topology=topology, pool=pool)


def _is_firmware(config: Config) -> bool:
    return config.backend == "vmanager" or (config.backend == "auto" and Path(config.vmanager_device).exists())


def _firmware(path: str) -> tuple[Topology, frozenset[int]]:
    from vmand.backend import vmanager_found  # noqa: PLC0415 - see above

    try:
        return vmanager_found.cores(path)
    except OSError as error:
        raise SettingsError(
            f"vmanager_device: {path}: {error.strerror}; set it to the firmware's device, or set backend to qemu"
        ) from None
