"""A service that does nothing, and misbehaves when DUMMY says so: "expert-1=bad-input attention-0=hang"."""

import asyncio
import logging
import os
import sys

from common.errors import ModelError
from common.ids import ProcessId
from common.service import run_service


class Dummy:
    """Any role but the gateway."""

    def __init__(self, config, name):
        self.config = config
        self.order = dict(item.split("=") for item in os.environ.get("DUMMY", "").split()).get(name)

    async def start(self, tasks):
        card, pipes = map(os.environ.get, ("CUDA_VISIBLE_DEVICES", "CUDA_MPS_PIPE_DIRECTORY"))
        logging.getLogger("atoll.dummy").info("card %s, MPS %s", card, pipes)
        if self.order == "bad-input":
            raise ModelError("tensor x is missing")
        if self.order == "crash":
            raise ValueError("broken")
        if self.order == "die-later":
            tasks.create_task(self.die_later())

    async def die_later(self):
        await asyncio.sleep(0.2)
        raise ModelError("tensor y is missing")

    async def drain(self):
        if self.order == "hang":
            await asyncio.Event().wait()

    async def stop(self):
        pass


def run(role, service=Dummy):
    """What the modules beside this one do."""

    def build(config, index):
        return service(config, str(ProcessId(role, index)))

    raise SystemExit(run_service(build, role, sys.argv[1:]))
