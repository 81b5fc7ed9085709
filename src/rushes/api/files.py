"""Uploads: POST /v1/files, as multipart form data or as the bare file; checked before they are accepted."""

import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message

from rushes.api.auth import authenticate
from rushes.api.http import Head, dumps
from rushes.errors import BodyTooLarge, InvalidInput, MalformedRequest, MediaError, NotFound
from rushes.media.inspector import Inspector
from rushes.media.sniff import sniff
from rushes.media.storage import Storage
from rushes.queue.base import Store
from rushes.requests.ids import FileId, uuid7
from rushes.requests.record import File
from rushes.service.core import Service
from rushes.service.sources import FILE_ROUTE
from rushes.settings import Settings

_HEAD_BYTES = 4096
_SLACK = 64 * 1024  # what multipart's own lines may add


class Files:
    """Handlers for /v1/files."""

    def __init__(
        self,
        settings: Settings,
        service: Service,
        store: Store,
        storage: Storage,
        inspector: Inspector,
        scratch: Path,
    ) -> None:
        self._most = {"image": settings.max_image_bytes, "video": settings.max_video_bytes}
        self._service = service
        self._store = store
        self._storage = storage
        self._inspector = inspector
        self._scratch = scratch

    async def upload(self, request: Request) -> Response:
        head: Head = request.scope["rushes.head"]
        caller = await authenticate(self._service, head.authorization)
        limit = max(self._most.values()) + _SLACK
        if head.length > limit:
            raise BodyTooLarge(f"A file may have {max(self._most.values())} bytes.")
        request = Request(request.scope, _limited(request, limit))
        with tempfile.TemporaryDirectory(dir=self._scratch, prefix="up-") as folder:
            path = Path(folder) / "upload"
            try:
                name = await _receive(request, path)
            except ClientDisconnect:
                raise MalformedRequest("The upload ended before the file did.") from None
            file = await self._keep(path, name, caller.account)
        return Response(dumps(_described(file, head.base_url)), media_type="application/json")

    async def _keep(self, path: Path, name: str, account: Any) -> File:
        with path.open("rb") as opened:
            sniffed = sniff(opened.read(_HEAD_BYTES))
        size = path.stat().st_size
        try:
            if sniffed is None:
                raise MediaError(
                    "input_not_media", "this is no PNG, JPEG, WebP, AVIF, GIF, MP4, WebM or MOV file"
                )
            if size > self._most[sniffed.kind]:
                raise MediaError(
                    "input_too_large", f"the {sniffed.kind} may have {self._most[sniffed.kind]} bytes"
                )
            await self._inspector.check(path, sniffed.kind)
        except MediaError as error:
            detail = [{"loc": ["file"], "msg": f"file: {error.message}", "type": error.reason}]
            raise InvalidInput(f"file: {error.message}", detail=detail) from None
        id_ = FileId(f"file_{uuid7()}")
        file = File(
            id=id_,
            account=account,
            name=name,
            key=f"files/{id_}{sniffed.extension}",
            content_type=sniffed.content_type,
            size=size,
            created_at=time.time(),
        )
        await self._storage.put_file(file.key, path, file.content_type)
        await self._store.add_file(file)
        return file

    async def describe(self, request: Request) -> Response:
        head: Head = request.scope["rushes.head"]
        caller = await authenticate(self._service, head.authorization)
        file = await self._store.get_file(FileId(request.path_params["file_id"]), caller.account)
        if file is None:
            raise NotFound("There is no file with this id for this key.")
        return Response(dumps(_described(file, head.base_url)), media_type="application/json")


async def _receive(request: Request, path: Path) -> str:
    """Write the body's file to ``path``; answers its name."""
    content_type = request.headers.get("content-type", "")
    if not content_type.lower().startswith("multipart/"):
        await _write(request.stream(), path)
        return request.headers.get("x-file-name", "")[:200]
    try:
        form = await request.form(max_files=1, max_fields=16)
    except (MultiPartException, HTTPException, ValueError, KeyError) as error:
        reason = getattr(error, "message", None) or getattr(error, "detail", None) or str(error)
        raise MalformedRequest(f"This multipart form cannot be read: {reason}") from None
    try:
        upload = form.get("file") or form.get("content")
        if not isinstance(upload, UploadFile):
            missing = [{"loc": ["file"], "msg": "file is required: a file part of the form", "type": "missing"}]
            raise InvalidInput("The form needs a file part named file.", detail=missing)
        await _write(_chunks(upload), path)
        return (upload.filename or "")[:200]
    finally:
        await form.close()


async def _chunks(upload: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await upload.read(1 << 20):
        yield chunk


async def _write(chunks: AsyncIterator[bytes], path: Path) -> None:
    with path.open("wb") as out:
        async for chunk in chunks:
            out.write(chunk)
        with contextlib.suppress(OSError):
            os.fsync(out.fileno())


def _limited(request: Request, limit: int) -> Any:
    """The request's receive, ending with BodyTooLarge past ``limit`` bytes."""
    total = 0

    async def receive() -> Message:
        nonlocal total
        message = await request.receive()
        total += len(message.get("body", b""))
        if total > limit:
            raise BodyTooLarge(f"A file may have {limit - _SLACK} bytes.")
        return message

    return receive


def _described(file: File, base_url: str) -> dict[str, Any]:
    return {
        "id": file.id,
        "url": f"{base_url}{FILE_ROUTE}{file.id}",
        "name": file.name,
        "content_type": file.content_type,
        "size": file.size,
    }
