"""Metrics for Prometheus."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters of one app. The status of a request that the client abandoned is 499."""

    def __init__(self) -> None:
        self.registry = of = CollectorRegistry()
        self.seconds = Histogram("evaclip_request_seconds", "Of requests", ["route"], buckets=_SECONDS, registry=of)
        self.requests = Counter("evaclip_requests", "Answered", ["route", "status"], registry=of)
        self.batches = Histogram("evaclip_batch_size", "Encoded at once", ["kind"], buckets=_SIZES, registry=of)
        self.waiting = Gauge("evaclip_waiting", "Pictures and texts that wait to be encoded", registry=of)
        self.rows = Gauge("evaclip_rows", "Of the store", registry=of)


class Measured:
    """ASGI middleware that counts requests and their time."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status = time.perf_counter(), 499

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            status = 500
            raise
        finally:
            # All that has no route is one: addresses that don't exist shall not fill the memory.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.seconds.labels(route).observe(time.perf_counter() - began)
            self._metrics.requests.labels(route, str(status)).inc()
