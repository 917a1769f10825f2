"""A whole cluster in one process, every service the real one, over the in-process fabric."""

import asyncio
from contextlib import asynccontextmanager

import aiohttp
import pytest
import torch

from common import config as cluster_config
from common.ids import Role
from common.model.small import write_small_model
from common.transport.inproc import InprocFabric
from services.attention.worker import AttentionWorker
from services.expert.worker import ExpertWorker
from services.gateway.links import ClusterDialler
from services.gateway.service import GatewayService
from services.router.worker import RouterWorker
from tests.gateway_fakes import run


class _Done(Exception):  # noqa: N818
    """Ends the task group without being an error."""


@pytest.fixture(autouse=True)
def one_thread():
    """As in a service; a pool of threads would fight for the cores with whatever else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path):
    document = {
        "cluster": {"run_dir": str(tmp_path), "wire": "fp32"},
        "model": {
            "path": str(write_small_model(tmp_path / "model", num_experts=4)),
            "served_name": "small",
            "cache_dir": str(tmp_path / "cache"),
        },
        "gateway": {"port": 0},
        "nodes": [{"attention": 1, "experts": 2}, {"attention": 1, "experts": 2}],
    }
    return cluster_config.parse(document, source="test")


@asynccontextmanager
async def cluster(config):
    """Every process of the configuration as an object, and a client."""
    fabric = InprocFabric()
    builders = {
        Role.ROUTER: RouterWorker,
        Role.EXPERT: ExpertWorker,
        Role.ATTENTION: AttentionWorker,
    }
    services = [
        builders[spec.id.role](config, spec.id.index, fabric.transport())
        for spec in config.processes()
        if spec.id.role in builders
    ]
    gateway = GatewayService(config, 0, ClusterDialler(config, 0, fabric.transport()))
    try:
        async with asyncio.TaskGroup() as tasks:
            for service in (*services, gateway):
                await service.start(tasks)
            base = f"http://127.0.0.1:{gateway.port}"
            timeout = aiohttp.ClientTimeout(total=60)
            async with aiohttp.ClientSession(base, timeout=timeout) as client:
                try:
                    yield client
                finally:
                    for service in (gateway, *reversed(services)):
                        await service.drain()
                        await service.stop()
            raise _Done
    except* _Done:
        pass


async def wait_until_ready(client):
    async with asyncio.timeout(30):
        while True:
            async with client.get("/ready") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.02)


def test_real_services_answer_over_the_in_process_fabric(config):
    async def main():
        async with cluster(config) as client:
            await wait_until_ready(client)
            body = {
                "prompt": [[1, 2, 3], [4, 5], [6], [7, 8]],
                "max_tokens": 8,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            answers = []
            for _ in range(2):
                async with client.post("/v1/completions", json=body) as response:
                    assert response.status == 200, await response.text()
                    answers.append(await response.json())
            first, second = ([c["token_ids"] for c in a["choices"]] for a in answers)
            assert first == second
            assert [len(ids) for ids in first] == [8] * 4
            async with client.get("/cluster") as response:
                processes = (await response.json())["processes"]
            assert {p["state"] for p in processes} == {"ready"}
            assert len(processes) == len(config.processes())
            experts = [p for p in processes if p["role"] == "expert"]
            assert all(p["counters"]["rows"] > 0 for p in experts)

    run(main())
