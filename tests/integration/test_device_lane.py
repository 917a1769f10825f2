"""The lane of a GPU, run on the CPU's reference kernels with rows apart: the whole way of a block, and its answer."""

import asyncio

import torch

from common.ids import Role
from common.model.small import small_config
from common.model.writer import write_random
from common.obs.trace import Recorder
from common.request import Request, SamplingParams
from common.transport.device import DevicePool
from common.wire.blocks import RowType
from common.wire.header import Wire
from services.attention.device_lane import DeviceLane
from services.attention.device_model import DeviceModel
from services.attention.device_weights import load_device_weights
from services.attention.gate_balance import GateBalance
from services.attention.lane import StepTimes
from services.attention.latent_cache import LatentCache
from services.attention.scheduler import Slice
from services.attention.sequence import Sequence
from tests.inproc_cluster import inproc_cluster

PROMPT, STEPS = list(range(3, 40)), 4
KL = 0.02  # nats: bf16 against fp32 on the way through the attention side


def device_lane(cluster, attention, balance, trace, dtype):
    """A second lane for the same attention worker, on graphs' buffers."""
    model_config = attention.resident.config
    from common.model.source import open_checkpoint

    with open_checkpoint(cluster.config.model.path) as checkpoint:
        weights = load_device_weights(checkpoint, model_config, device="cpu", dtype=dtype)
    cache = LatentCache(model_config, 16, dtype=dtype)
    model = DeviceModel(model_config, weights, cache, max_context=1024)
    attention.moe.combined = RowType.FP32
    state = model.state(64)
    state.buckets = [8, 64]  # a single token is one row of eight, whose scales lie behind all
    whole = trace is None and attention.moe.wire is Wire.FP8
    setattr(model, "before_experts" if whole else "layer", None)  # is not called
    return DeviceLane(0, model, state, attention.moe, StepTimes(), trace, balance=balance)


async def decode(lane, pages):
    """Logits and best tokens of a prompt and of STEPS tokens after it."""
    sequence = Sequence(Request("s", tuple(PROMPT), SamplingParams()), list(PROMPT), 0, len(PROMPT))
    sequence.pages = pages
    found = [await lane.forward([Slice(sequence, 0, len(PROMPT))])]
    sequence.num_computed = len(PROMPT)
    for step in range(STEPS):
        sequence.token_ids.append(50 + step)
        found.append(await lane.forward([Slice(sequence, len(PROMPT) + step, 1)]))
        sequence.num_computed += 1
    return found


def test_a_device_lane_says_what_the_cpu_lane_says(tmp_path):
    write_random(tmp_path / "model", small_config(), seed=3)

    async def run(wire, traced, dtype, copied):
        # an answer that is kept does not keep the next away
        window = 1 if dtype is fp32 and not copied else 64
        pool = lambda: DevicePool("cpu")  # noqa: E731
        async with inproc_cluster(
            tmp_path / "model",
            tmp_path / f"{wire}{traced:d}{dtype.itemsize}{copied:d}",
            wire=wire,
            new_pool=pool,
            link_window=window,
        ) as cluster:
            (attention,) = cluster.of(Role.ATTENTION)
            sequence = Sequence(Request("p", (1,), SamplingParams()), [1], 0, 1)
            pages = attention.requests.scheduler.pages.acquire(sequence, 64)
            with torch.inference_mode():
                expected = await decode(attention._lanes[0], pages)
                balance = GateBalance(16, 0.1, lambda layer, bias: None)
                trace = Recorder(attention.spec, 1000) if traced else None
                lane = device_lane(cluster, attention, balance, trace, dtype)
                keep, kept = lane.state.keep, []
                lane.state.keep = lambda payload: (kept.append(payload), keep(payload))
                if copied:
                    lane.state.keep = None
                got = await decode(lane, range(2))
            # answers are fp32 here
            layers = len(attention.resident.config.moe_layers) * (1 + STEPS)
            assert len(kept) == (layers if dtype is torch.float32 and not copied else 0)
            tokens = (len(PROMPT) + STEPS) * attention.resident.config.top_k
            counted = [one.recent + one.load for one in balance._layers.values()]
            assert [int(rows.sum()) for rows in counted] == [tokens] * len(counted)
            assert list(balance._layers) == list(attention.resident.config.moe_layers)
            if trace is not None:  # attention and shared expert are told apart
                layers = [("attention", i) for i in balance._layers]
                layers += [("shared", i) for i in balance._layers]
                spans = [(s[0], s[2]) for s in trace.spans if s[0] in ("attention", "shared")]
                assert sorted(spans) == sorted(layers * (1 + STEPS))
            assert all(s.transport.pool.outstanding == 0 for s in cluster.services.values())
            return expected, got

    said, bf16, fp32 = {}, torch.bfloat16, torch.float32
    for way in (
        ("fp8", False, bf16, False), ("fp8", True, bf16, False), ("bf16", False, bf16, False),
        ("fp8", False, fp32, False), ("fp8", False, fp32, True),
    ):  # fmt: skip
        expected, got = asyncio.run(run(*way))
        said[way] = got
        for (theirs, _), (ours, best) in zip(expected, got, strict=True):
            p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
            assert float((p.exp() * (p - q)).sum(-1).mean()) < KL
            assert best == ours.argmax(-1).tolist()
    halves, copied = said["fp8", True, bf16, False], said["fp8", False, fp32, True]
    for dtype, other in ((bf16, halves), (fp32, copied)):
        for (one, _), (same, _) in zip(said["fp8", False, dtype, False], other, strict=True):
            assert torch.equal(one, same)
