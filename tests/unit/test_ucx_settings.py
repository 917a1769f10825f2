"""The UCX variables that a cluster over RDMA gets, as text against UCX's own documentation of every variable and value.

No RDMA device is needed: `ucx_info -caf` prints the documentation of the UCX that ucxx uses.
"""

import functools
import os
import re
import subprocess
from pathlib import Path

import libucx
import pytest

from common import config as cluster_config
from deploy.render.description import describe

UCX = Path(libucx.__file__).parent
ROOT = Path(__file__).parents[2]
CLUSTER = """\
[cluster]
device = "{device}"
[model]
path = "/srv/model"
[[nodes]]
host = "a"
attention = 2
experts = 6
routers = 2
rails = ["mlx5_0:1", "mlx5_1:1"]
gpus = 8
[[nodes]]
host = "b"
experts = 7
gpus = 8
"""
# explicit names, beside the aliases that UCX lists: https://openucx.readthedocs.io/en/master/faq.html
TRANSPORTS = {"self", "posix", "sysv", "cma", "cuda_copy", "cuda_ipc"}
_SIZE = re.compile(r"\d+(b|kb|mb|gb|k|m|g)?|inf|auto")
_TIME = re.compile(r"\d+(\.\d+)?(m|s|ms|us|ns)?|inf|auto")


@functools.cache
def documentation():
    """Variable -> (text, syntax), of those inherited from as well."""
    done = subprocess.run(
        [UCX / "bin/ucx_info", "-caf"],
        env={"LD_LIBRARY_PATH": str(UCX / "lib"), "PATH": os.environ["PATH"]},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found, comment = {}, []
    for line in done.stdout.splitlines():
        if line.startswith("#"):
            comment.append(line.removeprefix("#").strip())
        elif "=" in line:
            text = "\n".join(comment)
            syntax = re.search(r"^syntax:\s*(.*)$", text, re.MULTILINE)[1]
            names = re.findall(r"^inherits:\s*(\S+)$", text, re.MULTILINE)
            for name in (line.partition("=")[0], *names):
                found.setdefault(name, (text, syntax))
            comment = []
        else:
            comment = []
    return found


def problem(name, value):
    """What is wrong with a setting, None if nothing is."""
    if name not in documentation():
        return "UCX has no such variable"
    text, syntax = documentation()[name]
    if name == "UCX_TLS":
        aliases = {
            a for names in re.findall(r"^- (\S+)\s*:", text, re.MULTILINE) for a in names.split("/")
        }
        unknown = set(value.removeprefix("^").split(",")) - aliases - TRANSPORTS
        return f"no transports of UCX: {unknown}" if unknown else None
    if name == "UCX_NET_DEVICES":
        ports = value.split(",")
        return None if all(re.fullmatch(r"lo|\w+:\d+", p) for p in ports) else "no DEVICE:PORT"
    legal = {
        "<y|n>": lambda: value in ("y", "n"),
        "time value": lambda: _TIME.fullmatch(value),
        "memory units": lambda: _SIZE.fullmatch(value),
        "comma-separated list of value or key:value": lambda: _SIZE.fullmatch(value),
        "[": lambda: value.upper() in syntax.strip("[]").split("|"),
    }
    check = next((legal[start] for start in legal if syntax.startswith(start)), None)
    if check is None:
        return f"a syntax that this test does not know: {syntax}"
    return None if check() else f"{value!r} is not {syntax}"


def environments(tmp_path, device="cuda"):
    path = tmp_path / "cluster.toml"
    path.write_text(CLUSTER.format(device=device))
    hosts = describe(cluster_config.load(path)).hosts
    return {str(p.id): dict(p.environment) for host in hosts for p in host.processes}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "cluster", ["rails", *sorted((ROOT / "deploy/clusters").glob("*.toml"))], ids=str
)
def test_every_variable_and_value_is_ucxs_own(cluster, device, tmp_path):
    if cluster == "rails":
        found = environments(tmp_path, device)
    else:
        hosts = describe(cluster_config.load(cluster)).hosts
        found = {str(p.id): dict(p.environment) for host in hosts for p in host.processes}
    settings = {(k, v) for env in found.values() for k, v in env.items() if k.startswith("UCX_")}
    assert len(settings) >= 5
    assert [(k, v, why) for k, v in settings if (why := problem(k, v))] == []


def test_each_rail_is_bound_to_its_nic_and_nobody_else_is(tmp_path):
    found = environments(tmp_path)
    bound = {
        name: env["UCX_NET_DEVICES"] for name, env in found.items() if "UCX_NET_DEVICES" in env
    }
    assert bound == {"router-0": "mlx5_0:1", "router-1": "mlx5_1:1"}


def test_across_hosts_rdma_and_gpudirect_are_left_to_ucx(tmp_path):
    """UCX takes the fastest of what is not forbidden: rc and cuda_ipc are allowed, GPUDirect is at its default."""
    for name, environment in environments(tmp_path).items():
        ucx = {k: v for k, v in environment.items() if k.startswith("UCX_")}
        if name.startswith("gateway"):
            assert ucx == {}
            continue
        assert ucx["UCX_TLS"] == "^sm"  # all but the shared receive queue
        assert not any(word in k for k in ucx for word in ("IB_", "CUDA", "GPU", "REG"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("UCX_TLS", "tcp,selff"),
        ("UCX_KEEPALIVE_INTERVAL", "soon"),
        ("UCX_KEEP_ALIVE", "1s"),
        ("UCX_RNDV_THRESH", "256kk"),
        ("UCX_MM_ERROR_HANDLING", "yes"),
        ("UCX_LOG_LEVEL", "none"),
        ("UCX_NET_DEVICES", "mlx5 0"),
    ],
)
def test_a_wrong_setting_is_noticed(name, value):
    assert problem(name, value)
