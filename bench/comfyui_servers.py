"""Both sides of the comparison: ComfyUI as a client drives it bare, and the same ComfyUI behind `rushes serve`."""

import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import av
import numpy as np

from rushes.requests.ids import RequestId
from rushes.requests.record import Request
from rushes.wiring import opened_store
from rushes_server import Rushes
from servers import HERE

sys.path.append(str(HERE.parent / "tests"))

from support.comfyui import Comfy, real_dir

Graph = dict[str, dict[str, Any]]
PATIENCE = 120.0
"""Seconds after which a request that has not ended stops the bench."""


class Run(NamedTuple):
    """One prompt by ComfyUI's own clock, in seconds since the epoch."""

    id: str
    began: float
    ended: float


class Server:
    """A real ComfyUI on the CPU with a folder of its own, and the log of its prompts."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "prompts.log"
        nodes = folder / "nodes.yaml"
        folder.mkdir(parents=True)
        nodes.write_text(f"bench:\n  custom_nodes: {HERE / 'comfyui_nodes'}\n")
        self.comfy = Comfy("real", folder, arguments=("--extra-model-paths-config", str(nodes)))
        self.url = self.comfy.url
        os.environ["BENCH_COMFYUI_LOG"] = str(self._log)
        self.comfy.start()

    def runs(self, since: int = 0) -> list[Run]:
        """The successful prompts in the order in which they ended, without the first ``since`` ones."""
        began: dict[str, float] = {}
        found = []
        for line in self._log.read_text("utf-8").splitlines():
            event, id_, seconds = line.split()
            if event == "execution_start":
                began[id_] = float(seconds)
            elif event == "execution_success":
                found.append(Run(id_, began[id_], float(seconds)))
            else:
                raise SystemExit(f"bench: ComfyUI says {event} of {id_}:\n{self.comfy.text_of_log()[-3000:]}")
        return found[since:]

    def close(self) -> None:
        self.comfy.close()


def _ticks(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def comfyuis(folder: Path, count: int) -> Iterator[list[Server]]:
    """So many real ComfyUIs."""
    if real_dir() is None:
        raise SystemExit("bench: set COMFYUI_DIR to the folder of a ComfyUI (see bench/README.md)")
    servers: list[Server] = []
    try:
        for number in range(count):
            servers.append(Server(folder / f"comfyui-{number}"))  # noqa: PERF401 - what has started is stopped
        yield servers
    finally:
        for server in servers:
            server.close()


# -- bare ------------------------------------------------------------------------------------------------
class Bare:
    """A client as ComfyUI's own example has it: POST /prompt, then wait for it on the websocket."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url, self._session, self._client = url, session, uuid.uuid4().hex

    async def open(self) -> None:
        self._socket = await self._session.ws_connect(
            f"{self._url}/ws", params={"clientId": self._client}, max_msg_size=0
        )

    async def post(self, graph: Graph) -> str:
        body = {"prompt": graph, "client_id": self._client}
        async with self._session.post(f"{self._url}/prompt", json=body) as answer:
            value = await answer.json()
            if answer.status != 200 or value["node_errors"]:
                raise SystemExit(f"bench: ComfyUI refused a graph: {value}")
            return str(value["prompt_id"])

    async def ended(self, prompt_id: str) -> None:
        async with asyncio.timeout(PATIENCE):
            async for message in self._socket:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                if event["data"].get("prompt_id") == prompt_id:
                    if event["type"] == "execution_success":
                        return
                    if event["type"] in ("execution_error", "execution_interrupted"):
                        raise SystemExit(f"bench: a prompt failed: {event}")

    async def run(self, graph: Graph) -> float:
        """Seconds from before the POST to ``execution_success``."""
        began = time.perf_counter()
        await self.ended(await self.post(graph))
        return time.perf_counter() - began

    async def upload(self, content: bytes, name: str) -> None:
        form = aiohttp.FormData()
        form.add_field("image", content, filename=name)
        async with self._session.post(f"{self._url}/upload/image", data=form) as answer:
            assert answer.status == 200, await answer.text()
            assert (await answer.json())["name"] == name

    async def download(self, prompt_id: str, into: Path) -> int:
        """Copy every file of the prompt, as a client does that wants them; how many bytes."""
        entry = None
        while entry is None:  # it is written just after the message
            async with self._session.get(f"{self._url}/history/{prompt_id}") as answer:
                entry = (await answer.json()).get(prompt_id)
        size = 0
        for output in entry["outputs"].values():
            for file in output.get("images", ()):
                query = {key: file[key] for key in ("filename", "subfolder", "type")}
                async with self._session.get(f"{self._url}/view", params=query) as answer:
                    with (into / uuid.uuid4().hex).open("wb") as out:
                        async for chunk in answer.content.iter_chunked(1 << 20):
                            size += out.write(chunk)
        return size


