"""All handlers together, by number of their procedure."""

from collections.abc import Callable, Iterable

from virtvmand.call import Client, Handler
from virtvmand.driver import refused
from virtvmand.driver.console import Console
from virtvmand.driver.context import Context
from virtvmand.driver.define import Define
from virtvmand.driver.devices import Devices
from virtvmand.driver.find import Absent, Find
from virtvmand.driver.host import Host
from virtvmand.driver.look import Look
from virtvmand.driver.metadata import Metadata
from virtvmand.driver.run import Run
from virtvmand.driver.session import Session
from virtvmand.driver.stats import Stats
from virtvmand.driver.tell import Tell
from virtvmand.driver.usage import Carried
from virtvmand.table import PROCEDURES


class Driver:
    """The driver of ``vman:///system``."""

    def __init__(self, context: Context, *, clients: Callable[[], Iterable[Client]]) -> None:
        self.run = Run(context)
        self.tell = Tell(clients)
        define = Define(context, self.run)
        carried = Carried(context)
        parts = (
            Session(context),
            Host(context),
            Find(context),
            Absent(),
            Look(context),
            Stats(context, carried),
            carried,
            self.run,
            define,
            Devices(define),
            Metadata(context, define),
            Console(context),
            self.tell,
        )
        self.handlers: dict[int, Handler] = refused.handlers()
        for number, procedure in PROCEDURES.items():
            for part in parts:
                if (handler := getattr(part, procedure.name, None)) is not None:
                    self.handlers[number] = handler
