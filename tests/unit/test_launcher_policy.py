"""What the launcher decides before and between processes: models, memory, ports, restarts, what is worth a line."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from common.config import ProcessSpec, local_cluster
from common.errors import ConfigError, ModelError
from common.ids import ProcessId, Role
from common.obs.log import is_routine
from deploy import demo_report
from deploy.local import models, preflight
from deploy.local.run_dir import open_run_dir, write_atomically
from deploy.local.worker import Worker, WorkerState, restart_delay_s


def cluster(model, **changes):
    shape = {"ep": 2, "nodes": 1, "attention": 3, "experts_per_gpu": 1, "microbatches": 1}
    rest = {"wire": "fp8", "port": 0, "run_dir": Path("/run/atoll")}
    return local_cluster(model, **{**shape, **rest, **changes})


@pytest.mark.parametrize(
    ("experts", "ep", "each", "expected"),
    [
        (16, None, None, (16, 1)),
        (16, None, 4, (4, 4)),
        (16, 4, None, (4, 4)),
        (5, None, 2, (3, 2)),  # the last worker holds one
        (5, 3, None, (3, 2)),
        (5, 3, 2, (3, 2)),
    ],
)
def test_experts_are_split_over_workers(experts, ep, each, expected):
    assert models.split(experts, ep=ep, experts_per_gpu=each) == expected


@pytest.mark.parametrize(("ep", "each"), [(12, None), (8, 1), (17, None)])
def test_numbers_that_do_not_fit(ep, each):
    with pytest.raises(ConfigError, match=f"--ep {ep} does not fit: 16 experts"):
        models.split(16, ep=ep, experts_per_gpu=each)


@pytest.mark.parametrize("text", [None, "{", "{}", '{"n_routed_experts": 0}', "[]"])
def test_number_of_experts_must_be_said(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        models.num_experts(tmp_path)


def test_memory_counts_experts_once_and_the_rest_per_attention_worker(tmp_path):
    tensors = {
        "model.layers.1.mlp.experts.0.up_proj.weight": np.zeros((1024, 1024), np.int8),
        "lm_head.weight": np.zeros((1024, 512), np.int8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert preflight.checkpoint_elements(tmp_path) == (1 << 20, 1 << 19)
    config = cluster(tmp_path)
    weights = ((1 << 20) + 3 * (1 << 19)) * 4
    needed = weights + len(config.processes()) * preflight.WORKER_NBYTES
    preflight.check_memory(config, needed)
    with pytest.raises(ModelError, match="GiB of memory for 2 expert and 3 attention workers"):
        preflight.check_memory(config, needed - 1)


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 8, b"\x10\0\0\0\0\0\0\0{", b"\x02\0\0\0\0\0\0\0[]"]
)
def test_broken_safetensors_is_one_sentence(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        preflight.checkpoint_elements(tmp_path)


def test_host_that_is_not_here():
    with pytest.raises(ConfigError, match=r"cannot listen on port 9 of 192\.0\.2\.1"):
        preflight.check_port("192.0.2.1", 9)


def test_restart_delay_grows_with_quick_deaths_only():
    assert [restart_delay_s(n) for n in range(5)] == [0.0, 0.0, 0.1, 0.2, 0.4]
    assert restart_delay_s(50) == 5.0
    worker = Worker(ProcessSpec(ProcessId(Role.EXPERT, 3), 0, ""))
    for expected in (0.0, 0.1, 0.2):  # dies before it is ready
        worker.spawned(7)
        assert worker.ended(1.0) == expected
    worker.spawned(8)
    worker.ready(10.0)
    assert worker.state is WorkerState.READY
    assert worker.ended(13.0) == 0.0  # it had served
    assert (worker.pid, worker.num_starts) == (None, 4)


@pytest.mark.parametrize(
    ("line", "routine", "routine_while_stopping"),
    [
        ("12:00:00.000 INFO    atoll.x: fine", True, True),
        ("12:00:00.000 WARNING atoll.x: odd", False, True),
        ("12:00:00.000 ERROR   atoll.x: bad", False, False),
        ("Traceback (most recent call last):", False, False),
        ("", False, False),
    ],
)
def test_routine_lines(line, routine, routine_while_stopping):
    assert is_routine(line) is routine
    assert is_routine(line, stopping=True) is routine_while_stopping


def test_run_directory_must_be_private(tmp_path):
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match="must be yours alone"):
        open_run_dir(tmp_path)


def test_file_is_replaced_whole_and_private(tmp_path):
    write_atomically(tmp_path / "secret", "one")
    write_atomically(tmp_path / "secret", "two")
    assert (tmp_path / "secret").read_text() == "two"
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_cost_of_a_layer_is_the_difference_of_two_readings():
    def reading(**attention):
        routers = [{"role": "router", "counters": {"messages_out": 5 * attention["moe_blocks"]}}]
        return demo_report.totals(
            {"processes": [{"role": "attention", "counters": attention}, *routers]}
        )

    before = reading(moe_blocks=2, moe_round_trip_us=1000)
    after = reading(moe_blocks=4, moe_round_trip_us=5000, moe_compute_us=1000, owed={"a": 1})
    rows = dict(demo_report.cost_rows(before, after))
    assert rows["MoE layers run"] == "2"
    assert rows["messages sent by routers per layer"] == "5.0"
    assert rows["per layer: expert compute"] == "500 us"
    assert rows["per layer: wire (and everything not named here)"] == "1,500 us"
    assert demo_report.cost_rows(Counter(), Counter()) == [("MoE layers", "no counters")]
