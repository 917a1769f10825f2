"""Completions through a real HTTP server, with fake attention workers behind it."""

import asyncio

import aiohttp
import pytest

from common.request import FinishReason, TokenEvent
from tests.gateway_fakes import byte_tokenizer, gateway, make_config, run, sse, until, write_model


@pytest.fixture
def config(tmp_path):
    return make_config(write_model(tmp_path / "model"))


@pytest.fixture
def bare_config(tmp_path):
    return make_config(write_model(tmp_path / "model", tokenizer=False))


async def post(client, body, path="/v1/completions"):
    async with client.post(path, json=body) as response:
        return response.status, await response.json()


def test_token_ids_in_and_out_without_a_tokenizer(bare_config):
    async def main():
        async with gateway(bare_config) as (client, _, _):
            body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 4, "return_token_ids": True}
            status, answer = await post(client, body)
            assert status == 200, answer
            assert answer["choices"] == [
                {
                    "index": 0,
                    "text": "",
                    "logprobs": None,
                    "finish_reason": "length",
                    "token_ids": [7, 8, 9, 10],
                }
            ]
            assert answer["usage"] == {
                "prompt_tokens": 2,
                "completion_tokens": 4,
                "total_tokens": 6,
            }
            assert (answer["object"], answer["model"]) == ("text_completion", "tiny")

    run(main())


def test_text_prompt_and_text_answer(config):
    async def main():
        async with gateway(config) as (client, cluster, _):
            status, answer = await post(client, {"prompt": "abc", "temperature": 0, "seed": -3})
            assert status == 200, answer
            ids = byte_tokenizer().encode("abc").ids
            text = byte_tokenizer().decode([ids[-1] + 1 + i for i in range(16)])
            assert answer["choices"][0]["text"] == text
            assert answer["usage"]["completion_tokens"] == 16
            (request,) = cluster["attention-0"].seen
            assert request.prompt_token_ids == tuple(ids)
            assert request.sampling.temperature == 0
            assert request.sampling.seed == -3 & (2**63 - 1)

    run(main())


@pytest.mark.parametrize("usage", [False, True])
def test_stream_joins_to_the_whole_answer(config, usage):
    async def main():
        async with gateway(config) as (client, _, _):
            body = {"prompt": "th", "max_tokens": 40, "return_token_ids": True}
            _, whole = await post(client, body)
            streamed = body | {"stream": True}
            if usage:
                streamed["stream_options"] = {"include_usage": True}
            async with client.post("/v1/completions", json=streamed) as response:
                assert response.status == 200
                assert response.headers["Content-Type"].startswith("text/event-stream")
                events = await sse(response)
            assert events.pop() == "[DONE]"
            if usage:
                last = events.pop()
                assert (last["choices"], last["usage"]) == ([], whole["usage"])
                assert all(event["usage"] is None for event in events)
            choices = [event["choices"][0] for event in events]
            assert "".join(c["text"] for c in choices) == whole["choices"][0]["text"]
            ids = [t for c in choices for t in c["token_ids"]]
            assert ids == whole["choices"][0]["token_ids"]
            assert [c["finish_reason"] for c in choices][-2:] == [None, "length"]

    run(main())


def test_several_prompts_and_choices_are_indexed_prompt_by_prompt(config):
    async def main():
        async with gateway(config) as (client, cluster, _):
            body = {"prompt": [[1], [50, 51]], "n": 2, "max_tokens": 1, "return_token_ids": True}
            _, answer = await post(client, body | {"seed": 7})
            assert [c["token_ids"] for c in answer["choices"]] == [[2], [2], [52], [52]]
            assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
            assert answer["usage"]["prompt_tokens"] == 3
            seen = cluster["attention-0"].seen + cluster["attention-1"].seen
            assert sorted(r.sampling.seed for r in seen) == [7, 7, 8, 8]
            async with client.post("/v1/completions", json=body | {"stream": True}) as response:
                events = await sse(response)
            assert sorted(e["choices"][0]["index"] for e in events[:-1]) == [0, 1, 2, 3]

    run(main())


