"""The analysis of traces on made-up spans whose parts are known: sums, clocks, exposed time, replays."""

import itertools
import json
import random
from dataclasses import replace

import pytest

from common.config import local_cluster
from common.errors import ConfigError
from common.ids import Role
from common.obs.trace import Recorder, open_recorder
from deploy.trace.blocks import PARTS, ROUND_TRIP, blocks, by_layer
from deploy.trace.chrome import chrome_trace
from deploy.trace.intervals import intersect, subtract, total, union
from deploy.trace.overlap import last_steps, overlap, window_of
from deploy.trace.replay import Replay, Work
from deploy.trace.report import make_report
from deploy.trace.spans import Process, Span, align, parse, read

# one block: attention-0 on node 0; expert 0 on node 0 answers early, expert 1 on node 1 last
BLOCK, LAYER = 7, 2
ATTENTION = [
    ("attention", 0, 100), ("pack", 100, 110), ("shared", 110, 160), ("answer", 400, 400), ("add", 402, 410),
]  # fmt: skip
SOURCE = [("dispatch", 120, 140, 0), ("expert_out", 215, 216, 0), ("partial", 360, 380, 1)]
REMOTE = [("relay", 150, 165, 0), ("expert_out", 310, 330, 1)]
PARTS_NS = {
    "attention": 100, "pack": 10, "split": 20 + 15, "wire out": 175 - 110 - 35, "queue": 25,
    "compute": 100, "wire back": 400 - 300 - 40, "combine": 40, "shared": 50,
}  # fmt: skip


def span(name, start, end, count=0, *, block=BLOCK, layer=LAYER, lane=0):
    return Span(name, block, layer, lane, start, end, count)


def process(name, node, spans, host="a", dropped=0):
    return Process(name, node, host, tuple(spans), dropped)


def cluster(shift=0, host="a"):
    """The block above; node 1's clock is `shift` ahead."""
    processes = [
        process("attention-0", 0, [span(n, s, e, 4) for n, s, e in ATTENTION]),
        process("router-0", 0, [span(*s) for s in SOURCE]),
        process("expert-0", 0, [span("queue", 150, 152, 1), span("compute", 152, 200, 1)]),
    ]
    there = [
        process("router-1", 1, [span(*s) for s in REMOTE], host),
        process("expert-1", 1, [span("queue", 175, 200, 1), span("compute", 200, 300, 1)], host),
    ]
    moved = [
        replace(p, spans=tuple(replace(s, start=s.start + shift, end=s.end + shift) for s in p.spans))
        for p in there
    ]  # fmt: skip
    return processes + moved


def test_parts_follow_the_last_answer_and_sum_up_to_the_round_trip():
    (block,) = blocks(cluster())
    assert block.parts == PARTS_NS
    assert sum(block.parts[p] for p in ROUND_TRIP) == block.answered - block.posted == 290
    assert [c.worker for c in block.calls] == [0, 1]
    assert by_layer([block])[LAYER]["round trip"] == 0.29
    assert set(by_layer([block])[LAYER]) == {*PARTS, "round trip"}


def test_the_last_answer_from_the_own_node():
    processes = cluster()
    late = [
        span("dispatch", 120, 140),
        span("partial", 205, 206, 1),
        span("expert_out", 360, 380, 0),
    ]
    processes[1] = process("router-0", 0, late)
    (block,) = blocks(processes)
    assert block.parts["split"] == 20
    assert block.parts["compute"] == 48
    assert sum(block.parts[p] for p in ROUND_TRIP) == 290


def test_a_node_may_have_routers_that_each_have_blocks_of_their_own():
    other = process("router-2", 0, [span("dispatch", 500, 510, block=BLOCK + 1)])
    assert blocks([*cluster(), other]) == blocks(cluster()) != []


@pytest.mark.parametrize("missing", ["router-0", "router-1", "expert-1", "attention-0"])
def test_a_block_that_was_not_wholly_recorded_is_left_out(missing):
    assert blocks([p for p in cluster() if p.name != missing]) == []


@pytest.mark.parametrize("shift", [0, 10**9, -(10**12) - 1])
def test_clocks_of_two_hosts_are_joined_by_their_messages(shift):
    joined = align(cluster(shift, "b"))
    # smallest delays: 150 - 140 out and 360 - 330 back, so the two clocks are joined to within (10 + 30) / 2
    moved = joined[3].spans[0].start - 150
    assert abs(moved) <= 20
    (block,) = blocks(joined)
    assert sum(block.parts[p] for p in ROUND_TRIP) == 290
    assert block.parts["compute"] == 100


def test_a_host_that_nothing_joins_is_named():
    with pytest.raises(ConfigError, match="host lonely"):
        align([*cluster(), process("expert-9", 5, [], "lonely")])


def test_intervals_against_sets():
    rng = random.Random(3)
    for _ in range(300):
        sets, unions = [], []
        for _ in range(2):
            raw = [(s, s + rng.randrange(0, 9)) for s in rng.sample(range(40), rng.randrange(0, 7))]
            sets.append({x for s, e in raw for x in range(s, e)})
            unions.append(union(raw))
        a, b = unions
        for got, want in (
            (a, sets[0]),
            (intersect(a, b), sets[0] & sets[1]),
            (subtract(a, b), sets[0] - sets[1]),
        ):
            assert {x for s, e in got for x in range(s, e)} == want
            assert total(got) == len(want)
            assert all(p[1] < q[0] for p, q in itertools.pairwise(got))  # disjoint, joined


