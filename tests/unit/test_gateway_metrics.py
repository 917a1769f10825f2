"""What the gateway exports of others is bounded and never breaks the page."""

from services.gateway.metrics import GatewayMetrics, process_metrics


def entry(counters, *, role="expert", index=0, state="ready"):
    return {"role": role, "index": index, "state": state, "counters": counters}


def samples(processes):
    return {
        (sample.name, sample.labels["role"], sample.labels["index"]): sample.value
        for metric in process_metrics(processes)
        for sample in metric.samples
    }


def test_counters_get_role_and_index():
    found = samples(
        [entry({"rows": 3}), entry({"rows": 4.5}, index=1, state="lost"), entry({}, role="router")]
    )
    assert found == {
        ("atoll_process_rows", "expert", "0"): 3.0,
        ("atoll_process_rows", "expert", "1"): 4.5,
        ("atoll_process_ready", "expert", "0"): 1.0,
        ("atoll_process_ready", "expert", "1"): 0.0,
        ("atoll_process_ready", "router", "0"): 1.0,
    }


def test_what_is_no_number_or_no_name_is_left_out():
    bad = {"a b": 1, "": 2, "Ä": 3, "x" * 65: 4, "nested": {"a": 1}, "flag": True, "text": "5"}
    assert samples([entry(bad)]) == {("atoll_process_ready", "expert", "0"): 1.0}


def test_the_number_of_names_is_bounded():
    assert len(samples([entry({f"c{i}": i for i in range(1000)})])) == 64 + 1


def test_two_gateways_of_a_process_do_not_meet():
    first, second = GatewayMetrics(), GatewayMetrics()
    first.prompt_tokens.inc()
    assert b"atoll_prompt_tokens_total 1.0" in first.render()
    assert b"atoll_prompt_tokens_total 0.0" in second.render()


def test_the_page_is_read_at_collection_time():
    metrics = GatewayMetrics()
    running = []
    metrics.watch(running=lambda: len(running), queued=lambda: 2, outstanding=lambda: {0: 30})
    metrics.export_processes(lambda: [entry({"rows": 1})])
    running.append(1)
    page = metrics.render().decode()
    for line in (
        "atoll_requests_running 1.0",
        "atoll_requests_queued 2.0",
        'atoll_outstanding_tokens{worker="0"} 30.0',
        'atoll_process_rows{index="0",role="expert"} 1.0',
    ):
        assert line in page
