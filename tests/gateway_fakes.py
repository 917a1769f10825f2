"""A cluster of fake peers for the gateway: attention workers that count upwards, routers that are simply there."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from blockbuster import blockbuster_ctx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from common import config as cluster_config
from common.config import ClusterConfig
from common.errors import LinkClosed
from common.ids import ProcessId, Role
from common.request import FinishReason, Request, TokenEvent, tokens_frame
from common.transport.base import Handler, Hello
from services.gateway.service import GatewayService

VOCAB = 300
CONTEXT = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def run(main: Coroutine[Any, Any, None]) -> None:
    """A test's body, on the loop the service uses."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


def byte_tokenizer() -> Tokenizer:
    """256 byte tokens (id = position in the alphabet's order), one merge and a special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"th": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def write_model(directory: Path, *, tokenizer: bool = True, template: bool = True) -> Path:
    """What the gateway reads of a checkpoint."""
    directory.mkdir(exist_ok=True)
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT}
    (directory / "config.json").write_text(json.dumps(sizes))
    if tokenizer:
        byte_tokenizer().save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {"eos_token": {"content": "<eos>"}}
    if template:
        settings["chat_template"] = CHAT_TEMPLATE
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def make_config(model: Path, *, attention: int = 2, **sections: dict[str, Any]) -> ClusterConfig:
    """Two nodes with a router and experts each, attention workers on the first."""
    document = {
        "cluster": {"run_dir": str(model.parent)},
        "model": {"path": str(model), "served_name": "tiny"},
        "gateway": {"port": 0} | sections.pop("gateway", {}),
        "nodes": [{"attention": attention, "experts": 2}, {"attention": 0, "experts": 2}],
        **sections,
    }
    return cluster_config.parse(document, source="test")


class FakeLink:
    """The gateway's end of a link to a `FakePeer`."""

    def __init__(self, peer: "FakePeer", handler: Handler) -> None:
        self.peer = Hello(peer.id, peer.node, peer.pid, "m", 1, "fp32", data=False)
        self.handler = handler
        self.closed = asyncio.Event()
        self._far = peer

    def send_control(self, message: dict[str, Any]) -> None:
        if self.closed.is_set():
            raise LinkClosed("closed")
        asyncio.get_running_loop().call_soon(
            self._far.on_control, self, json.loads(json.dumps(message))
        )

    def post(self, header: object, payload: object = None, *, landing: object = None) -> None:
        raise AssertionError("the gateway never posts data")

    def close(self, reason: str) -> None:
        if not self.closed.is_set():
            self.closed.set()
            asyncio.get_running_loop().call_soon(self.handler.on_close, self, LinkClosed(reason))

    def deliver(self, message: dict[str, Any]) -> None:
        if not self.closed.is_set():
            self.handler.on_control(self, json.loads(json.dumps(message)))


