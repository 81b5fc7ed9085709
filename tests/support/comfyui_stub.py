"""A stub of ComfyUI 0.3.64: the HTTP and WebSocket interface over nodes that make real, small files.

A program of its own, to be killed, stopped and started again on the same port::

    python -m support.comfyui_stub --port 8188 --output-directory out --input-directory in --temp-directory temp

It takes ComfyUI's own arguments and ignores those it has no use for. What it answers follows server.py of 0.3.64,
quirks included; `tests/comfyui/test_comfyui_contract.py` holds it to recorded answers of a real server and, where
there is one, to the real server itself.
"""

import argparse
import asyncio
import json
import os
import shutil
import struct
import sys
import uuid
from io import BytesIO
from pathlib import Path
from typing import Any

from aiohttp import ClientError, WSMsgType, web
from PIL import Image

from support import comfyui_stub_execution as execution
from support.comfyui_stub_nodes import Folders, Nodes
from support.comfyui_stub_validation import validate_prompt

VERSION = "0.3.64"
UPLOAD_BYTES = 104857600
NO_PROMPT = {
    "type": "no_prompt",
    "message": "No prompt provided",
    "details": "No prompt provided",
    "extra_info": {},
}


class Stub:
    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self._loop: asyncio.AbstractEventLoop
        self._messages: asyncio.Queue[tuple[str | int, Any, str | None]] = asyncio.Queue()
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._flags: dict[str, dict[str, Any]] = {}
        self._number = 0
        self.client_id: str | None = None
        self.last_node_id: str | None = None
        self._nodes = Nodes(folders, lambda *step: self._executor.progress(*step))
        self._queue = execution.PromptQueue(self)
        self._executor = execution.Executor(self._nodes, self)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=UPLOAD_BYTES)
        routes = [
            web.get("/ws", self._ws),
            web.get("/prompt", self._get_prompt),
            web.post("/prompt", self._post_prompt),
            web.get("/queue", self._get_queue),
            web.post("/queue", self._post_queue),
            web.post("/interrupt", self._post_interrupt),
            web.post("/free", self._post_free),
            web.get("/history", self._get_history),
            web.get("/history/{prompt_id}", self._get_history),
            web.post("/history", self._post_history),
            web.post("/upload/image", self._upload),
            web.get("/view", self._view),
            web.get("/system_stats", self._system_stats),
            web.get("/features", self._features),
            web.get("/object_info", self._object_info),
            web.get("/object_info/{name}", self._object_info),
        ]
        app.add_routes(routes)
        app.add_routes([web.route(r.method, f"/api{r.path}", r.handler) for r in routes])
        app.cleanup_ctx.append(self._background)
        return app

    async def _background(self, _: web.Application) -> Any:
        self._loop = asyncio.get_running_loop()
        execution.start(self._queue, self._executor, self)
        publisher = asyncio.create_task(self._publish())
        yield
        publisher.cancel()

    # -- messages ---------------------------------------------------------------------------------------
    def send_sync(self, event: str | int, data: Any, sid: str | None = None) -> None:
        self._loop.call_soon_threadsafe(self._messages.put_nowait, (event, data, sid))

    def queue_updated(self) -> None:
        self.send_sync("status", {"status": self._queue_info()})

    def wants_metadata(self, sid: str | None) -> bool:
        return self._flags.get(sid or "", {}).get("supports_preview_metadata", False) is True

    def _queue_info(self) -> dict[str, Any]:
        return {"exec_info": {"queue_remaining": self._queue.remaining()}}

    async def _publish(self) -> None:
        while True:
            event, data, sid = await self._messages.get()
            await self._send(event, data, sid)

    async def _send(self, event: str | int, data: Any, sid: str | None) -> None:
        sockets = list(self._sockets.values()) if sid is None else [self._sockets.get(sid)]
        for socket in filter(None, sockets):
            try:
                if isinstance(event, int):
                    await socket.send_bytes(_preview(event, data))
                else:
                    await socket.send_json({"type": event, "data": data})
            except (ClientError, ConnectionError) as error:
                print("send error:", error, file=sys.stderr)

    async def _ws(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        sid = request.query.get("clientId", "")
        if sid:
            self._sockets.pop(sid, None)
        else:
            sid = uuid.uuid4().hex
        self._sockets[sid] = socket
        self._flags[sid] = {}
        try:
            await self._send("status", {"status": self._queue_info(), "sid": sid}, sid)
            if self.client_id == sid and self.last_node_id is not None:
                await self._send("executing", {"node": self.last_node_id}, sid)
            first = True
            async for message in socket:
                if message.type == WSMsgType.TEXT:
                    data = json.loads(message.data)
                    if first and data.get("type") == "feature_flags":
                        self._flags[sid] = data.get("data", {})
                        await self._send("feature_flags", _features(), sid)
                    first = False
        finally:
            # As there: the end of an old connection takes the new one of the same client away.
            self._sockets.pop(sid, None)
            self._flags.pop(sid, None)
        return socket

    # -- prompts ----------------------------------------------------------------------------------------
    async def _get_prompt(self, _: web.Request) -> web.Response:
        return web.json_response(self._queue_info())

    async def _post_prompt(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "number" in body:
            number = float(body["number"])
        else:
            number = -self._number if body.get("front") else self._number
            self._number += 1
        if "prompt" not in body:
            return web.json_response({"error": NO_PROMPT, "node_errors": {}}, status=400)
        prompt = body["prompt"]
        prompt_id = str(body.get("prompt_id", uuid.uuid4()))
        valid, error, outputs, node_errors = validate_prompt(self._nodes, prompt)
        extra = body.get("extra_data", {})
        if "client_id" in body:
            extra["client_id"] = body["client_id"]
        if not valid:
            return web.json_response({"error": error, "node_errors": node_errors}, status=400)
        self._queue.put((number, prompt_id, prompt, extra, outputs))
        return web.json_response({"prompt_id": prompt_id, "number": number, "node_errors": node_errors})

    async def _get_queue(self, _: web.Request) -> web.Response:
        running, pending = self._queue.current()
        return web.json_response({"queue_running": running, "queue_pending": pending})

    async def _post_queue(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("clear"):
            self._queue.clear()
        for id_ in body.get("delete", []):
            self._queue.delete(id_)
        return web.Response()

    async def _post_interrupt(self, request: web.Request) -> web.Response:
        try:
            body = await request.json()
        except json.JSONDecodeError:
            body = {}
        wanted = body.get("prompt_id")
        running, _ = self._queue.current()
        if not wanted or any(item[1] == wanted for item in running):
            self._executor.interrupt()
        return web.Response()

    async def _post_free(self, request: web.Request) -> web.Response:
        body = await request.json()
        for name in ("unload_models", "free_memory"):
            if body.get(name):
                self._queue.set_flag(name)
        print("free:", json.dumps(body), file=sys.stderr, flush=True)
        return web.Response()

    async def _get_history(self, request: web.Request) -> web.Response:
        history = self._queue.history
        wanted = request.match_info.get("prompt_id")
        if wanted is not None:
            return web.json_response({wanted: history[wanted]} if wanted in history else {})
        most = int(request.query.get("max_items", len(history)))
        offset = int(request.query.get("offset", -1))
        if offset < 0:
            offset = max(len(history) - most, 0)
        return web.json_response(dict(list(history.items())[offset : offset + most]))

    async def _post_history(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("clear"):
            self._queue.history = {}
        for id_ in body.get("delete", []):
            self._queue.history.pop(id_, None)
        return web.Response()

    # -- files ------------------------------------------------------------------------------------------
    async def _upload(self, request: web.Request) -> web.Response:
        post = await request.post()
        image = post.get("image")
        type_ = str(post.get("type", "input"))
        folder = self._folders.of_type(type_)
        if not isinstance(image, web.FileField) or not image.filename or folder is None:
            return web.Response(status=400)
        name, subfolder = image.filename, str(post.get("subfolder", ""))
        target = Path(os.path.abspath(folder / os.path.normpath(subfolder) / name))  # noqa: PTH100
        if not target.is_relative_to(folder):
            return web.Response(status=400)
        target.parent.mkdir(parents=True, exist_ok=True)
        content = image.file.read()
        stem, suffix = os.path.splitext(name)  # noqa: PTH122
        number = 1
        if post.get("overwrite") not in ("true", "1"):
            while target.exists() and target.read_bytes() != content:
                name = f"{stem} ({number}){suffix}"
                target = target.with_name(name)
                number += 1
        target.write_bytes(content)
        return web.json_response({"name": name, "subfolder": subfolder, "type": type_})

    async def _view(self, request: web.Request) -> web.StreamResponse:
        if "filename" not in request.query:
            return web.Response(status=404)
        name, folder = self._folders.annotated(request.query["filename"])
        if not name or name[0] == "/" or ".." in name:
            return web.Response(status=400)
        folder = folder or self._folders.of_type(request.query.get("type", "output"))
        if folder is None:
            return web.Response(status=400)
        if "subfolder" in request.query:
            inner = Path(os.path.abspath(folder / request.query["subfolder"]))  # noqa: PTH100
            if not inner.is_relative_to(folder):
                return web.Response(status=403)
            folder = inner
        file = folder / os.path.basename(name)  # noqa: PTH119
        if not file.is_file():
            return web.Response(status=404)
        return web.FileResponse(file, headers={"Content-Disposition": f'filename="{file.name}"'})

    # -- about ------------------------------------------------------------------------------------------
    async def _features(self, _: web.Request) -> web.Response:
        return web.json_response(_features())

    async def _system_stats(self, _: web.Request) -> web.Response:
        memory = 8 << 30
        system = {
            "os": os.name,
            "ram_total": memory,
            "ram_free": memory // 2,
            "comfyui_version": VERSION,
            "required_frontend_version": "1.27.10",
            "installed_templates_version": "0.1.94",
            "required_templates_version": "0.1.94",
            "python_version": sys.version,
            "pytorch_version": "2.13.0+cpu",
            "embedded_python": False,
            "argv": sys.argv,
        }
        device = {
            "name": "cpu",
            "type": "cpu",
            "index": None,
            "vram_total": memory,
            "vram_free": memory // 2,
            "torch_vram_total": memory,
            "torch_vram_free": memory // 2,
        }
        return web.json_response({"system": system, "devices": [device]})

    async def _object_info(self, request: web.Request) -> web.Response:
        wanted = request.match_info.get("name")
        names = list(self._nodes) if wanted is None else [name for name in self._nodes if name == wanted]
        return web.json_response({name: self._nodes.object_info(name) for name in names})


def _features() -> dict[str, Any]:
    return {"supports_preview_metadata": True, "max_upload_size": UPLOAD_BYTES}


def _preview(event: int, data: Any) -> bytes:
    """A binary frame: the old form, or the one with JSON before the picture."""
    image: Image.Image = data if event == execution.PREVIEW else data[0]
    buffer = BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    if event == execution.PREVIEW:
        return struct.pack(">II", event, 1) + buffer.getvalue()
    about = json.dumps({**data[1], "image_type": "image/jpeg"}).encode()
    return struct.pack(">II", event, len(about)) + about + buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--listen", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8188)
    for kind in ("input", "output", "temp"):
        parser.add_argument(f"--{kind}-directory", type=Path, default=Path(kind))
    given, _ = parser.parse_known_args()
    folders = Folders(given.input_directory, given.output_directory, given.temp_directory / "temp")
    shutil.rmtree(folders.temp, ignore_errors=True)
    for folder in (folders.input, folders.output, folders.temp):
        folder.mkdir(parents=True, exist_ok=True)
    # The socket may be in TIME_WAIT after a kill.
    web.run_app(
        Stub(folders).app(),
        host=given.listen,
        port=given.port,
        reuse_address=True,
        access_log=None,
        print=None,
        shutdown_timeout=0.5,
        handle_signals=True,
    )


if __name__ == "__main__":
    main()
