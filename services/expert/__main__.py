"""Run one expert process: `python -m services.expert --cluster F --index I`."""

import sys

from common.ids import Role
from common.service import run_service
from services.expert.worker import ExpertWorker

if __name__ == "__main__":
    sys.exit(run_service(ExpertWorker, Role.EXPERT))
