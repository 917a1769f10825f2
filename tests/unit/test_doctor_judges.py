"""What the doctor says of facts: a healthy host is all ok, and every complaint it can make is made for its fault."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from common import config as cluster_config
from common.errors import WireError
from common.transport.carriers import LinkClass
from deploy.doctor import facts, judge_cluster, judge_devices, judge_host
from deploy.doctor.finding import Level
from deploy.doctor.judge_cluster import Visit
from deploy.doctor.need import need_of
from deploy.doctor.pci import Distance, distance
from tests.doctor_facts import CPU_NEED, GPU_NEED, cpu_host, gpu_host, nic, switch, transfer

ROOT = Path(__file__).parents[2]
CLUSTERS = sorted((ROOT / "deploy/clusters").glob("*.toml"))
BAD, WARN = Level.FAILURE, Level.WARNING


def judged(host, need):
    return [*judge_host.judge(host, need), *judge_devices.judge(host, need)]


def complaints(findings):
    return [(f.check, f.level, f.text) for f in findings if f.level is not Level.OK]


@pytest.mark.parametrize(("host", "need"), [(cpu_host(), CPU_NEED), (gpu_host(), GPU_NEED)])
def test_a_healthy_host_has_nothing_wrong(host, need):
    findings = judged(host, need)
    assert complaints(findings) == []
    assert all(not f.fix for f in findings)


@pytest.mark.parametrize(
    ("holder", "ours"),
    [
        ("/opt/atoll/bin/python3 /opt/atoll/bin/atoll run router --cluster c.toml --index 0", True),
        ("atoll up --port 8000", True),
        ("/home/me/atoll/.venv/bin/python3 -m deploy.local.zygote 8 /tmp/run", True),
        ("python3 -m services.router --cluster c.toml", True),
        ("/home/me/atoll/.venv/bin/python -m http.server", False),
        ("nginx -c /srv/atoll/nginx.conf", False),
        ("vim atoll update.txt", False),
        ("", False),
    ],
)
def test_a_port_is_in_order_only_when_the_cluster_itself_has_it(holder, ours):
    ports = (facts.Port(10000, "router-0", False, holder),)
    found = judged(replace(cpu_host(), ports=ports), CPU_NEED)
    levels = {f.level for f in found if f.check == "ports"}
    assert levels == ({Level.OK} if ours else {BAD})


def test_mps_that_starts_with_the_cluster_need_not_run_before():
    findings = judged(gpus("nvidia", mps_is_running=False), replace(GPU_NEED, starts_mps=True))
    assert complaints(findings) == []


def host(part, **changes):
    """A fault in one part of the CPU host."""
    whole = cpu_host()
    return replace(whole, **{part: replace(getattr(whole, part), **changes)})


def gpus(part, **changes):
    """The same on the GPU host."""
    whole = gpu_host()
    return replace(whole, **{part: replace(getattr(whole, part), **changes)})


def moved(place, **changes):
    """The GPU host with a NIC that is changed."""
    return replace(gpu_host(), nics=(replace(nic(0), **changes), *gpu_host().nics[1:]))


def slow(link_class, gb_per_s, *, on=gpu_host, **changes):
    """A measured transfer that is something else."""
    whole = on()
    wrong = tuple(
        replace(t, gb_per_s=gb_per_s, **changes) if t.link_class is link_class else t
        for t in whole.transfers
    )
    return replace(whole, transfers=wrong[: len(cpu_host().transfers) + 2])


TAKEN = (facts.Port(10000, "router-0", False, "nginx -g daemon"),)
FAR = replace(gpu_host().nvidia.gpus[0], pci_path="/sys/devices/pci0000:70/0000:70:01.0")
NO_IB = {"has_ib_module": False, "resources": ("tcp/eth0", "cuda_ipc/cuda")}
STORY = [
    (host("software", python="3.10.1"), CPU_NEED, "python", BAD, "needed is 3.11"),
    (host("software", compiles=False), CPU_NEED, "compiler", WARN, "no C compiler"),
    (host("software", python="3.14.0"), CPU_NEED, "python", BAD, "below 3.14"),
    (host("software", packages={"torch": ""}), CPU_NEED, "packages", BAD, "torch not installed"),
    (host("software", torch_problem="undefined symbol"), CPU_NEED, "torch", BAD, "undefined symbol"),
    (host("ucx", problem="libucp.so: cannot open"), CPU_NEED, "ucx", BAD, "cannot open"),
    (host("ucx", version="1.13.1"), CPU_NEED, "ucx", BAD, "1.19 or later"),
    (host("ucx", resources=("self/memory",)), CPU_NEED, "ucx", BAD, "no tcp"),
    (gpus("ucx", **NO_IB), GPU_NEED, "ucx verbs", BAD, "no verbs"),
    (gpus("ucx", **NO_IB), replace(GPU_NEED, leaves_host=False), "ucx verbs", WARN, "no verbs"),
    (gpus("ucx", resources=NO_IB["resources"]), GPU_NEED, "ucx verbs", BAD, "finds no device"),
    (gpus("ucx", resources=("tcp/eth0", "rc_v/x")), GPU_NEED, "ucx cuda", BAD, "no cuda_ipc"),
    (host("limits", nofile=100), CPU_NEED, "fd limit", BAD, "128 are needed"),
    (host("limits", nofile=100, nofile_hard=100), CPU_NEED, "fd limit", BAD, "128 are needed"),
    (gpus("limits", memlock_nbytes=8 << 20), GPU_NEED, "memlock", BAD, "8 MiB may be locked"),
    (replace(cpu_host(), ports=TAKEN), CPU_NEED, "ports", BAD, "in use by nginx"),
    (replace(cpu_host(), ports=(replace(TAKEN[0], problem="denied"),)), CPU_NEED, "ports", BAD, "denied"),
    (replace(cpu_host(), ephemeral_ports=(9000, 60000)), CPU_NEED, "ports", WARN, "10000 lie in 9000"),
    (host("clock", is_synchronised=False), CPU_NEED, "clock", WARN, "not synchronised"),
    (host("clock", max_error_s=4.0), CPU_NEED, "clock", WARN, "4.0 s only"),
    (host("secret", mode=0o644), CPU_NEED, "secret", BAD, "mode 0644"),
    (host("secret", nbytes=3), CPU_NEED, "secret", BAD, "3 bytes"),
    (host("secret", problem="No such file"), CPU_NEED, "secret", BAD, "No such file"),
    (host("secret", problem="Permission denied"), CPU_NEED, "secret", BAD, "Permission denied"),
    (host("model", problem="x is truncated"), CPU_NEED, "checkpoint", BAD, "truncated"),
    (host("model", wrong=("a.safetensors",)), CPU_NEED, "checkpoint", BAD, "a.safetensors of"),
    (host("model", reference=""), CPU_NEED, "checkpoint", WARN, "no hashes"),
    (host("model", unhashed=("a", "b")), CPU_NEED, "checkpoint", WARN, "2 files were not hashed"),
    (replace(gpu_host(), nvidia=facts.Nvidia(problem="Driver Not Loaded"), transfers=()), GPU_NEED,
     "driver", BAD, "Driver Not Loaded"),
    (gpus("software", torch_cuda=""), GPU_NEED, "driver", BAD, "without CUDA"),
    (gpus("software", torch_cuda=""), replace(GPU_NEED, device="cpu"), "driver", WARN, "without CUDA"),
    (gpus("nvidia", cuda="12.4"), GPU_NEED, "driver", BAD, "torch is built for CUDA 13.0"),
    (gpus("software", torch_sees_gpu=False), GPU_NEED, "driver", BAD, "torch sees no GPU"),
    (gpus("nvidia", gpus=gpu_host().nvidia.gpus[:4]), GPU_NEED, "gpus", BAD, "on 8 here"),
    (gpus("nvidia", mps_is_running=False, gpus=(replace(FAR, used_nbytes=9 << 30),) * 8),
     GPU_NEED, "gpus", WARN, "9.0 GiB are in use"),
    (gpus("nvidia", pairs=(facts.GpuPair(0, 1, "not supported"),)), GPU_NEED, "peer access", BAD,
     "GPU 0 and 1: not supported"),
    (gpus("nvidia", mps_is_running=False), GPU_NEED, "mps", WARN, "does not run"),
    (gpus("nvidia", mps_is_running=False, mps_control=""), GPU_NEED, "mps", BAD, "not installed"),
    (gpus("nvidia", mps_is_running=False, gpus=(replace(FAR, is_exclusive=True),) * 8),
     GPU_NEED, "mps", BAD, "allows one process"),
    (moved(0, is_active=False), GPU_NEED, "nic", WARN, "mlx5_0:1 is not active"),
    (moved(0, pci_path="/sys/devices/pci0000:00/0000:00:09.0"), GPU_NEED, "nic", WARN, "PHB to GPU 0"),
    (replace(cpu_host(), nics=()), CPU_NEED, "nic", BAD, "no network device"),
    (replace(gpu_host(), nics=(facts.Nic("eth0"),)), GPU_NEED, "gpudirect", WARN, "no active RDMA"),
    (gpus("nvidia", has_peermem=False), GPU_NEED, "gpudirect", BAD, "neither nvidia-peermem"),
    (slow(LinkClass.SELF, 0.5), GPU_NEED, "transfer self", WARN, "at least 1 of the 10"),
    (slow(LinkClass.SHM, 0.05), GPU_NEED, "transfer shm", BAD, "at least 1 of the 10"),
    (slow(LinkClass.SHM, 0.05, cpu_share=0.4), GPU_NEED, "transfer shm", WARN, "got 40% of a core"),
    (slow(LinkClass.TCP, 0.2), GPU_NEED, "transfer tcp", WARN, "at least 0.5 of the 2"),
    (slow(LinkClass.CUDA_IPC, 0.5), GPU_NEED, "transfer cuda_ipc", BAD, "at least 180 of the 450"),
    (slow(LinkClass.CUDA_IPC, 340.0, carriers=("tcp/lo",)), GPU_NEED, "transfer cuda_ipc", BAD,
     "not what was asked for"),
    (slow(LinkClass.RDMA, 20.0), GPU_NEED, "transfer rdma", WARN, "at least 30 of the 50"),
    (slow(LinkClass.TCP, 0.0, problem="Destination is unreachable"), GPU_NEED, "transfer tcp", BAD,
     "unreachable"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("broken", "need", "check", "level", "words"),
    [pytest.param(*row, id=f"{row[2]}-{row[4]}") for row in STORY],
)
def test_a_fault_is_found_named_and_given_a_repair(broken, need, check, level, words):
    found = [f for f in judged(broken, need) if (f.check, f.level) == (check, level)]
    assert any(words in f.text for f in found), judged(broken, need)
    assert all(f.fix for f in found)


def visits(**second):
    """Two hosts alike but for what is said of the second."""
    changed = {"name": "b"} | {k: v for k, v in second.items() if k not in ("skew_s", "problem")}
    if "problem" in second:
        return [Visit("a", cpu_host()), Visit("b", None, second["problem"], "ssh b true")]
    skew_s = second.get("skew_s", 0.05)
    return [
        Visit("a", cpu_host(), uncertainty_s=0.1),
        Visit("b", replace(cpu_host(), **changed), skew_s=skew_s, uncertainty_s=0.1),
    ]


def test_hosts_alike_have_nothing_wrong():
    good = transfer(LinkClass.TCP, 1.0, "tcp/eth0", "a to b")
    findings = judge_cluster.judge(visits(), [good])
    assert complaints(findings) == []
    checks = {f.check for f in findings}
    assert checks >= {"reached", "clock skew", "versions", "secrets", "checkpoints", "transfer tcp"}


@pytest.mark.parametrize(
    ("second", "check", "level", "words"),
    [
        ({"problem": "Connection refused"}, "reached", BAD, "b: Connection refused"),
        ({"skew_s": 2.0}, "clock skew", WARN, "b and a are 2.00 s apart"),
        ({"skew_s": -40.0}, "clock skew", BAD, "a and b are 40.00 s apart"),
        ({"software": facts.Software("3.12.1", {"torch": "2.12"})}, "versions", BAD, "torch 2.12"),
        ({"secret": facts.Secret("/s", 0o600, 64, "other")}, "secrets", BAD, "between a and b"),
        ({"model": facts.Model("/m", digest="other")}, "checkpoints", BAD, "between a and b"),
        ({"installed_toml": "other"}, "installed TOML", BAD, "between a and b"),
    ],
)
def test_what_differs_between_hosts_is_found(second, check, level, words):
    (found,) = [f for f in judge_cluster.judge(visits(**second), []) if f.check == check]
    assert found.level is level
    assert words in found.text
    assert found.fix


def test_a_slow_link_between_hosts_is_held_against_the_slower_nic():
    measured = transfer(LinkClass.TCP, 0.02, "tcp/eth0", "a to b")
    (found,) = [f for f in judge_cluster.judge(visits(), [measured]) if "transfer" in f.check]
    assert (found.level, "of the 1.25 of the NIC" in found.text) == (BAD, True)


def test_a_skew_that_the_network_may_explain_is_none():
    late = [Visit("a", cpu_host()), Visit("b", cpu_host(), skew_s=-2.0, uncertainty_s=1.6)]
    assert complaints(judge_cluster.judge(late, [])) == []


def test_every_complaint_in_the_judges_is_made_by_a_test_above():
    """Every `failure(...)` or `warning(...)` with a check by name has a row in STORY."""
    made = {(check, level) for _, _, check, level, _ in STORY}
    made |= {("clock skew", WARN), ("clock skew", BAD), ("reached", BAD)}
    written = set()
    for module in (judge_host, judge_devices, judge_cluster):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                name = node.func.id
                if name in ("failure", "warning") and isinstance(node.args[0], ast.Constant):
                    written.add((node.args[0].value, Level(name)))
    assert len(written) > 20
    assert written <= made


def test_distance_between_devices():
    card, near = f"{switch(0)}/0000:02:00.0/0000:03:00.0", f"{switch(0)}/0000:02:01.0/0000:04:00.0"
    assert distance(card, near, same_numa=True) is Distance.PIX
    deeper = f"{switch(0)}/0000:02:01.0/0000:04:00.0/0000:05:00.0/0000:06:00.0"
    assert distance(card, deeper, same_numa=True) is Distance.PXB
    assert distance(card, f"{switch(1)}/0000:12:00.0/0000:13:00.0", same_numa=True) is Distance.PHB
    assert distance(card, switch(4), same_numa=True) is Distance.NODE
    assert distance(card, switch(4), same_numa=False) is Distance.SYS
    assert distance(card, "", same_numa=True) is None
    assert distance(card, "/sys/devices/virtual/net/veth0", same_numa=True) is None


def test_the_supported_pythons_are_those_of_pyproject():
    low, high = (f"{major}.{minor}" for major, minor in judge_host.PYTHONS)
    assert f'requires-python = ">={low},<{high}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_what_a_cluster_needs_of_its_hosts(path):
    config = cluster_config.load(path)
    for node in config.nodes:
        need = need_of(config, node.host, in_job=False)
        assert need.num_fds > 20 + 3 * node.experts
        assert {name for _, name in need.ports} <= {str(spec.id) for spec in config.processes()}
    job = need_of(config, config.nodes[0].host, in_job=True)
    assert job.ports == ()


def test_facts_travel_as_json_and_others_are_refused():
    for whole in (cpu_host(), gpu_host()):
        assert facts.from_json(facts.to_json(whole)) == whole
    with pytest.raises(WireError, match="software"):
        facts.from_json('{"name": "a"}')