@asynccontextmanager
async def bare(url: str) -> AsyncIterator[Bare]:
    async with aiohttp.ClientSession(trust_env=False) as session:
        client = Bare(url, session)
        await client.open()
        yield client


# -- behind Rushes ---------------------------------------------------------------------------------------
class Ours:
    """`rushes serve` in front of ComfyUIs, one slot each; used as an HTTP client uses it."""

    def __init__(self, folder: Path, urls: Sequence[str], models: Path) -> None:
        self.server = Rushes(folder)
        settings = {"RUSHES_COMFYUI_URLS": ",".join(urls), "RUSHES_MODELS_DIR": str(models)}
        self.server.start(cpu=None, workers=len(urls), engine="comfyui", extra=settings)
        self.base = f"http://127.0.0.1:{self.server.running.port}/v1"

    def stop(self) -> None:
        self.server.stop()

    def cpu_seconds(self) -> dict[str, float]:
        """Processor time that each kind of process of the server has used: gateway, worker, slot, supervisor."""
        found: dict[str, float] = {}
        for pid in self.server.running.processes():
            words = Path(f"/proc/{pid}/cmdline").read_text("utf-8").split("\0")
            role = next(
                (word for word in ("gateway", "worker", "slot", "inspect") if word in words), "supervisor"
            )
            found[role] = found.get(role, 0.0) + _ticks(pid)
        return found

    async def submit(self, session: aiohttp.ClientSession, model: str, values: Mapping[str, Any]) -> str:
        async with session.post(
            f"{self.base}/models/{model}", json=values, headers=self.server.headers()
        ) as answer:
            value = await answer.json()
            if answer.status != 200:
                raise SystemExit(f"bench: a submit was refused: {value}")
            return str(value["request_id"])

    async def wait(
        self,
        session: aiohttp.ClientSession,
        id_: str,
        pause: float = 0.02,
        until: Sequence[str] = ("completed",),
    ) -> None:
        """Poll the status until it is one of ``until``."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            async with session.get(
                f"{self.base}/requests/{id_}/status", headers=self.server.headers()
            ) as answer:
                if (await answer.json())["status"] in until:
                    return
            await asyncio.sleep(pause)
        raise SystemExit(f"bench: {id_} did not end:\n{self.server.running.tail()}")

    async def records(self, ids: Sequence[str]) -> list[Request]:
        """The stored requests, all succeeded; anything else stops the bench."""
        found = []
        async with opened_store(self.server.settings) as store:
            for id_ in ids:
                request = await store.get(RequestId(id_), None)
                if request is None or request.state != "succeeded" or request.attempt != 1:
                    raise SystemExit(f"bench: {id_}: {request}\n{self.server.running.tail()}")
                found.append(request)
        return found


# -- the graphs ------------------------------------------------------------------------------------------
def empty_image(colour: int) -> Graph:
    """The smallest graph there is; the colour keeps ComfyUI from answering out of its cache."""
    return {
        "1": _node("EmptyImage", width=64, height=64, batch_size=1, color=colour),
        "2": _node("SaveImage", images=["1", 0], filename_prefix="bench"),
    }


def clip(image: str, side: int) -> Graph:
    """A small video out of an image: as long as the side of its frames makes it."""
    return {
        "1": _node("LoadImage", image=image),
        "2": _node(
            "ImageScale", image=["1", 0], upscale_method="bilinear", width=side, height=side, crop="center"
        ),
        "3": _node("RepeatImageBatch", image=["2", 0], amount=5),
        "4": _node("CreateVideo", images=["3", 0], fps=16.0),
        "5": _node("SaveVideo", video=["4", 0], filename_prefix="bench", format="mp4", codec="h264"),
    }


def waiting(seconds: float, seed: int) -> Graph:
    """Occupies ComfyUI without using a processor, as a GPU's work does."""
    return {
        "1": _node("EmptyImage", width=64, height=64, batch_size=1, color=0),
        "2": _node("RushesTestSleep", image=["1", 0], seconds=seconds, steps=4, preview=False, seed=seed),
        "3": _node("SaveImage", images=["2", 0], filename_prefix="bench"),
    }


