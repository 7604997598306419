"""What a guest itself says: on its console, as vmand hands it on. virtvmand is not asked."""

import asyncio
import re

from edgehold.api.vmand import VmandClient
from edgehold.errors import EdgeholdError
from edgehold.testing.partitions import PrivateVmand

UP = "edgehold-guest up"
POWER_OFF = "edgehold-guest power-off"
BOOT_S = 90.0


async def printed(vmand: PrivateVmand, name: str, what: str = UP, *, times: int = 1) -> str:
    """Until the guest of this partition has printed a pattern (re.DOTALL) so many times; all that it printed.

    Raises:
        AssertionError: it did not in time.
    """
    text = ""
    try:
        async with asyncio.timeout(BOOT_S), await vmand.client() as client:
            text = await client.subscribe((await client.status(name)).id, console=True)
            events = client.events()
            while len(re.findall(what, text, re.DOTALL)) < times:
                text += (await anext(events)).text
    except (TimeoutError, EdgeholdError) as error:
        raise AssertionError(
            f"{name} did not print {what!r} {times} times: {error!r}; it did: {text[-1000:]!r}"
        ) from None
    return text


async def type_until(vmand: PrivateVmand, name: str, keys: bytes, what: str) -> None:
    """Type at its console until it prints that: a shell that is only starting throws away what is typed.

    Raises:
        AssertionError: it did not.
    """
    async with await vmand.client() as client:
        console = await client.attach_console(name)
    console.setblocking(False)
    loop = asyncio.get_running_loop()
    seen = b""
    try:
        async with asyncio.timeout(BOOT_S):
            await loop.sock_sendall(console, keys)
            while what.encode() not in seen:
                try:
                    async with asyncio.timeout(2):
                        more = await loop.sock_recv(console, 65536)
                except TimeoutError:
                    await loop.sock_sendall(console, keys)
                    continue
                assert more, f"{name}'s console ended: {seen[-500:]!r}"
                seen += more
    except TimeoutError:
        raise AssertionError(f"{name} did not print {what!r}; it did: {seen[-1000:]!r}") from None
    finally:
        console.close()


async def silent(client: VmandClient, name: str, *, seconds: float) -> None:
    """It prints nothing for so long."""
    before = await client.console(name)
    await asyncio.sleep(seconds)
    assert await client.console(name) == before
