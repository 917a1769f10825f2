"""`atoll plan` writes what a cluster starts with; `atoll rebalance` says what the gateway answered, in words."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from common.config import load, local_cluster
from common.model.hf_config import load_config
from common.placement.plan import column_plan
from common.placement.routing_trace import RoutingTrace
from common.plan_file import cluster_plan, read_plan
from common.routing_trace_file import pack_trace
from deploy import cli
from tests.demo_model import MODEL

SCORE = {"link_s": 2e-6, "gpu_load": 1.5, "total_gpu_load": 1.25, "rows": 1.0, "unicast_rows": 1.0}
PLAN = column_plan(
    epoch=4, moe_layers=[1], num_experts=2, experts_per_gpu=1, nodes=(0, 0)
).to_json()
FOUND = {"moves": 7, "before": SCORE, "after": SCORE | {"gpu_load": 1.125}, "searched_s": 0.25}


@pytest.fixture
def files(tmp_path):
    config = local_cluster(
        MODEL, ep=18, nodes=3, attention=2, experts_per_gpu=1, microbatches=1, wire="fp32", port=0,
        run_dir=tmp_path / "run",
    )  # fmt: skip
    (tmp_path / "cluster.toml").write_text(config.to_toml())
    rng = np.random.default_rng(0)
    popular = np.linspace(0, 2, 16)  # the last are chosen more often
    noise = rng.gumbel(size=(5, 400, 16)) + popular
    ids = np.argsort(-noise, axis=2)[:, :, :4].astype(np.int16)
    layers = tuple(load_config(MODEL).moe_layers)
    (tmp_path / "trace.npz").write_bytes(pack_trace(RoutingTrace(ids, layers, 16)))
    (tmp_path / "other.npz").write_bytes(pack_trace(RoutingTrace(ids[:2], layers[:2], 16)))
    return tmp_path


def plan_command(files, *more, trace="trace.npz"):
    named = (
        "--cluster",
        files / "cluster.toml",
        "--trace",
        files / trace,
        "--out",
        files / "p.json",
    )
    return cli.main([str(word) for word in ("plan", *named, *more)])


def test_a_cluster_can_start_with_what_plan_wrote(files, capsys):
    assert plan_command(files, "--replicas", "2") == 0
    out = capsys.readouterr().out
    assert "5 layers | 80 experts | 10 replicas" in out
    plan = read_plan(files / "p.json")
    text = (
        (files / "cluster.toml")
        .read_text()
        .replace("[placement]\n", '[placement]\nplan = "p.json"\n')
    )
    (files / "cluster.toml").write_text(text)
    assert cluster_plan(load(files / "cluster.toml"), load_config(MODEL)) == plan


@pytest.mark.parametrize(
    ("more", "trace", "sentence"),
    [
        ((), "other.npz", "is of another model than"),
        (("--replicas", "9"), "trace.npz", "the cluster has 18"),
        (("--strict",), "trace.npz", "of the model per GPU"),
        ((), "missing.npz", "No such file"),
    ],
)
def test_what_plan_refuses(files, capsys, more, trace, sentence):
    assert plan_command(files, *more, trace=trace) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1


@contextmanager
def gateway(answers):
    """Answers each path with (status, JSON); what was asked is kept."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"null")
            asked.append((self.path, self.headers.get("Authorization"), body))
            status, answer = answers[self.path]
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def rebalance(url, *more):
    return cli.main(["rebalance", url, *map(str, more)])


def test_rebalance_says_what_was_done(tmp_path, capsys):
    (tmp_path / "keys").write_text("# mine\nfirst-key\nsecond-key\n")
    answers = {
        "/rebalance": (200, FOUND | {"epoch": 5, "served": [5], "took_s": 1.5}), "/plan": (200, PLAN)
    }  # fmt: skip
    with gateway(answers) as (url, asked):
        out = tmp_path / "plan.json"
        assert (
            rebalance(url, "--replicas", 3, "--api-key-file", tmp_path / "keys", "--out", out) == 0
        )
    assert capsys.readouterr().out.split("\n") == [
        "7 experts to load; found in 0.2 s",
        "  busiest link, us per token: 2.000 -> 2.000",
        "  busiest worker of a layer, over the mean: 1.500 -> 1.125",
        "  busiest worker of all layers, over the mean: 1.250 -> 1.250",
        "epoch 5 is in force after 1.5 s",
        "",
    ]
    assert asked[0] == ("/rebalance", "Bearer first-key", {"dry_run": False, "replicas": 3})
    assert read_plan(out).epoch == 4


def test_a_process_that_is_missing_is_mentioned(capsys):
    answers = {"/rebalance": (200, {"epoch": 5, "served": [4, 5], "took_s": 1.5})}
    with gateway(answers) as (url, _):
        assert rebalance(url) == 0
    assert "weights of the plan before are still held" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "answer", "code", "sentence"),
    [
        (
            503,
            {"error": {"message": "epoch 2 was given up, epoch 1 stays: why"}},
            1,
            "epoch 1 stays: why",
        ),
        (400, {"error": {"message": "the plan is for 3 workers"}}, 2, "the plan is for 3 workers"),
        (404, b"<html>", 2, "HTTP 404"),
        (200, b"<html>", 1, "Expecting value"),
        (200, [1], 1, "did not answer as a gateway does"),
    ],
)
def test_what_went_wrong_is_one_sentence(capsys, status, answer, code, sentence):
    with gateway({"/rebalance": (status, answer)}) as (url, _):
        assert rebalance(url) == code
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1


def test_nobody_is_there(capsys):
    assert rebalance("http://127.0.0.1:9") == 1
    assert "refused" in capsys.readouterr().err