def test_stop_string_cuts_text_and_cancels_at_the_worker(config):
    async def main():
        async with gateway(config) as (client, cluster, _):
            body = {
                "prompt": "a",
                "max_tokens": 400,
                "stop": ["zz", "efg"],
                "return_token_ids": True,
            }
            cluster["attention-0"].step_s = 0.001
            _, answer = await post(client, body)
            (choice,) = answer["choices"]
            assert (choice["text"], choice["finish_reason"]) == ("bcd", "stop")
            assert len(choice["token_ids"]) == 6  # up to the one that completed the stop string
            assert answer["usage"]["completion_tokens"] == 6
            await until(lambda: len(cluster["attention-0"].cancelled) == 1)
            async with client.post("/v1/completions", json=body | {"stream": True}) as response:
                events = await sse(response)
            assert "".join(e["choices"][0]["text"] for e in events[:-1]) == "bcd"
            assert events[-2]["choices"][0]["finish_reason"] == "stop"

    run(main())


def test_echo_and_logprobs(config):
    async def main():
        async with gateway(config) as (client, _, _):
            body = {"prompt": "ab", "max_tokens": 2, "echo": True, "logprobs": 2}
            _, answer = await post(client, body)
            (choice,) = answer["choices"]
            assert choice["text"] == "abcd"
            assert choice["logprobs"]["tokens"] == ["a", "b", "c", "d"]
            assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5]
            assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
            assert choice["logprobs"]["top_logprobs"][3] == {"d": -0.5, "!": -2.0}
            _, answer = await post(client, body | {"max_tokens": 0, "logprobs": None})
            assert answer["choices"][0]["text"] == "ab"
            assert answer["usage"]["completion_tokens"] == 0

    run(main())


def test_models_health_ready_cluster_metrics(config):
    async def main():
        def prepare(cluster):
            experts = [
                {"role": "expert", "index": i, "node": 0, "pid": 70 + i, "state": "ready"}
                for i in (0, 1)
            ]
            cluster["router-0"].also = [e | {"counters": {"rows": 12}} for e in experts]
            cluster["router-1"].state = "starting"
            cluster["router-1"].missing = "not connected: expert-3"
            cluster["attention-1"].state = "starting"

        async with gateway(config, prepare) as (client, cluster, _):
            async with client.get("/v1/models") as response:
                (model,) = (await response.json())["data"]
                assert (model["id"], model["max_model_len"]) == ("tiny", 512)
            async with client.get("/v1/models/tiny") as response:
                assert (await response.json())["id"] == "tiny"
            async with client.get("/v1/models/other") as response:
                assert response.status == 404
            async with client.get("/health") as response:
                assert response.status == 200
            async with client.get("/ready") as response:
                assert response.status == 503
                sentence = (await response.json())["error"]["message"]
                assert sentence == "router-1 is starting (not connected: expert-3)"
            cluster["router-1"].state = "ready"  # not pushed: /ready asks
            async with client.get("/ready") as response:
                assert response.status == 200
            async with client.get("/cluster") as response:
                processes = {
                    (p["role"], p["index"]): p for p in (await response.json())["processes"]
                }
            assert len(processes) == len(config.processes())
            assert processes["expert", 1]["pid"] == 71
            assert processes["expert", 1]["counters"] == {"rows": 12}
            assert processes["expert", 3]["state"] == "starting"
            assert processes["attention", 1]["state"] == "starting"
            assert processes["gateway", 0]["state"] == "ready"
            async with client.get("/openapi.json") as response:
                paths = (await response.json())["paths"]
                assert "post" in paths["/v1/chat/completions"]
            await post(client, {"prompt": [1], "max_tokens": 3})
            async with client.get("/metrics") as response:
                text = await response.text()
            assert 'atoll_requests_total{outcome="finished"} 1.0' in text
            assert "atoll_generated_tokens_total 3.0" in text
            assert 'atoll_process_rows{index="1",role="expert"} 12.0' in text
            cluster["router-0"].kill()
            await until(lambda: cluster["router-0"].link.closed.is_set())
            async with client.get("/cluster") as response:
                states = {
                    (p["role"], p["index"]): p["state"]
                    for p in (await response.json())["processes"]
                }
            assert states["router", 0] == states["expert", 0] == "lost"

    run(main())


