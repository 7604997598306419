"""Everything that a deploy names, opened and checked with the caller's rights before anything is started."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

from edgehold.wire.peer import Peer
from vmand.arguments import Deploy
from vmand.backend import devices, disks, images, tap
from vmand.config import Config
from vmand.model import Images


@contextlib.contextmanager
def opened(args: Deploy, *, fds: Sequence[int], peer: Peer, config: Config) -> Iterator[Images]:
    """The images and devices of a deploy, open until the block ends.

    Raises:
        BadRequestError: names the argument and the cure.
        DeniedError: the caller may not use what it named.
        UnsupportedError: this host can't give it.
    """
    tap.check(args.nics, bridges=config.bridges, limit=config.limits.nics)
    if args.vsock:
        devices.check_vsock()
    with contextlib.ExitStack() as stack:
        loaded = stack.enter_context(
            images.opened(
                kernel=args.kernel,
                initrd=args.initrd,
                dtb=args.dtb,
                cmdline=args.cmdline,
                fds=fds,
                limit_mib=config.limits.image_mib,
                peer=peer,
            )
        )
        locked = stack.enter_context(disks.opened(args.disks, limit=config.limits.disks, peer=peer))
        yield dataclasses.replace(loaded, disks=locked, nics=args.nics, vsock=args.vsock, agent=args.agent)