def large(video: str, seconds: float, seed: int) -> Graph:
    """Copies a video through, without encoding it, beside work of a known length."""
    return {
        "1": _node("LoadVideo", file=video),
        "2": _node("SaveVideo", video=["1", 0], filename_prefix="bench", format="auto", codec="auto"),
        "3": _node("EmptyImage", width=64, height=64, batch_size=1, color=0),
        "4": _node("RushesTestSleep", image=["3", 0], seconds=seconds, steps=4, preview=False, seed=seed),
        "5": _node("PreviewImage", images=["4", 0]),
    }


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def write_models(folder: Path, side: int) -> Path:
    """The graphs as models: bench/empty, bench/waiting, bench/clip, bench/large."""
    colour = _input("1_color", "integer", role="seed", minimum=0, maximum=0xFFFFFF)
    seconds = {"minimum": 0, "maximum": 60, "default": 0.3}
    image, video = (
        _input("1_image", "string", role="start_image"),
        _input("1_file", "string", role="source_video"),
    )
    pause = _input("2_seconds", "float", **seconds) + _input("2_seed", "integer", role="seed")
    work = _input("4_seconds", "float", **seconds) + _input("4_seed", "integer", role="seed")
    address = "https://files.example/x"
    _write(folder / "bench" / "empty", "image", empty_image(0), "2", colour, {"1_color": 1})
    _write(folder / "bench" / "waiting", "image", waiting(0.3, 0), "3", pause, {"2_seconds": 0.3})
    _write(folder / "bench" / "clip", "video", clip("x.png", side), "5", image, {"1_image": address})
    _write(folder / "bench" / "large", "video", large("x.mp4", 0.3, 0), "2", video + work, {"1_file": address})
    return folder


def _input(name: str, type_: str, **keys: Any) -> str:
    table = {"name": name, "title": name, "type": type_, **keys}
    return "\n".join(["[[inputs]]", *(f"{key} = {json.dumps(value)}" for key, value in table.items()), ""])


def _write(folder: Path, output: str, graph: Graph, saves: str, inputs: str, sample: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    head = {"name": "Bench", "output": output, "required": list(sample), "graph": "graph.json"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in head.items()]
    text = "\n".join([*lines, f"{inputs}[engines.comfyui]", f'outputs = ["{saves}"]', ""])
    (folder / "model.toml").write_text(text)
    (folder / "graph.json").write_text(json.dumps(graph))
    (folder / "sample.json").write_text(json.dumps(sample))


def noise_video(path: Path, megabytes: int) -> bytes:
    """A valid mp4 of at least so many MB: noise does not compress."""
    random = np.random.default_rng(1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=Fraction(16))
        stream.width = stream.height = 512
        stream.pix_fmt = "yuv420p"
        stream.options = {"preset": "ultrafast", "qp": "4"}
        written = 0
        while written < megabytes * 1_000_000:
            frame = av.VideoFrame.from_ndarray(random.integers(0, 256, (512, 512, 3), np.uint8), format="rgb24")
            for packet in stream.encode(frame.reformat(format="yuv420p")):
                container.mux(packet)
                written += packet.size
        container.mux(stream.encode(None))
    return path.read_bytes()
