"""The catalog over HTTP, and the small routes that describe the server."""

from importlib.metadata import version

from starlette.requests import Request
from starlette.responses import Response

from rushes.api.auth import authenticate
from rushes.api.http import Head, dumps, flag
from rushes.api.openapi import model_openapi, server_openapi
from rushes.catalog.listing import model_detail, model_summary
from rushes.errors import MalformedRequest
from rushes.queue.base import Store
from rushes.service.core import Service

_MOST = 200


class Models:
    """Handlers for GET /v1/models and its neighbours."""

    def __init__(self, service: Service, store: Store) -> None:
        self._service = service
        self._store = store

    async def front(self, request: Request) -> Response:
        base = _head(request).base_url
        return _json(
            {
                "name": "Rushes",
                "version": version("rushes"),
                "models_url": f"{base}/v1/models",
                "openapi_url": f"{base}/openapi.json",
            }
        )

    async def health(self, _: Request) -> Response:
        """200 when requests can be taken: the store reads and writes."""
        await self._store.ping()
        return _json({"status": "ok"})

    async def listing(self, request: Request) -> Response:
        await self._authenticate(request)
        query = request.query_params
        limit = _number(query.get("limit"), "limit", default=50, low=1, high=_MOST)
        offset = _number(query.get("offset"), "offset", default=0, low=0, high=1_000_000)
        kind = query.get("kind") or ""
        if kind not in ("", "image", "video"):
            raise MalformedRequest("kind must be image or video.")
        found, total = self._service.catalog.search(
            query.get("search") or "", query.get("category") or "", limit, offset, kind=kind
        )
        full = flag(query.get("include_schema"), "include_schema")
        return _json({"models": [model_summary(entry, include_schema=full) for entry in found], "total": total})

    async def categories(self, request: Request) -> Response:
        await self._authenticate(request)
        return _json({"categories": self._service.catalog.categories()})

    async def one(self, request: Request) -> Response:
        await self._authenticate(request)
        return _json(model_detail(self._service.model(request.path_params["model_id"])))

    async def model_document(self, request: Request) -> Response:
        await self._authenticate(request)
        entry = self._service.model(request.path_params["model_id"])
        return _json(model_openapi(entry, _head(request).base_url))

    async def server_document(self, request: Request) -> Response:
        return _json(server_openapi(self._service.catalog.entries(), _head(request).base_url))

    async def _authenticate(self, request: Request) -> None:
        await authenticate(self._service, _head(request))


def _head(request: Request) -> Head:
    head: Head = request.scope["rushes.head"]
    return head


def _json(value: object) -> Response:
    return Response(dumps(value), media_type="application/json")


def _number(text: str | None, name: str, *, default: int, low: int, high: int) -> int:
    if text is None or text == "":
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 12) or not low <= int(text) <= high:
        raise MalformedRequest(f"{name} must be an integer from {low} to {high}.")
    return int(text)
