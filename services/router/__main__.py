"""Run one router process: `python -m services.router --cluster F --index I`."""

import sys

from common.ids import Role
from common.service import run_service
from services.router.worker import RouterWorker

if __name__ == "__main__":
    sys.exit(run_service(RouterWorker, Role.ROUTER))
