"""The routes: `create_app(generator, settings)` is an application that `listen.serve` runs."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from drafter import __version__
from runtime.server.answer import Service
from runtime.server.errors import ApiError, from_validation
from runtime.server.guards import AccessLog, LimitBody, RequireKey
from runtime.server.metrics import CONTENT_TYPE, Metrics
from runtime.server.replies import ChatReply, TextReply
from runtime.server.schema import ChatRequest, CompletionRequest
from runtime.server.settings import ServerSettings
from runtime.server.worker import Worker

if TYPE_CHECKING:
    from runtime.generator import Generator

DEFAULT_MODEL = "slimspec"


def create_app(generator: Generator, settings: ServerSettings) -> FastAPI:
    """The application over one Generator, which it then needs for itself. With a BatchGenerator
    requests are decoded together.

    Its lifespan starts and stops the worker's thread. `app.state.service` is the `Service`.
    """
    worker = Worker(settings.max_queue, generator.max_streams)
    metrics = Metrics(worker)
    model = settings.model_name or DEFAULT_MODEL
    service = Service(generator, settings, model, worker, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            worker.close()

    # The interactive pages would load scripts from elsewhere; /openapi.json stays.
    app = FastAPI(
        title="SlimSpec", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.service = service
    _add_errors(app)
    _add_generation(app, service)
    _add_model_list(app, service)
    _add_operation(app, service)
    _add_guards(app, settings, metrics)
    return app


def _add_guards(app: FastAPI, settings: ServerSettings, metrics: Metrics) -> None:
    """The one added last stands first."""
    app.add_middleware(LimitBody, limit=settings.max_body_bytes, seconds=settings.upload_timeout_s)
    if settings.api_key is not None:
        app.add_middleware(RequireKey, key=settings.api_key.get_secret_value())
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    routes = {route.path for route in app.routes if hasattr(route, "path")}
    app.add_middleware(AccessLog, metrics=metrics, routes=routes)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def elsewhere(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{error.detail}: {request.method} {request.url.path[:100]!a}."
        return ApiError(error.status_code, message, headers=error.headers).response()


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        reply = ChatReply(service.model, asked.include_usage, asked.return_token_ids)
        return await service.answer(asked, reply, request)

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        reply = TextReply(service.model, asked.include_usage, asked.return_token_ids)
        return await service.answer(asked, reply, request)


def _add_model_list(app: FastAPI, service: Service) -> None:
    card = {
        "id": service.model,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "slimspec",
        "max_context": service.generator.max_context,
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        if model != service.model:
            message = f"The model {model[:100]!a} is not served; ask for '{service.model}'."
            raise ApiError(404, message, code="model_not_found", param="model")
        return card


def _add_operation(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether the process can still answer: restart it if not."""
        alive = service.worker.alive
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        """Whether new requests are taken: route them elsewhere if not."""
        ready = service.worker.alive and not service.worker.draining
        state = "ready" if ready else "shutting down"
        return JSONResponse({"status": state}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)