class FakePeer:
    """A process the gateway dials. Workers answer token t with t + 1; `step_s` None: only when `step` is called."""

    def __init__(self, id_: ProcessId, node: int, *, step_s: float | None = 0.0) -> None:
        self.id, self.node, self.pid = id_, node, 100 + 10 * id_.index
        self.step_s = step_s
        self.state = "ready"
        self.counters: dict[str, Any] = {}
        self.missing = ""
        self.also: list[dict[str, Any]] = []  # processes it reports beside itself
        self.up = asyncio.Event()
        self.up.set()
        self.silent = False  # a process that is stopped: its socket is open and nobody answers
        self.link: FakeLink | None = None
        self.requests: dict[str, tuple[Request, int]] = {}
        self.seen: list[Request] = []
        self.cancelled: list[str] = []
        self.on_submit: Callable[[Request], TokenEvent | None] = lambda _: None

    def on_control(self, link: FakeLink, message: dict[str, Any]) -> None:
        if self.silent or link.closed.is_set():
            return
        match message["type"]:
            case "status_request":
                self.report(message["id"])
            case "submit":
                request = Request.from_json(message)
                self.seen.append(request)
                if (answer := self.on_submit(request)) is not None:
                    link.deliver(tokens_frame([answer]))
                    return
                self.requests[request.id] = (request, 0)
                if self.step_s is not None:
                    asyncio.get_running_loop().call_later(self.step_s, self.step, request.id)
            case "cancel":
                self.cancelled.append(message["id"])
                self.requests.pop(message["id"], None)

    def report(self, number: int | None = None) -> None:
        own = {
            "role": self.id.role,
            "index": self.id.index,
            "node": self.node,
            "pid": self.pid,
            "state": self.state,
            "counters": self.counters,
            "missing": self.missing,
        }
        assert self.link is not None
        self.link.deliver({"type": "status", "id": number, "processes": [own, *self.also]})

    def become(self, state: str) -> None:
        self.state = state
        self.report()

    def step(self, request_id: str) -> None:
        """One more token of a request."""
        if self.silent or request_id not in self.requests or self.link is None:
            return
        request, done = self.requests[request_id]
        token = (request.prompt_token_ids[-1] + done + 1) % VOCAB
        last = done + 1 == request.sampling.max_tokens
        entry = {"logprob": -0.5, "top": [[token, -0.5], [0, float(-done - 1)]]}
        asked = request.sampling.logprobs is not None
        prompt: list[Any] = [None] + [entry] * (len(request.prompt_token_ids) - 1)
        event = TokenEvent(
            request_id,
            (token,),
            FinishReason.LENGTH if last else None,
            logprobs=[entry] if asked else [],
            prompt_logprobs=prompt if request.echo_logprobs and done == 0 else None,
        )
        self.requests[request_id] = (request, done + 1)
        if last:
            del self.requests[request_id]
        self.link.deliver(tokens_frame([event]))
        if not last and self.step_s is not None:
            asyncio.get_running_loop().call_later(self.step_s, self.step, request_id)

    def kill(self) -> None:
        """The process dies; `up.set()` starts it again."""
        self.up.clear()
        self.requests.clear()
        if self.link is not None:
            self.link.close("connection reset by peer")


class FakeCluster:
    """All peers by name (`attention-0`); also the gateway's dialler, which finds them."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        self.peers: dict[str, FakePeer] = {}
        self.by_address: dict[str, FakePeer] = {}
        for spec in config.processes():
            if spec.id.role in (Role.ATTENTION, Role.ROUTER):
                peer = FakePeer(spec.id, spec.node)
                self.peers[str(spec.id)] = self.by_address[spec.address] = peer

    def __getitem__(self, name: str) -> FakePeer:
        return self.peers[name]

    async def close(self) -> None:
        for peer in self.peers.values():
            if peer.link is not None:
                peer.link.close("the transport is closing")

    async def keep(self, address: str, handler: Handler) -> None:
        peer = self.by_address[address]
        while True:
            await peer.up.wait()
            peer.link = FakeLink(peer, handler)
            handler.on_open(peer.link)
            await peer.link.closed.wait()
            await asyncio.sleep(0.01)


@asynccontextmanager
async def gateway(
    config: ClusterConfig, prepare: Callable[[FakeCluster], None] = lambda _: None
) -> AsyncIterator[tuple[aiohttp.ClientSession, FakeCluster, GatewayService]]:
    """A running gateway over a fake cluster, and a client of it."""
    cluster = FakeCluster(config)
    prepare(cluster)
    service = GatewayService(config, 0, cluster)
    try:
        async with asyncio.TaskGroup() as owner:
            await service.start(owner)
            base = f"http://127.0.0.1:{service.port}"
            timeout = aiohttp.ClientTimeout(total=20)
            async with aiohttp.ClientSession(base, timeout=timeout) as session:
                try:
                    with blockbuster_ctx("services.gateway"):  # blocking the loop is an error
                        yield session, cluster, service
                finally:
                    await service.stop()
            raise _Done  # the group's way to cancel what still runs
    except* _Done:
        pass


class _Done(Exception):  # noqa: N818
    """Ends the task group without being an error."""


async def until(condition: Callable[[], bool], *, deadline_s: float = 5.0) -> None:
    """Wait for something that other tasks bring about."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110  -- whatever it is that changes
            await asyncio.sleep(0.002)


async def sse(response: aiohttp.ClientResponse) -> list[Any]:
    """Every event of a stream, `[DONE]` as a string."""
    events: list[Any] = []
    async for line in response.content:
        text = line.decode().strip()
        if text:
            assert text.startswith("data: "), text
            body = text.removeprefix("data: ")
            events.append(body if body == "[DONE]" else json.loads(body))
    return events
