"""Run one gateway process: `python -m services.gateway --cluster F --index I`."""

import sys

from common.config import ClusterConfig
from common.ids import Role
from common.service import run_service
from services.gateway.links import ClusterDialler
from services.gateway.service import GatewayService


def build(config: ClusterConfig, index: int) -> GatewayService:
    """The service with its links over the cluster's transport."""
    return GatewayService(config, index, ClusterDialler(config, index))


if __name__ == "__main__":
    sys.exit(run_service(build, Role.GATEWAY))
