"""What a start of vmand finds: commands that were cut off, guests that live, guests that died meanwhile, remains.

| the journal says          | then                                                                       |
| ---                       | ---                                                                        |
| create-partition, deploy  | rolled back: the remains are removed; no partition, or a READY one          |
| shutdown, destroy         | rolled forward: the guest is ended; a READY partition, or none              |
| shutdown that leaves      | the guest is adopted: it is not ended by force; one that was suspended and  |
|                           | went on for the button is again                                            |
| change-partition          | rolled back: a READY partition as it was                                    |
| suspend, restore, reboot  | QEMU is asked what the guest does, and that is written; a guest that was to |
|                           | power off for a reboot, and did, is started again                          |
| nothing                   | a live guest is adopted; one that is off is READY, one that is gone FAILED  |
| (QEMU does not answer)    | the state stays, with a reason; it is looked at again until it answers      |

A partition at rest whose memory is not there, because the host was started anew, gets it anew: in the background, since
the kernel clears each page.
"""

import asyncio
import logging

import msgspec

from edgehold.api.vmand import State
from edgehold.errors import EdgeholdError
from vmand import model
from vmand.backend import Finding
from vmand.model import LIVE, Found, Record
from vmand.service import Service

log = logging.getLogger(__name__)


async def recover(service: Service) -> None:
    """Bring journal and world together. One partition that can't be has the reason; the others go on.

    One with a guest keeps its state: FAILED is only what was seen to have failed.
    """
    records = service.store.all()
    await asyncio.gather(*(_settle(service, one) for one in records))
    await service.backend.sweep(service.records)
    service.watch.begin()
    if bare := await _bare(service):
        service.capacity.owe(bare)
        service.spawn(_restock(service, bare), "memory of partitions at rest")


async def _bare(service: Service) -> list[int]:
    """The partitions at rest that have no memory."""
    resting = [one for one in service.records if one.state not in LIVE and not one.run]
    held = await asyncio.gather(*(service.backend.holds(one) for one in resting), return_exceptions=True)
    found = []
    for record, answer in zip(resting, held, strict=True):
        if isinstance(answer, EdgeholdError):
            log.warning("partition %d: what it has can't be known: %s", record.id, answer)
        elif isinstance(answer, BaseException):
            raise answer
        elif not answer:
            found.append(record.id)
    return found


async def _restock(service: Service, partitions: list[int]) -> None:
    for one in partitions:
        if service.tasks.closing.is_set():
            return
        try:
            log.warning("partition %d has no memory; taking it anew", one, extra={"partition": one})
            await service.restock(one)
        except EdgeholdError as error:
            log.warning("partition %d: %s", one, error)


async def _settle(service: Service, record: Record) -> None:
    try:
        await _settle_one(service, record)
    except EdgeholdError as error:
        log.error("partition %d: %s", record.id, error)  # noqa: TRY400 - the text is the message
        # Its guest may be well: that we could not look is no reason to end it. It is looked at again until it answers.
        state = record.state if record.state in LIVE else State.FAILED
        reason = model.plain(f"at vmand's start: {error.message}")
        service.book.hold_unsettled(msgspec.structs.replace(record, state=state, reason=reason))
        service.watch.look_later(record)


async def _settle_one(service: Service, record: Record) -> None:
    if record.pending:
        fields = {"partition": record.id}
        log.warning("partition %d: %s was cut off; settling it", record.id, record.pending, extra=fields)
    match record.pending:
        case model.CREATE | model.DESTROY:
            await service.backend.end(record)
            await service.backend.release(record)
            service.book.forget(record)
        case model.SHUTDOWN if record.leave and record.state in LIVE:
            await _adopt(service, msgspec.structs.replace(record, leave=False))
        case model.CHANGE:
            service.book.hold(record)
            service.book.put_late(record.at_rest(State.READY, reason=record.reason))
        case model.DEPLOY | model.SHUTDOWN:
            await service.backend.end(record)
            service.book.hold(record)
            service.book.put_late(record.at_rest(State.READY))
        case _:
            await _adopt(service, record)


async def _adopt(service: Service, record: Record) -> None:
    service.book.hold(record)
    async with service.book.lock(record.id):
        if record.state in LIVE:
            finding = await service.backend.adopt(record)
            if record.pending == model.REBOOT and finding.found is Found.OFF:  # it was asked to power off for that
                await service.backend.reboot(record)
                finding = Finding(found=Found.RUNNING)
            if (record.pending, record.state, finding.found) == (model.SHUTDOWN, State.SUSPENDED, Found.RUNNING):
                await service.backend.suspend(record)
                finding = await service.backend.look(record)
            settled = await service.watch.reconcile(record, finding)
            if settled.state in LIVE:
                await service.watch.regrade(settled)
        elif record.run:  # its guest had ended, and removing the remains was cut off
            await service.backend.end(record)
            service.book.put_late(record.at_rest(record.state, reason=record.reason))
