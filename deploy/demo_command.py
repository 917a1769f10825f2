"""Start a cluster (EP16, 2 nodes, 2 attention workers), stream a completion, show what it cost, stop.

example: atoll demo --max-tokens 64
"""

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from common.errors import ConfigError, Fatal
from deploy import demo_report, up_command
from deploy.local.supervisor import Options

HELP = "start a cluster, stream a completion, show figures"
DEFAULT_PROMPT = "Fellow-Citizens of the Senate and House of Representatives:"
# greedy text repeats itself; these are the demo model's generation_config.json, with a seed that makes a run repeatable
_SAMPLING = {"temperature": 0.85, "top_p": 0.92, "seed": 3}
_TIMEOUT_S = 120.0


@dataclass(slots=True)
class Stream:
    """What one streamed completion looked like to the client; times are seconds on a monotonic clock."""

    sent_at: float
    arrivals: list[float] = field(default_factory=list)
    num_tokens: int = 0
    is_whole: bool = False  # the server said why it ended

    @property
    def ttft_s(self) -> float:
        """Time to the first piece of text."""
        return self.arrivals[0] - self.sent_at

    @property
    def tpot_s(self) -> float:
        """Time per token after the first."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, self.num_tokens - 1)

    @property
    def tokens_per_s(self) -> float:
        """Tokens over the whole request."""
        return self.num_tokens / (self.arrivals[-1] - self.sent_at)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--prompt", default=DEFAULT_PROMPT, metavar="TEXT", help="what the model continues"
    )
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="how far (64)")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; 0 when the completion came whole."""
    if arguments.max_tokens < 1:
        raise ConfigError(f"--max-tokens must be at least 1, not {arguments.max_tokens}")
    up_parser = argparse.ArgumentParser()
    up_command.configure(up_parser)
    # one micro-batch: with a single request a second one would only wait
    cluster = up_parser.parse_args(["--ep", "16", "--port", "0", "--microbatches", "1"])
    show: Callable[[str], Awaitable[int]] = partial(
        _show, prompt=arguments.prompt, max_tokens=arguments.max_tokens
    )
    return up_command.launch(cluster, Options(), show)


async def _show(url: str, *, prompt: str, max_tokens: int) -> int:
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            return await _measure(url, prompt=prompt, max_tokens=max_tokens)
    except (OSError, TimeoutError, ValueError, KeyError, Fatal) as exc:
        print(f"\nthe demo failed: {type(exc).__name__}: {exc}")
        return 1


async def _measure(url: str, *, prompt: str, max_tokens: int) -> int:
    import aiohttp  # 200 ms that no other command needs

    async with aiohttp.ClientSession(url) as session:
        model = (await _get(session, "/v1/models"))["data"][0]["id"]
        body = {"model": model, "prompt": prompt} | _SAMPLING
        async with session.post("/v1/completions", json=body | {"max_tokens": 4}) as warm_up:
            await warm_up.read()
        before = demo_report.totals(await _get(session, "/cluster"))
        print(f"\n{prompt}", end="", flush=True)
        stream = await _stream(session, body | {"max_tokens": max_tokens})
        after = demo_report.totals(await _get(session, "/cluster"))
    print("\n")
    rows = [
        ("tokens", f"{stream.num_tokens}"),
        ("tokens/s", f"{stream.tokens_per_s:.1f}"),
        ("time to first token (TTFT)", f"{stream.ttft_s * 1e3:.1f} ms"),
        ("time per output token (TPOT)", f"{stream.tpot_s * 1e3:.1f} ms"),
    ]
    demo_report.show([*rows, *demo_report.cost_rows(before, after)])
    return 0 if stream.is_whole else 1


async def _get(session: Any, path: str) -> Any:  # noqa: ANN401  -- aiohttp is imported late
    async with session.get(path) as response:
        return await response.json()


async def _stream(session: Any, body: dict[str, Any]) -> Stream:  # noqa: ANN401
    """Print a completion as it comes. Raises Fatal when the server reports an error."""
    request = body | {"stream": True, "stream_options": {"include_usage": True}}
    stream = Stream(time.perf_counter())
    async with session.post("/v1/completions", json=request) as response:
        if response.status != 200:
            raise Fatal(f"HTTP {response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                raise Fatal(str(event["error"].get("message", event["error"])))
            if event.get("choices"):
                stream.arrivals.append(time.perf_counter())
                stream.is_whole |= event["choices"][0].get("finish_reason") is not None
                text = event["choices"][0].get("text", "")
                # random weights also write control characters, which a terminal would obey
                print(
                    "".join(c if c.isprintable() or c == "\n" else "·" for c in text),
                    end="",
                    flush=True,
                )
            if event.get("usage"):
                stream.num_tokens = event["usage"]["completion_tokens"]
    if not stream.arrivals:
        raise Fatal("the stream ended without a token")
    return stream
