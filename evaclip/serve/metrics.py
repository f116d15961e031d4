"""What is counted, for Prometheus."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters of one app."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.seconds = Histogram(
            "evaclip_request_seconds", "Time of requests", ["route"], buckets=_SECONDS, registry=self._registry
        )
        self.requests = Counter(
            "evaclip_requests", "Requests by status; 499 where nobody waited", ["route", "status"],
            registry=self._registry,
        )  # fmt: skip
        self.batches = Histogram(
            "evaclip_batch_size", "What was encoded at once", ["kind"], buckets=_SIZES, registry=self._registry
        )

    def gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        """Shows what a function gives when it is asked."""
        Gauge(name, what, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class Measured:
    """ASGI middleware that counts requests and their time."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.perf_counter(), [499]

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            status[0] = 500
            raise
        finally:
            # What has no route is one: nobody can fill the memory with addresses that don't exist.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.seconds.labels(route).observe(time.perf_counter() - began)
            self._metrics.requests.labels(route, str(status[0])).inc()
