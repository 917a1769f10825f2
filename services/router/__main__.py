"""Run one router process: `python -m services.router --cluster F --index I`."""

import sys

import torch

from common.ids import Role
from common.service import run_service
from services.router.worker import RouterWorker

if __name__ == "__main__":
    with (
        torch.inference_mode()
    ):  # of the whole loop: a tenth of the cost of a small operation is autograd's
        sys.exit(run_service(RouterWorker, Role.ROUTER))
