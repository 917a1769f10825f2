"""Prometheus metrics of one process, as an object that is passed in: no global registry, so tests cannot meet."""

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_LATEST


class _Callback(Collector):
    """Metrics computed when somebody asks."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()

    def describe(self) -> Iterable[Metric]:
        return ()  # names are known only at collection time


class Metrics:
    """A registry whose names all begin with `atoll_`. Registering a name twice raises ValueError."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

    def counter(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Counter:
        """A number that only grows; exported with the suffix `_total`."""
        return Counter(f"atoll_{name}", help_text, labels, registry=self._registry)

    def gauge(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Gauge:
        """A number that goes up and down."""
        return Gauge(f"atoll_{name}", help_text, labels, registry=self._registry)

    def histogram(
        self, name: str, help_text: str, *, buckets: Sequence[float], labels: Sequence[str] = ()
    ) -> Histogram:
        """A distribution; `buckets` are upper bounds in the unit the name ends with."""
        return Histogram(
            f"atoll_{name}", help_text, labels, buckets=buckets, registry=self._registry
        )

    def on_collect(self, collect: Callable[[], Iterable[Metric]]) -> None:
        """Add metrics that are computed at collection time."""
        self._registry.register(_Callback(collect))

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)
