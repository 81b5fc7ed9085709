"""The application: all routes in one place."""

from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from rushes.api.files import Files
from rushes.api.gateway import Gateway
from rushes.api.http import WrongMethod, error_body, error_headers, trace_of
from rushes.api.models import Models
from rushes.api.outputs import Outputs
from rushes.errors import InternalError, MalformedRequest, NotFound, RushesError
from rushes.media.inspector import Inspector
from rushes.media.storage import Storage
from rushes.queue.base import Store
from rushes.service.core import Service
from rushes.settings import Settings


def make_app(
    settings: Settings,
    *,
    service: Service,
    store: Store,
    storage: Storage,
    inspector: Inspector,
    scratch: Path,
) -> ASGIApp:
    """The gateway as an ASGI application. Everything it needs is open already and closed by the caller."""
    models = Models(service, store)
    files = Files(settings, service, store, storage, inspector, scratch)
    outputs = Outputs(service, storage)
    others = Starlette(
        routes=[
            Route("/", models.front),
            Route("/healthz", models.health),
            Route("/openapi.json", models.server_document),
            Route("/v1/models", models.listing),
            Route("/v1/models/categories", models.categories),
            Route("/v1/models/{model_id:path}/openapi.json", models.model_document),
            # the gateway takes the POST; it stands here for the Allow of a 405
            Route("/v1/models/{model_id:path}", models.one, methods=["GET", "POST"]),
            Route("/v1/files", files.upload, methods=["POST"]),
            Route("/v1/files/{file_id}", files.describe),
            Route("/outputs/{key:path}", outputs.serve),
        ],
        exception_handlers={RushesError: _refuse, HTTPException: _refuse_http, Exception: _mistake},
    )
    gateway: ASGIApp = Gateway(service, settings, others, scratch)
    if settings.cors_origins:
        gateway = _Cors(
            gateway,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After", "Content-Range", "ETag"],
        )
    return gateway


class _Cors(CORSMiddleware):
    """Answers preflights itself: in our form, and with our header."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code != 200:
            error = MalformedRequest(
                f"{bytes(response.body).decode()}. The setting cors_origins has who may call."
            )
            kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
            response = Response(error_body(error), error.status, kept, media_type="application/json")
        response.headers["X-Request-Id"] = trace_of(request_headers.get("x-request-id", "").encode()).decode()
        return response


async def _mistake(request: Request, _: Exception) -> Response:
    """The gateway logs it: Starlette raises the exception again once this is sent."""
    return await _refuse(request, InternalError())


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, RushesError)
    return Response(
        error_body(error),
        error.status,
        headers=dict(error_headers(error)),
        media_type="application/json",
    )


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    translated: RushesError
    if error.status_code == 404:
        translated = NotFound("There is nothing at this address; /openapi.json lists what there is.")
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "GET")
        if request.url.path.startswith("/v1/models/"):
            allowed += ", POST"  # which the gateway takes before it comes here
        translated = WrongMethod(f"This address takes {allowed}.", allowed)
    else:
        translated = MalformedRequest(str(error.detail))
    return await _refuse(request, translated)
