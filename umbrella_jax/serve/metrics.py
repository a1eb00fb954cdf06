"""Figures about the server for Prometheus. Their labels come from our code, never from a request."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_METHODS = ("GET", "HEAD", "POST", "DELETE")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of what `ServerMetrics.text` returns."""


class ServerMetrics:
    """Counts requests. `registry` takes further figures."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "umbrella_requests",
            "Requests, by handler, method and status",
            ["endpoint", "method", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "umbrella_request_seconds",
            "Time to answer a request, to its last byte",
            ["endpoint"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=self.registry,
        )
        self._uploads = Gauge("umbrella_uploads", "Uploads that are stored or under way", registry=self.registry)
        self._upload_bytes = Gauge("umbrella_upload_bytes", "Bytes of these uploads", registry=self.registry)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a figure that is `value()` whenever it is read."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def count(self, endpoint: str, method: str, status: int, seconds: float) -> None:
        """Count a request; `status` is 499 if the client went away before the answer."""
        self._requests.labels(endpoint, method if method in _METHODS else "other", str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def text(self, uploads: tuple[int, int]) -> bytes:
        """Return all figures in Prometheus' format.

        Args:
            uploads: their number and bytes.
        """
        self._uploads.set(uploads[0])
        self._upload_bytes.set(uploads[1])
        return bytes(generate_latest(self.registry))
