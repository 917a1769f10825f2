"""The cards that this process may use, and what each process of a cluster on this host gets of them."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common.config import LOCAL, ClusterConfig
from common.ids import ProcessId
from deploy.local.mps import Mps
from deploy.local.run_dir import LOGS, MPS
from deploy.render import gpus


def visible() -> tuple[str, ...]:
    """As CUDA_VISIBLE_DEVICES takes them: UUIDs where the driver tells, since MPS counts numbers anew."""
    uuids = _uuids()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return uuids
    entries = [entry.strip() for entry in given.split(",")]
    return tuple(
        uuids[int(entry)] if entry.isdecimal() and int(entry) < len(uuids) else entry
        for entry in entries
        if entry not in ("", "-1", "NoDevFiles")
    )


def deal(
    config: ClusterConfig, cards: Sequence[str], run_dir: Path
) -> tuple[dict[ProcessId, dict[str, str]], Mps | None]:
    """Environment of each process that uses a card, and the MPS they need, if any; nothing on CPU.

    Raises ConfigError when there are too few cards.
    """
    here = replace(config, nodes=tuple(replace(node, host=LOCAL) for node in config.nodes))
    gpus.check_found(here, len(cards))
    assigned = gpus.assign(here, {LOCAL: len(cards)})
    mps = None
    if gpus.shares_cards(assigned):
        used = [cards[card] for card in sorted(set(assigned.values()))]
        mps = Mps(run_dir / MPS, run_dir / LOGS, used)
    pipes = str(mps.pipes) if mps else None
    environments = {
        id_: gpus.device_environment(cards[card], pipes) for id_, card in assigned.items()
    }
    return environments, mps


def _uuids() -> tuple[str, ...]:
    """Of every card in the order of nvidia-smi; none without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return tuple(str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles)
    finally:
        pynvml.nvmlShutdown()