def test_exposed_is_what_neither_the_device_nor_an_expert_explains():
    processes = cluster()
    step = replace(span("step", 0, 500, 4), block=0, layer=0)
    o = overlap(processes[0], processes[2:3] + processes[4:5], blocks(processes), [step])
    # busy 0-160 and 402-410; experts owe 152-200 and 200-300 (queue 175-200: expert 1 does not compute yet)
    assert (o.busy, o.owed, o.exposed) == (168, 300 - 160, 500 - 168 - 140)
    assert o.exposed_percent == pytest.approx(100 * 192 / 500)


def test_a_queue_at_an_expert_that_computes_for_others_is_the_experts():
    processes = cluster()
    busy = process("expert-1", 1, [span("compute", 0, 200, 1, block=99), *processes[4].spans])
    step = replace(span("step", 0, 500, 4), block=0, layer=0)
    o = overlap(processes[0], [busy], blocks([*processes[:4], busy]), [step])
    assert o.owed == 300 - 175  # from arrival on; 160-175 is still the wire


def test_steps_looked_at_are_the_last_decode_steps_after_each_lanes_first():
    def step(lane, start, prompt=0):
        return Span("step", 0, prompt, lane, start, start + 10)

    spans = [
        step(0, 0, 16),
        step(1, 1),
        step(0, 10),
        step(1, 11),
        step(0, 20, 8),
        step(1, 21),
        step(0, 30),
    ]
    chosen = last_steps(process("attention-0", 0, spans), 3)
    assert [s.start for s in chosen] == [11, 21, 30]
    assert window_of(chosen) == (30, 31)


def work(before, compute, *, worker=0, after=0, out=0, back=0, split=0, combine=0):
    parts = dict.fromkeys(PARTS, 0)
    parts |= {"wire out": out, "wire back": back, "split": split, "combine": combine}
    (block,) = blocks(cluster())
    call = replace(block.calls[0], worker=worker, start=0, end=compute, shared_by=1)
    return Work(before, replace(block, parts=parts, calls=(call,)), after)


def test_a_replay_of_one_lane_is_the_sum_of_its_parts():
    lane = [work(10, 30, out=5, back=7, after=4, split=2, combine=1)] * 3
    assert Replay([lane], wire=True).run() == (3 * 55, 3 * (2 + 5 + 7 + 1 - 4))
    assert Replay([lane], wire=False).run() == (
        3 * 43,
        3 * 1,
    )  # the split is under the shared expert


def test_a_second_lane_computes_while_the_first_waits():
    lane = [work(10, 10)] * 4
    assert Replay([lane], wire=True).run()[0] == 80
    both, exposed = Replay([lane, [work(10, 10, worker=1)] * 4], wire=True).run()
    assert (both, exposed) == (
        90,
        0,
    )  # the device is busy but for the last answer, which an expert owes


def test_lanes_queue_at_the_device_and_at_an_expert():
    assert Replay([[work(10, 0)]] * 3, wire=True).run()[0] == 30
    assert Replay([[work(0, 10)]] * 3, wire=True).run()[0] == 30
    assert Replay([[Work(7)] * 2], wire=True).run() == (14, 0)


def test_the_report_says_the_same():
    processes = cluster()
    steps = [replace(span("step", s, e, 4), block=0, layer=0) for s, e in ((-500, -1), (-1, 500))]
    processes[0] = replace(processes[0], spans=(*processes[0].spans, *steps), dropped=3)
    report = make_report(processes, steps=5)
    row = report.to_json()["overlap"][0]
    assert report.num_blocks == 1
    assert row["microbatches"] == 1
    assert row["busy_percent"] + row["experts_owe_percent"] + row[
        "exposed_percent"
    ] == pytest.approx(100, abs=0.2)
    assert report.to_json()["median_us"]["compute"] == 0.1
    assert "3 older spans" in report.text()
    with pytest.raises(ValueError, match="no whole step"):
        make_report(cluster(), steps=5)


def test_chrome_trace_has_a_row_per_process_and_an_arrow_per_block():
    processes = cluster()
    events = chrome_trace(processes, blocks(processes))["traceEvents"]
    rows = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert rows == ["attention-0", "router-0", "router-1", "expert-0", "expert-1"]
    assert [e["ph"] for e in events if e["name"] == "block"] == ["s", "t", "t", "f"]
    assert sum(e["ph"] == "X" for e in events) == len(ATTENTION) + len(SOURCE) + len(REMOTE) + 2
    assert min(e["ts"] for e in events if "ts" in e) == 0


def test_the_ring_is_bounded_and_says_what_it_dropped(tmp_path):
    config = local_cluster(
        tmp_path,
        ep=1,
        nodes=1,
        attention=1,
        experts_per_gpu=1,
        microbatches=1,
        wire="fp8",
        port=0,
        run_dir=tmp_path,
    )
    spec = config.process(Role.ATTENTION, 0)
    assert open_recorder(config, spec) is None
    config = replace(config, cluster=replace(config.cluster, trace_events=3))
    recorder = open_recorder(config, spec)
    for i in range(5):
        recorder.span("pack", i, 0, 0, i, i + 1)
    recorder.write()
    (found,) = read(tmp_path / "trace")
    assert [s.block for s in found.spans] == [2, 3, 4]
    assert found.dropped == 2
    assert found == parse(recorder.to_json())
    Recorder(spec, 1).write()  # nowhere to write to


def test_files_that_are_no_traces_are_named(tmp_path):
    with pytest.raises(ConfigError, match="holds no trace"):
        read(tmp_path)
    (tmp_path / "x.json").write_text(json.dumps({"process": "router-0"}))
    with pytest.raises(ConfigError, match=r"x\.json is not a trace"):
        read(tmp_path)