def test_a_silent_process_keeps_its_last_state_and_holds_nobody_up(config):
    async def main():
        async with gateway(config) as (client, cluster, _):
            async with client.get("/cluster") as response:
                assert (await response.json())["ready"]
            cluster["router-1"].silent = True
            async with asyncio.timeout(3), client.get("/cluster") as response:
                body = await response.json()
            assert body["ready"]

    run(main())


def test_disconnect_cancels_at_the_worker(config):
    async def main():
        async with gateway(config) as (client, cluster, _):
            worker = cluster["attention-0"]
            worker.step_s = 0.01
            for stream in (True, False):
                worker.cancelled.clear()
                body = {"prompt": [1], "max_tokens": 500, "stream": stream}
                call = asyncio.ensure_future(client.post("/v1/completions", json=body))
                await until(lambda: bool(worker.requests))
                if stream:
                    (await call).close()
                else:
                    call.cancel()
                await until(lambda: len(worker.cancelled) == 1)
                assert not worker.requests

    run(main())


def test_a_worker_lost_before_the_first_token_costs_nothing(config):
    async def main():
        async with gateway(config) as (client, cluster, _):
            cluster["attention-0"].step_s = None
            body = {"prompt": [1], "max_tokens": 2, "return_token_ids": True}
            call = asyncio.ensure_future(post(client, body))
            await until(lambda: bool(cluster["attention-0"].requests))
            cluster["attention-0"].kill()
            status, answer = await call
            assert (status, answer["choices"][0]["token_ids"]) == (200, [2, 3])
            assert len(cluster["attention-1"].seen) == 1

    run(main())


def test_the_only_worker_restarts_and_finishes(tmp_path):
    async def main():
        config = make_config(write_model(tmp_path / "model"), attention=1)
        async with gateway(config) as (client, cluster, _):
            worker = cluster["attention-0"]
            worker.step_s = None
            call = asyncio.ensure_future(post(client, {"prompt": [1], "max_tokens": 2}))
            await until(lambda: bool(worker.requests))
            worker.kill()
            await asyncio.sleep(0.05)
            worker.step_s = 0.0
            worker.up.set()
            assert (await call)[0] == 200

    run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_worker_lost_after_the_first_token_is_an_error_never_a_short_answer(config, stream):
    async def main():
        async with gateway(config) as (client, cluster, _):
            worker = cluster["attention-0"]
            worker.step_s = None
            body = {"prompt": [1], "max_tokens": 5, "stream": stream}
            call = asyncio.ensure_future(client.post("/v1/completions", json=body))
            await until(lambda: bool(worker.requests))
            worker.step(next(iter(worker.requests)))
            if stream:
                response = await call
                worker.kill()
                events = await sse(response)
                error = events[-1]["error"]
            else:
                worker.kill()
                response = await call
                assert response.status == 503
                error = (await response.json())["error"]
            assert error["message"] == (
                "attention-0 was lost after 1 tokens: send the request again"
            )
            assert error["code"] == "worker_failed"

    run(main())


def test_worker_errors(config):
    async def main():
        async with gateway(config) as (client, cluster, _):

            def refuse(request):
                return TokenEvent(request.id, finish_reason=FinishReason.ERROR, error="no pages")

            def busy(request):
                return TokenEvent(
                    request.id, finish_reason=FinishReason.ERROR, error="busy", retryable=True
                )

            cluster["attention-0"].on_submit = refuse
            status, answer = await post(client, {"prompt": [1], "stream": True})
            assert (status, answer["error"]["message"]) == (500, "no pages")
            for name in ("attention-0", "attention-1"):
                cluster[name].on_submit = busy
                cluster[name].seen.clear()
            status, answer = await post(client, {"prompt": [1]})
            assert (status, answer["error"]["message"]) == (503, "busy")
            assert sum(len(cluster[f"attention-{i}"].seen) for i in (0, 1)) == 5

    run(main())


