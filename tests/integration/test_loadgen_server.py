"""The load generator against a server that behaves in every way a server can."""

import asyncio
import json
import signal
import threading
from contextlib import contextmanager

import pytest
from aiohttp import web

from loadgen.cli import main
from loadgen.runner import Plan, Target, run_load
from loadgen.stats import State
from loadgen.workload import Lengths, Workload
from tests.gateway_fakes import gateway, make_config, run, write_model


def event(body):
    return b"data: " + json.dumps(body).encode() + b"\n\n"


CHUNK = event({"choices": [{"index": 0, "text": "x", "finish_reason": None}]})
LAST = event({"choices": [{"index": 0, "text": "x", "finish_reason": "length"}]})
DONE = b"data: [DONE]\n\n"
ERROR = event({"error": {"message": "worker lost"}})

BEHAVIOURS = {
    "whole": [CHUNK + CHUNK[:9], CHUNK[9:], LAST + DONE],
    "error-event": [CHUNK, ERROR],
    "silent-end": [CHUNK],
    "no-finish-reason": [CHUNK, DONE],
    "no-done": [CHUNK, LAST],
    "rubbish": [b"data: {\n\n"],
    "reset": [CHUNK, None],
    "hang": [CHUNK, "hang"],
    "refusal": 429,
}
EXPECTED = {
    "whole": State.FINISHED,
    "error-event": State.ERROR,
    "silent-end": State.TRUNCATED,
    "no-finish-reason": State.TRUNCATED,
    "no-done": State.TRUNCATED,
    "rubbish": State.TRUNCATED,
    "reset": State.TRUNCATED,
    "hang": State.TIMEOUT,
    "refusal": State.ERROR,
}


def make_server(behaviour):
    async def models(_):
        return web.json_response({"data": [{"id": "m"}]})

    async def completions(request):
        await request.read()
        script = BEHAVIOURS[behaviour]
        if isinstance(script, int):
            return web.json_response({"error": {"message": "full"}}, status=script)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for part in script:
            if part is None:
                request.transport.abort()
                return response
            if part == "hang":
                await asyncio.sleep(30)
            await response.write(part)
            await asyncio.sleep(0.002)
        return response

    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.post("/v1/completions", completions)])
    return app


@contextmanager
def served(behaviour):
    """The server in a thread of its own: the command line has the main one, for its signals."""
    started = threading.Event()
    found = {}

    async def serve():
        runner = web.AppRunner(
            make_server(behaviour), handler_cancellation=True, shutdown_timeout=0.1
        )
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        found.update(port=runner.addresses[0][1], stop=asyncio.Event())
        found["loop"] = asyncio.get_running_loop()
        started.set()
        await found["stop"].wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(5)
    try:
        yield f"http://127.0.0.1:{found['port']}"
    finally:
        found["loop"].call_soon_threadsafe(found["stop"].set)
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_every_way_a_request_can_end(tmp_path, capsys, behaviour):
    report = tmp_path / "report.json"
    with served(behaviour) as url:
        code = main(
            [
                url,
                "--requests",
                "3",
                "--concurrency",
                "2",
                "--timeout",
                "0.4",
                "--json",
                str(report),
            ]
        )
    expected = EXPECTED[behaviour]
    assert code == (0 if expected.is_terminal else 1)
    document = json.loads(report.read_text())
    assert document["summary"]["counts"][expected] == 3, document
    assert len(document["not_terminal"]) == (0 if expected.is_terminal else 3)
    captured = capsys.readouterr()
    assert "TTFT" in captured.out
    assert ("reached no end" in captured.err) is not expected.is_terminal


def test_errors_fail_the_run_only_when_asked(capsys):
    with served("refusal") as url:
        assert main([url, "--requests", "2"]) == 0
        assert main([url, "--requests", "2", "--fail-on-error"]) == 1
    assert "2 x error: HTTP 429: full" in capsys.readouterr().err


def test_an_interrupt_cancels_what_runs_and_reports(capsys):
    timer = threading.Timer(0.5, lambda: signal.raise_signal(signal.SIGINT))
    with served("hang") as url:
        timer.start()
        assert main([url, "--requests", "9", "--concurrency", "3"]) == 0
    assert "3 cancelled" in capsys.readouterr().out


@pytest.mark.parametrize(("concurrency", "rate"), [(4, 0.0), (0, 200.0)])
@pytest.mark.parametrize("chat", [False, True])
def test_against_the_gateway(tmp_path, concurrency, rate, chat):
    async def main():
        async with gateway(make_config(write_model(tmp_path / "model"))) as (_, cluster, service):
            cluster["attention-0"].step_s = cluster["attention-1"].step_s = 0.01
            words = "the quick brown fox" if chat else None
            load = Workload("tiny", chat, Lengths.parse("3-6"), Lengths.parse("5"), text=words)
            path = "v1/chat/completions" if chat else "v1/completions"
            target = Target(f"http://127.0.0.1:{service.port}/", path, {}, 10.0)
            plan = Plan(20, 0.0, concurrency, rate, seed=1)
            records = await run_load(target, plan, load.bodies(1), asyncio.Event())
            assert [r.state for r in records] == [State.FINISHED] * 20, records
            assert all(r.output_tokens == 5 and len(r.arrivals) <= 5 for r in records)
            seen = cluster["attention-0"].seen + cluster["attention-1"].seen
            assert sum(len(r.prompt_token_ids) for r in seen) == sum(
                r.prompt_tokens for r in records
            )
            assert len(cluster["attention-1"].seen) > 2  # both workers are used

    run(main())
