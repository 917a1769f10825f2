"""Run one attention process: `python -m services.attention --cluster F --index I`."""

import sys

from common.ids import Role
from common.service import run_service
from services.attention.worker import AttentionWorker

if __name__ == "__main__":
    sys.exit(run_service(AttentionWorker, Role.ATTENTION))