def test_full_queue_is_429_and_order_is_first_come(tmp_path):
    async def main():
        config = make_config(
            write_model(tmp_path / "model"),
            attention=1,
            gateway={"max_queued": 1},
        )
        async with gateway(config) as (client, cluster, service):
            worker = cluster["attention-0"]
            worker.step_s = None
            body = {"prompt": [1], "n": 64, "max_tokens": 1}
            first = asyncio.ensure_future(post(client, body))
            await until(lambda: len(worker.requests) == 64)
            queued = asyncio.ensure_future(post(client, {"prompt": [9], "max_tokens": 1}))
            await until(lambda: "waiting 1/1" in repr(service._dispatcher))
            async with client.post("/v1/completions", json={"prompt": [3]}) as response:
                assert response.status == 429
                assert response.headers["Retry-After"] == "1"
                assert "at most 1 may" in (await response.json())["error"]["message"]
            for request_id in list(worker.requests):
                worker.step(request_id)
            await until(lambda: len(worker.requests) == 1)
            worker.step(next(iter(worker.requests)))
            assert [(await call)[0] for call in (first, queued)] == [200, 200]

    run(main())


def test_drain_finishes_what_runs_and_refuses_what_comes(config):
    async def main():
        async with gateway(config) as (client, cluster, service):
            cluster["attention-0"].step_s = 0.005
            call = asyncio.ensure_future(post(client, {"prompt": [1], "max_tokens": 20}))
            await until(lambda: bool(cluster["attention-0"].requests))
            drain = asyncio.ensure_future(service.drain())
            await asyncio.sleep(0)
            status, answer = await post(client, {"prompt": [1]})
            assert (status, answer["error"]["code"]) == (503, "draining")
            async with client.get("/ready") as response:
                assert response.status == 503
            assert (await call)[0] == 200
            await drain

    run(main())


def test_stop_ends_streams_with_an_error_event(config):
    async def main():
        async with gateway(config) as (client, cluster, service):
            cluster["attention-0"].step_s = 0.005
            body = {"prompt": [1], "max_tokens": 500, "stream": True}
            async with client.post("/v1/completions", json=body) as response:
                await service.stop()
                events = await sse(response)
            assert events[-1]["error"]["message"] == "the gateway is shutting down"

    run(main())


def test_malformed_frames_close_the_link_and_nothing_else(config):
    async def main():
        async with gateway(config) as (client, cluster, _):
            await until(lambda: cluster["attention-1"].link is not None)
            for frame in (
                {"type": "tokens"},
                {"type": "tokens", "events": [{"id": 3, "finish_reason": "because"}]},
                {"type": "status", "id": None, "processes": [{"role": "king"}]},
                {"type": "status", "id": None, "processes": 3},
                {"no": "type"},
                {"type": "submit"},
            ):
                link = cluster["attention-1"].link
                link.deliver(frame)
                assert link.closed.is_set(), frame
                await until(lambda link=link: cluster["attention-1"].link is not link)
            assert (await post(client, {"prompt": [1]}))[0] == 200

    run(main())


@pytest.mark.parametrize("fault", [TimeoutError, ZeroDivisionError])
def test_a_stream_that_cannot_go_on_is_cut_not_ended(config, monkeypatch, fault):
    """Whatever goes wrong inside a stream, the client sees a broken transfer and not a short answer."""

    async def main():
        async with gateway(config) as (client, cluster, _):
            worker = cluster["attention-0"]
            worker.step_s = None
            body = {"prompt": [1], "max_tokens": 5, "stream": True}
            call = asyncio.ensure_future(client.post("/v1/completions", json=body))
            await until(lambda: bool(worker.requests))
            worker.step(next(iter(worker.requests)))
            response = await call

            def fail(*_):
                raise fault

            monkeypatch.setattr("services.gateway.choices.Choice.advance", fail)
            worker.step(next(iter(worker.requests)))
            async with response:
                with pytest.raises(aiohttp.ClientPayloadError):
                    await sse(response)
            monkeypatch.undo()
            worker.step_s = 0.0
            assert (await post(client, {"prompt": [1]}))[0] == 200

    run(main())
