"""What the FP8 and BF16 wires cost in accuracy: next-token distributions against the fp32 wire, per configuration.

The services are the real ones, over the in-process transport, fed the same text; a row's distribution is compared at
every position.
"""

import asyncio
import tempfile
from pathlib import Path

import pytest
import torch

from tests.inproc_cluster import inproc_cluster
from tests.oracle.configs import CONFIGS
from tests.oracle.reference import build_checkpoint

MAX_KL_NATS = 0.02
NUM_TOKENS = 160


async def logits_by_wire(
    model: Path, tokens: list[int], wires: tuple[str, ...]
) -> list[torch.Tensor]:
    results = []
    for wire in wires:
        async with inproc_cluster(model, Path(tempfile.mkdtemp()), wire=wire) as cluster:
            results.append(await cluster.logits(tokens))
    return results


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_distributions_stay_close_to_the_exact_wire(config, tmp_path_factory, record_property):
    torch.set_num_threads(1)
    model = build_checkpoint(tmp_path_factory.getbasetemp() / config.name, config)
    generator = torch.Generator().manual_seed(17)
    vocab = config.config["vocab_size"]
    tokens = torch.randint(0, vocab, (NUM_TOKENS,), generator=generator).tolist()
    exact, fp8, bf16 = asyncio.run(logits_by_wire(model, tokens, ("fp32", "fp8", "bf16")))
    target = exact.log_softmax(-1)
    for name, logits in (("fp8", fp8), ("bf16", bf16)):
        others = logits.log_softmax(-1)
        kl = float((target.exp() * (target - others)).sum(-1).mean())
        changed = float((logits.argmax(-1) != exact.argmax(-1)).float().mean())
        record_property(f"{name}_kl_nats", kl)
        print(f"{config.name} {name}: mean KL {kl:.5f} nats, greedy tokens changed {changed:.1%}")
        assert 0 < kl < MAX_KL_NATS, f"{name}: {kl} nats"
    assert torch.equal(exact, asyncio.run(logits_by_wire(model, tokens, ("fp32",)))[0])
