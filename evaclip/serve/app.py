"""The HTTP API, the page, and the metrics for Prometheus."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Form, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evaclip.runtime.encoder import Encoder
from evaclip.runtime.store import Store
from evaclip.serve.limits import Guard, Limits, Rejected
from evaclip.serve.service import Hits, Query, Service

_PAGE = {
    "/": ("serve/page/index.html", "text/html; charset=utf-8"),
    "/page.js": ("serve/page/page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("serve/page/page.css", "text/css; charset=utf-8"),
    "/theme.css": ("report/theme.css", "text/css; charset=utf-8"),
}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Texts = Annotated[list[str], Form()]


def create_app(
    store: Store,
    encoder: Encoder,
    *,
    key: str | None = None,
    hosts: Sequence[str] = ("*",),
    limits: Limits | None = None,
    delay: float = 0.003,
) -> FastAPI:
    """An ASGI app that searches in a store.

    Args:
        store: to search in; it may grow meanwhile.
        encoder: of the store's model.
        key: what requests must bring; None for no key.
        hosts: names that the server may be called by, `*` for any and `*.example.com` for all of a domain. Where there
            is no key, all but its own are to be refused: a web page could reach it by a name that leads to this
            machine.
        limits: of requests.
        delay: seconds that an image or text waits for others to be encoded with.

    Example:
        ```python
        store = Store.open("photos.store")
        app = create_app(store, Encoder(store.model["given"], precision=store.model["precision"]))
        ```
    """
    limits, metrics = limits or Limits(), Metrics()
    service = Service(store, encoder, limits, delay, lambda kind, count: metrics.batches.labels(kind).observe(count))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # FastAPI's own pages about the API load scripts from elsewhere.
    app = FastAPI(title="evaclip", lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_page(app)
    _add_state(app, service, metrics)
    _add_api(app, service)
    _add_errors(app)
    app.add_middleware(Guard, limits=limits, key=key, hosts=hosts)
    app.add_middleware(Measured, metrics=metrics)
    app.add_middleware(_with_head)
    return app


class Metrics:
    """The counters of one app. The status of a request that the client abandoned is 499."""

    def __init__(self) -> None:
        self.registry = of = CollectorRegistry()
        self.seconds = Histogram("evaclip_request_seconds", "Seconds", ["route"], buckets=_SECONDS, registry=of)
        self.requests = Counter("evaclip_requests", "Answered", ["route", "status"], registry=of)
        self.batches = Histogram("evaclip_batch_size", "Encoded at once", ["kind"], buckets=_SIZES, registry=of)
        self.waiting = Gauge("evaclip_waiting", "Images and texts that wait to be encoded", registry=of)
        self.rows = Gauge("evaclip_rows", "Rows of the store", registry=of)


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


def _with_head(app: ASGIApp) -> ASGIApp:
    """Answers HEAD as GET, which FastAPI's routes don't; servers leave the body away themselves."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope, receive, send)

    return answer


def _add_page(app: FastAPI) -> None:
    def add(path: str, content: bytes, media_type: str) -> None:
        @app.get(path, include_in_schema=False)
        async def file() -> Response:
            return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})

    for path, (name, media_type) in _PAGE.items():
        add(path, files("evaclip").joinpath(name).read_bytes(), media_type)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return RedirectResponse("/openapi.json")


def _add_state(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the server works; needs no key."""
        if not service.batcher.alive:
            raise Rejected(503, "The encoder has ended; start the server anew.")
        return {"status": "ok"}

    @app.get("/about")
    async def about() -> dict[str, Any]:
        """The model, the length of its embeddings, and how many images there are."""
        return {"model": service.encoder.name, "dim": service.store.dim, "pictures": await service.count()}

    @app.get("/metrics", response_class=Response)
    async def text() -> Response:
        """For Prometheus."""
        metrics.waiting.set(service.batcher.waiting())
        metrics.rows.set(await service.count())
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _add_api(app: FastAPI, service: Service) -> None:
    @app.post("/embed/image")
    async def embed_image(image: list[UploadFile]) -> dict[str, list[list[float]]]:
        """Embeddings of images (JPEG, PNG, WebP, GIF or AVIF files), of length 1, in their order."""
        return {"embeddings": (await service.images([await one.read() for one in image])).tolist()}

    @app.post("/embed/text")
    async def embed_text(text: Texts) -> dict[str, list[list[float]]]:
        """Embeddings of texts, of length 1, in their order."""
        return {"embeddings": (await service.texts(text)).tolist()}

    @app.post("/search")
    async def search(query: Annotated[Query, Form(media_type="multipart/form-data")]) -> Hits:
        """Images that are like a text, an image, a row of the store or all of these at once, the nearest first.

        `minus` is a text that they shall be unlike; `filter` a condition in SQL such as `year >= 2020`.
        """
        began = time.perf_counter()
        return Hits(results=await service.search(query), seconds=time.perf_counter() - began)

    @app.post("/label")
    async def label(
        image: UploadFile, label: Texts, template: Annotated[str, Form()] = "a photo of a {}"
    ) -> dict[str, list[dict[str, Any]]]:
        """The probability of each label, likeliest first, if one of them is right; it replaces `{}` in the template."""
        shares = await service.label(await image.read(), label, template)
        ranked = sorted(zip(shares, label, strict=True), key=lambda pair: -pair[0])
        return {"labels": [{"label": name, "probability": share} for share, name in ranked]}

    @app.get("/thumbnail/{row}", response_class=Response)
    async def thumbnail(row: int, v: str = "") -> Response:
        """A small copy of a row's image; `v` is the beginning of the hash of its content."""
        data, media_type = await service.thumbnail(row, v)
        return Response(data, media_type=media_type, headers={"Cache-Control": "private, max-age=86400"})


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Rejected)
    async def rejected(request: Request, exc: Rejected) -> Response:
        return exc.response()

    @app.exception_handler(HTTPException)
    async def refused(request: Request, exc: HTTPException) -> Response:
        sentence = f"{exc.detail.rstrip('.')}: {request.method} {request.url.path}."
        return Rejected(exc.status_code, sentence).response(exc.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, exc: RequestValidationError) -> Response:
        faults = (f"{'.'.join(map(str, error['loc'][1:]))!r}: {error['msg']}" for error in exc.errors())
        return Rejected(422, f"The request can't be used: {'; '.join(faults)}.").response()

    @app.exception_handler(Exception)
    async def failed(request: Request, exc: Exception) -> Response:
        return Rejected(500, "The server failed at this; its log says why.").response()
