"""Run one attention process: `python -m services.attention --cluster F --index I`."""

import sys

import torch

from common.ids import Role
from common.service import run_service
from services.attention.worker import AttentionWorker

if __name__ == "__main__":
    # around the whole loop: measured, it takes 16 % off an addition of [8, 128], 43 % off a slice, 5 % off a product
    with torch.inference_mode():
        sys.exit(run_service(AttentionWorker, Role.ATTENTION))
