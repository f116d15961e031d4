"""The HTTP API and the page."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from evaclip.runtime.encoder import Encoder
from evaclip.runtime.store import Store
from evaclip.serve.limits import Guard, Limits, Rejected, extra_headers
from evaclip.serve.metrics import Measured, Metrics
from evaclip.serve.service import Query, Service

_PAGE = {
    "/": ("serve/page/index.html", "text/html; charset=utf-8"),
    "/page.js": ("serve/page/page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("serve/page/page.css", "text/css; charset=utf-8"),
    "/theme.css": ("report/theme.css", "text/css; charset=utf-8"),
}

Text = Annotated[str, Form()]
Picture = Annotated[UploadFile | None, File()]


class About(BaseModel):
    """What is served."""

    model: str
    dim: int
    pictures: int


class Embeddings(BaseModel):
    """Of length 1 each, in the order of what was sent."""

    embeddings: list[list[float]]


class Hit(BaseModel):
    """A row of the store, its cosine, and where a small copy of its picture is."""

    row: int
    score: float
    id: str
    caption: str
    metadata: dict[str, Any]
    thumbnail: str


class Hits(BaseModel):
    """The best first."""

    results: list[Hit]
    seconds: float


class Label(BaseModel):
    """A label and its probability."""

    label: str
    probability: float


class Labels(BaseModel):
    """The likeliest first; probabilities add up to 1."""

    labels: list[Label]


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
        hosts: names that the server may be called by; others are refused, so that no web page can reach a server
            without a key under a name of its own.
        limits: of requests.
        delay: seconds that a picture or text waits for others to be encoded with.

    Raises:
        UserError: the encoder isn't of the store's model.

    Example:
        ```python
        store = Store.open(Path("photos.store"))
        app = create_app(store, Encoder(store.model["given"], precision=store.model["precision"]))
        ```
    """
    limits, metrics = limits or Limits(), Metrics()
    service = Service(store, encoder, limits, metrics, delay)
    metrics.gauge("evaclip_waiting", "Pictures and texts that wait to be encoded", service.batcher.waiting)
    metrics.gauge("evaclip_rows", "Rows of the store", lambda: len(store))

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
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.add_middleware(Guard, limits=limits, key=key)
    app.add_middleware(Measured, metrics=metrics)
    return app


def _add_page(app: FastAPI) -> None:
    for path, (name, media_type) in _PAGE.items():
        content = files("evaclip").joinpath(name).read_bytes()
        answer = {"content": content, "media_type": media_type, "headers": {"Cache-Control": "no-cache"}}
        app.get(path, include_in_schema=False)(lambda answer=answer: Response(**answer))

    @app.get("/docs", include_in_schema=False)
    def docs() -> Response:
        return RedirectResponse("/openapi.json")


def _add_state(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the server works; needs no key."""
        if not service.batcher.alive:
            raise Rejected(503, "The encoder has ended; start the server anew.")
        return {"status": "ok"}

    @app.get("/about")
    async def about() -> About:
        """The model, and how many pictures there are."""
        return About(model=service.encoder.name, dim=service.store.dim, pictures=len(service.store))

    @app.get("/metrics")
    async def text() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_api(app: FastAPI, service: Service) -> None:
    @app.post("/embed/image")
    async def embed_image(image: list[UploadFile]) -> Embeddings:
        """Embeddings of pictures: JPEG, PNG, WebP, GIF or AVIF files."""
        found = await service.pictures([await one.read() for one in image])
        return Embeddings(embeddings=found.tolist())

    @app.post("/embed/text")
    async def embed_text(text: Annotated[list[str], Form()]) -> Embeddings:
        """Embeddings of texts."""
        return Embeddings(embeddings=(await service.texts(text)).tolist())

    @app.post("/search")
    async def search(
        text: Text = "",
        image: Picture = None,
        minus: Text = "",
        like: Annotated[int | None, Form()] = None,
        top: Annotated[int, Form()] = 10,
        filter: Text = "",
    ) -> Hits:
        """Pictures that are like a text, a picture, a row of the store, or all of these at once, and unlike `minus`.

        `filter` is a condition on the rows, such as `year>=2020 and caption~bicycle`.
        """
        began = time.perf_counter()
        data = await image.read() if image is not None else None
        found = await service.search(Query(text.strip(), data, minus.strip(), like, top, filter.strip()))
        hits = [
            Hit(
                row=hit.number, score=hit.score, id=hit.row.id, caption=hit.row.caption,
                metadata=dict(hit.row.metadata), thumbnail=f"/thumbnail/{hit.number}?v={hit.row.content[:16]}",
            )
            for hit in found
        ]  # fmt: skip
        return Hits(results=hits, seconds=time.perf_counter() - began)

    @app.post("/label")
    async def label(
        image: UploadFile, label: Annotated[list[str], Form()], template: Text = "a photo of a {}"
    ) -> Labels:
        """Which of some labels a picture has, by the model: each takes the place of `{}` in the template."""
        found = await service.label(await image.read(), label, template)
        ranked = sorted(zip(found, label, strict=True), key=lambda pair: -pair[0])
        return Labels(labels=[Label(label=name, probability=share) for share, name in ranked])

    @app.get("/thumbnail/{row}", response_class=Response)
    async def thumbnail(row: int) -> Response:
        """A small copy of a row's picture."""
        data, media_type = await service.thumbnail(row)
        return Response(data, media_type=media_type, headers={"Cache-Control": "private, max-age=86400"})


def _add_errors(app: FastAPI) -> None:
    """Every error is `{"error": a sentence}`."""

    def told(status: int, reason: str) -> JSONResponse:
        return JSONResponse({"error": reason}, status, extra_headers(status))

    @app.exception_handler(Rejected)
    async def rejected(request: Request, exc: Rejected) -> JSONResponse:
        return told(exc.status, exc.reason)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, exc: HTTPException) -> JSONResponse:
        return told(exc.status_code, f"{exc.detail}.")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, exc: RequestValidationError) -> JSONResponse:
        faults = (f"{'.'.join(map(str, error['loc'][1:]))!r}: {error['msg']}" for error in exc.errors())
        return told(422, f"The request can't be used: {'; '.join(faults)}.")

    @app.exception_handler(Exception)
    async def failed(request: Request, exc: Exception) -> JSONResponse:
        return told(500, "The server failed at this; its log says why.")
