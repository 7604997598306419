"""What a start of vmand finds: commands that were cut off, guests that live, guests that died meanwhile, remains.

| the journal says          | then                                                                       |
| ---                       | ---                                                                        |
| create-partition, deploy  | rolled back: the remains are removed; no partition, or a READY one          |
| shutdown, destroy         | rolled forward: the guest is ended; a READY partition, or none              |
| suspend, restore, reboot  | QEMU is asked what the guest does, and that is written                      |
| nothing                   | a live guest is adopted; one that is off is READY, one that is gone FAILED  |
| (QEMU does not answer)    | the state stays, with a reason; it is looked at again until it answers      |
"""

import asyncio
import logging

import msgspec

from edgehold.api.vmand import State
from edgehold.errors import EdgeholdError
from vmand import model
from vmand.model import LIVE, Record
from vmand.service import Service

log = logging.getLogger(__name__)


async def recover(service: Service) -> None:
    """Bring journal and world together. One partition that can't be has the reason; the others go on.

    One with a guest keeps its state: FAILED is only what was seen to have failed.
    """
    records = service.store.all()
    await asyncio.gather(*(_settle(service, one) for one in records))
    await service.backend.sweep(service.records)


async def _settle(service: Service, record: Record) -> None:
    try:
        await _settle_one(service, record)
    except EdgeholdError as error:
        log.error("partition %d: %s", record.id, error)  # noqa: TRY400 - the text is the message
        service.load(record)
        reason = f"at vmand's start: {error.message}"
        if record.state not in LIVE:
            service.put(msgspec.structs.replace(record, state=State.FAILED, reason=reason))
            return
        # Its guest may be well: that we could not look is no reason to end it. It is looked at again until it answers.
        pending = record.pending if record.pending in {model.SHUTDOWN, model.DESTROY} else ""
        service.put(msgspec.structs.replace(record, reason=reason, pending=pending))
        service.look_again(record)


async def _settle_one(service: Service, record: Record) -> None:
    if record.pending:
        fields = {"partition": record.id}
        log.warning("partition %d: %s was cut off; settling it", record.id, record.pending, extra=fields)
    match record.pending:
        case model.CREATE | model.DESTROY:
            await service.backend.end(record)
            await service.backend.release(record)
            service.forget(record)
        case model.DEPLOY | model.SHUTDOWN:
            await service.backend.end(record)
            service.load(record)
            service.put(record.at_rest(State.READY))
        case _:
            await _adopt(service, record)


async def _adopt(service: Service, record: Record) -> None:
    service.load(record)
    async with service.lock(record.id):
        await _adopt_locked(service, record)


async def _adopt_locked(service: Service, record: Record) -> None:
    if record.state in LIVE:
        await service.reconcile(record, await service.backend.adopt(record))
    elif record.run:  # its guest had ended, and removing the remains was cut off
        await service.backend.end(record)
        service.put(record.at_rest(record.state, reason=record.reason))
