"""What the gateway counts, and the counters of every other process re-exported with its role and index."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

# Seconds. From one decode step on a small GPU model to a prompt that fills the context.
_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TPOT_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)

# Bounds on what other processes can make us export, so that a bug there cannot flood a metrics store.
_MAX_NAMES = 64
_MAX_LINKS = 1024  # per router
_MAX_EXPERTS = 1 << 16  # over all layers
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


class _Callback(Collector):
    """Metrics computed when somebody asks."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()

    def describe(self) -> Iterable[Metric]:
        return ()  # names are known only at collection time


class GatewayMetrics:
    """The gateway's own metrics; `outcome` is finished, stopped, cancelled, rejected or failed."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "atoll_requests", "Continuations by how they ended.", ("outcome",), registry=registry
        )
        self.resubmitted = Counter(
            "atoll_requests_resubmitted",
            "Continuations sent to another attention worker.",
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "atoll_prompt_tokens", "Prompt tokens accepted.", registry=registry
        )
        self.generated_tokens = Counter(
            "atoll_generated_tokens", "Tokens received.", registry=registry
        )
        self.ttft = Histogram(
            "atoll_time_to_first_token_seconds",
            "Arrival to first token.",
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self.tpot = Histogram(
            "atoll_time_per_output_token_seconds",
            "Mean time between tokens of a continuation.",
            buckets=_TPOT_BUCKETS,
            registry=registry,
        )

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)

    def watch(
        self,
        *,
        running: Callable[[], int],
        queued: Callable[[], int],
        outstanding: Callable[[], Mapping[int, int]],
    ) -> None:
        """Gauges read at collection time, so that they cost nothing per request."""

        def collect() -> list[Metric]:
            tokens = GaugeMetricFamily(
                "atoll_outstanding_tokens",
                "Prompt plus maximum new tokens assigned.",
                labels=("worker",),
            )
            for worker, count in outstanding().items():
                tokens.add_metric((str(worker),), count)
            return [
                GaugeMetricFamily(
                    "atoll_requests_running", "Continuations at attention workers.", running()
                ),
                GaugeMetricFamily(
                    "atoll_requests_queued", "Continuations waiting in the gateway.", queued()
                ),
                tokens,
            ]

        self._registry.register(_Callback(collect))

    def export_processes(self, processes: Callable[[], list[dict[str, Any]]]) -> None:
        """Re-export the counters in /cluster's process list, read at collection time."""
        self._registry.register(_Callback(lambda: process_metrics(processes())))


def process_metrics(processes: Collection[dict[str, Any]]) -> list[Metric]:
    """One gauge per counter name with labels role and index; names beyond the bound are left out."""
    up = GaugeMetricFamily(
        "atoll_process_ready", "1 while the process is ready.", labels=("role", "index")
    )
    families: dict[str, GaugeMetricFamily] = {}
    for process in processes:
        labels = (str(process["role"]), str(process["index"]))
        up.add_metric(labels, float(process["state"] == "ready"))
        for name, value in process["counters"].items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not _NAME.fullmatch(name) or (name not in families and len(families) >= _MAX_NAMES):
                continue
            if name not in families:
                families[name] = GaugeMetricFamily(
                    f"atoll_process_{name}",
                    f"The process's own counter {name}.",
                    labels=("role", "index"),
                )
            families[name].add_metric(labels, float(value))
    return [up, *families.values(), *_link_metrics(processes), _expert_metrics(processes)]


def _expert_metrics(processes: Iterable[dict[str, Any]]) -> Metric:
    """Rows per second of every expert, all routers together: the decayed counters that a rebalance looks at."""
    rates: dict[tuple[str, str], float] = {}
    for process in processes:
        for layer, experts in _table(process["counters"].get("expert_load"), _MAX_EXPERTS):
            for expert, rate in enumerate(experts if isinstance(experts, list) else []):
                key = layer, str(expert)
                is_number = isinstance(rate, int | float)
                if is_number and (key in rates or len(rates) < _MAX_EXPERTS):
                    rates[key] = rates.get(key, 0.0) + rate
    family = GaugeMetricFamily(
        "atoll_expert_rows_per_second",
        "Rows that the gate sends to an expert, averaged over the last minute or so.",
        labels=("layer", "expert"),
    )
    for labels, rate in rates.items():
        family.add_metric(labels, rate)
    return family


def _link_metrics(processes: Iterable[dict[str, Any]]) -> list[Metric]:
    """Routers' traffic per link: one gauge per figure with labels index, peer (node) and direction."""
    families: dict[str, GaugeMetricFamily] = {}
    for process in processes:
        index = str(process["index"])
        for peer, directions in _table(process["counters"].get("links"), _MAX_LINKS):
            for direction, figures in _table(directions, 2):
                for name, value in _table(figures, _MAX_NAMES):
                    if isinstance(value, bool) or not isinstance(value, int | float):
                        continue
                    if not _NAME.fullmatch(name) or len(families) > _MAX_NAMES:
                        continue
                    if name not in families:
                        families[name] = GaugeMetricFamily(
                            f"atoll_link_{name}",
                            f"Data-plane {name} of a router's link to another node.",
                            labels=("index", "peer", "direction"),
                        )
                    families[name].add_metric((index, peer, direction), float(value))
    return list(families.values())


def _table(value: object, limit: int) -> list[tuple[str, Any]]:
    """The first entries of what another process calls a table; nothing when it is none."""
    return [(str(k), v) for k, v in islice(value.items(), limit)] if isinstance(value, dict) else []
