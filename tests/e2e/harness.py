"""A real cluster for a test: `atoll up` in a process group of its own, its URL, its processes, and a clean end."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

ATOLL = Path(sys.executable).parent / "atoll"
COMMAND = [ATOLL] if ATOLL.exists() else [sys.executable, "-m", "deploy.cli"]  # not installed
START_DEADLINE_S = 90.0
STOP_DEADLINE_S = 25.0
WITH_ITS_PARENT = (
    "setpriv",
    "--pdeathsig",
    "TERM",
)  # a killed process of tests leaves no cluster behind


def alive(pid: int) -> bool:
    """True while a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


class Cluster:
    """A running cluster; use as a context manager. Leaving it checks that nothing is left running."""

    def __init__(self, *arguments: str, start_deadline_s: float = START_DEADLINE_S) -> None:
        self.arguments = arguments
        self.start_deadline_s = start_deadline_s
        self.directory = Path(tempfile.mkdtemp(prefix="atoll-e2e-"))
        self.log = self.directory / "log"
        self.url = ""
        self.processes: list[dict[str, Any]] = []
        self.ready_after_s = 0.0

    def __enter__(self) -> "Cluster":
        ready = self.directory / "ready.json"
        started = time.monotonic()
        port = () if "--cluster" in self.arguments else ("--port", "0")  # the file says which
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                [*WITH_ITS_PARENT, *COMMAND, "up", *port, "--ready-file", ready, *self.arguments],
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        while not ready.exists():
            if self.popen.poll() is not None or time.monotonic() - started > self.start_deadline_s:
                self._kill()
                raise AssertionError(f"the cluster did not become ready:\n{self.log.read_text()}")
            time.sleep(0.02)
        self.ready_after_s = time.monotonic() - started
        facts = json.loads(ready.read_text())
        self.url, self.processes = facts["url"], facts["processes"]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pids = {p["pid"] for p in self.processes} | {p["pid"] for p in self.state_or_nothing()}
        self.popen.send_signal(signal.SIGINT)
        try:
            code = self.popen.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._kill()
            raise AssertionError(
                f"the cluster did not stop:\n{self.log.read_text()[-4000:]}"
            ) from error
        if error is None:
            assert code == 0, f"exit code {code}:\n{self.log.read_text()[-4000:]}"
            left = [pid for pid in pids if alive(pid)]
            assert not left, f"left running: {left}"

    def _kill(self) -> None:
        os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(10)

    def get(self, path: str) -> Any:
        """One GET, parsed JSON."""
        return asyncio.run(self.fetch("GET", path, None))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """One POST, parsed JSON; an HTTP error is an AssertionError with the body."""
        return asyncio.run(self.fetch("POST", path, body))

    def state_or_nothing(self) -> list[dict[str, Any]]:
        """`processes` of /cluster, empty when the gateway does not answer."""
        try:
            return list(self.get("/cluster")["processes"])
        except (aiohttp.ClientError, AssertionError, TimeoutError):
            return []

    def counters(self, role: str) -> list[dict[str, Any]]:
        """Counters of every process of a role, by index."""
        entries = [p for p in self.get("/cluster")["processes"] if p["role"] == role]
        return [p["counters"] for p in sorted(entries, key=lambda p: p["index"])]

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        """Greedy continuations of all prompts, sent at once; token ids, eos ignored."""
        name = self.model

        async def all_at_once() -> list[list[int]]:
            return await asyncio.gather(*(self.continuation(name, p, max_tokens) for p in prompts))

        return asyncio.run(all_at_once())

    async def continuation(self, model: str, prompt: list[int], max_tokens: int) -> list[int]:
        """One greedy continuation."""
        body = {
            "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        answer = await self.fetch("POST", "/v1/completions", body)
        return list(answer["choices"][0]["token_ids"])

    @property
    def model(self) -> str:
        """The name that the cluster serves its model under."""
        return str(self.get("/v1/models")["data"][0]["id"])

    async def fetch(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One request, parsed JSON; an HTTP error is an AssertionError with the body."""
        timeout = aiohttp.ClientTimeout(total=180)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.request(method, self.url + path, json=body) as response,
        ):
            text = await response.text()
            assert response.status == 200, f"{method} {path}: {response.status} {text}"
            return json.loads(text)
