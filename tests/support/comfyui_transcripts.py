"""Conversations with a ComfyUI, written down so that two servers, or a server and a recording, can be compared.

What differs from run to run (ids, times, tracebacks, folders) is replaced, and prose is left out (see
comfyui_facts.py); everything else must be the same.

``tests/comfyui/recorded.json`` holds what ComfyUI 0.3.64 said. To record again, with ``COMFYUI_DIR`` set::

    PYTHONPATH=tests python -m support.comfyui_transcripts > recorded.json

and put that file there.
"""

import asyncio
import contextlib
import json
import re
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image

from support.comfyui import Comfy, Graph
from support.comfyui_facts import facts_of, spec_of

Scenario = Callable[["Talk"], Awaitable[Any]]
SCENARIOS: dict[str, Scenario] = {}
STUB_NODES = Path(__file__).parent / "comfyui_stub_nodes.json"


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def node(class_: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_, "inputs": inputs}


def empty(color: int = 0, **more: Any) -> dict[str, Any]:
    return node("EmptyImage", **{"width": 64, "height": 64, "batch_size": 1, "color": color, **more})


def save(images: str, prefix: str = "x") -> dict[str, Any]:
    return node("SaveImage", images=[images, 0], filename_prefix=prefix)


class Talk:
    """One client of one server. ``messages`` is what came over its socket."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url, self.http = url, http
        self.client_id = uuid.uuid4().hex
        self.messages: list[Any] = []

    async def get(self, path: str, **query: str) -> Any:
        async with self.http.get(self.url + path, params=query) as answer:
            text = await answer.text()
            return [answer.status, json.loads(text) if text.startswith(("{", "[")) else text]

    async def post(self, path: str, body: Any) -> list[Any]:
        data = body if isinstance(body, str) else json.dumps(body)
        async with self.http.post(self.url + path, data=data) as answer:
            text = await answer.text()
            return [answer.status, json.loads(text) if text.startswith(("{", "[")) else text]

    async def prompt(self, graph: Graph, **more: Any) -> list[Any]:
        return await self.post("/prompt", {"prompt": graph, "client_id": self.client_id, **more})

    @contextlib.asynccontextmanager
    async def socket(self, *, metadata: bool = True) -> AsyncIterator[None]:
        address = f"{self.url}/ws?clientId={self.client_id}"
        async with self.http.ws_connect(address) as socket:
            if metadata:
                hello = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
                await socket.send_json(hello)
            reading = asyncio.create_task(self._read(socket))
            await self.until(lambda m: m["type"] == ("feature_flags" if metadata else "status"))
            yield
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for frame in socket:
            if frame.type is aiohttp.WSMsgType.TEXT:
                self.messages.append(json.loads(frame.data))
            elif frame.type is aiohttp.WSMsgType.BINARY:
                self.messages.append({"type": "binary", "data": read_frame(frame.data)})

    async def until(self, wanted: Callable[[dict[str, Any]], bool], seconds: float = 30.0) -> dict[str, Any]:
        """The first message, from the beginning, that is wanted."""
        async with asyncio.timeout(seconds):
            while True:
                for message in self.messages:
                    if wanted(message):
                        return dict(message)
                await asyncio.sleep(0.01)

    async def ended(self, id_: str) -> dict[str, Any]:
        """Wait for the end of a prompt over the socket; its history entry."""
        await self.until(
            lambda m: (
                m["type"] == "executing" and m["data"]["node"] is None and m["data"].get("prompt_id") == id_
            )
        )
        return dict((await self.get(f"/history/{id_}"))[1][id_])

    async def run(self, graph: Graph) -> Any:
        """Run a graph; all that was said of it, and its history entry."""
        first = len(self.messages)
        status, answer = await self.prompt(graph)
        entry = await self.ended(answer["prompt_id"])
        return {"posted": [status, answer], "messages": self.messages[first:], "entry": entry}


def read_frame(data: bytes) -> dict[str, Any]:
    """A binary frame: what kind, what is said of it, and the size of the picture."""
    event, second = int.from_bytes(data[:4], "big"), int.from_bytes(data[4:8], "big")
    about: Any = second
    picture = data[8:]
    if event == 4:
        about, picture = json.loads(data[8 : 8 + second]), data[8 + second :]
    with Image.open(BytesIO(picture)) as image:
        return {"event": event, "about": about, "format": image.format, "size": list(image.size)}


def normal(value: Any, names: dict[str, str] | None = None) -> Any:
    """The value without what differs from run to run, and without prose."""
    names = {} if names is None else names
    if isinstance(value, dict):
        kept = {key: one for key, one in value.items() if key != "timestamp"}
        for key in ("traceback", "current_inputs"):
            if key in kept:
                kept[key] = f"<{type(kept[key]).__name__}>"
        for key in ("executed", "current_outputs", "dependent_outputs"):
            if isinstance(kept.get(key), list):
                kept[key] = sorted(kept[key])
        if isinstance(kept.get("errors"), list):
            kept["errors"] = sorted(kept["errors"], key=lambda error: error["details"])
        if isinstance(kept.get("input_config"), list):
            kept["input_config"] = spec_of(kept["input_config"])
        for key in ("fullpath", "number"):
            if key in kept:
                kept[key] = f"<{key}>"
        return {normal(key, names): normal(one, names) for key, one in kept.items()}
    if isinstance(value, list):
        return [normal(one, names) for one in value]
    if isinstance(value, str):
        value = re.sub(r"[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}", lambda m: _name(m[0], names), value)
        value = re.sub(r"temp_[a-z]{5}_", "temp_xxxxx_", value)
        value = re.sub(r"(ran out of memory on your GPU\.).*", r"\1", value, flags=re.DOTALL)  # advice follows
        return re.sub(r"/\S+/(\w+\.py)", r"<folder>/\1", value)
    return value


def _name(id_: str, names: dict[str, str]) -> str:
    return names.setdefault(id_, f"<id {len(names) + 1}>")


def without_states(messages: list[Any]) -> list[Any]:
    """Messages without the queue's lengths, which others' prompts change."""
    return [message for message in messages if message["type"] != "status"]


# -- the conversations ------------------------------------------------------------------------------------
LINE: Graph = {
    "1": empty(255, width=70),
    "2": node("ImageScale", image=["1", 0], upscale_method="bilinear", width=96, height=64, crop="center"),
    "3": node("RepeatImageBatch", image=["2", 0], amount=5),
    "4": node("CreateVideo", images=["3", 0], fps=16.0),
    "5": node("SaveVideo", video=["4", 0], filename_prefix="cap/line", format="auto", codec="auto"),
}


@scenario
async def a_line_of_nodes_and_the_same_again(talk: Talk) -> Any:
    async with talk.socket():
        return [await talk.run(LINE), await talk.run(LINE)]


@scenario
async def outputs_of_every_kind(talk: Talk) -> Any:
    graph: Graph = {
        "1": empty(1, batch_size=2),
        "2": save("1", "cap/img"),
        "3": node("PreviewImage", images=["1", 0]),
        "4": node("SaveWEBM", images=["1", 0], filename_prefix="cap/m", codec="vp9", fps=16.0, crf=32.0),
        "5": node(
            "SaveAnimatedWEBP",
            images=["1", 0],
            filename_prefix="cap/w",
            fps=8.0,
            lossless=False,
            quality=80,
            method="default",
        ),
        "6": node("RushesTestGifs", images=["1", 0], frame_rate=12.0, filename_prefix="cap/g"),
        "7": node("RushesTestSaveText", text="hello", filename_prefix="cap/t"),
    }
    async with talk.socket():
        entry = (await talk.run(graph))["entry"]
    return {"outputs": entry["outputs"], "meta": entry["meta"]}


@scenario
async def steps_and_previews(talk: Talk) -> Any:
    def graph(color: int) -> Graph:
        slow = node("RushesTestSleep", image=["1", 0], seconds=0.02, steps=2, preview=True)
        return {"1": empty(color), "2": slow, "3": save("2")}

    async with talk.socket():
        new = await talk.run(graph(2))
    async with talk.socket(metadata=False):
        old = await talk.run(graph(3))
    return [without_states(new["messages"]), without_states(old["messages"])]


@scenario
async def failures(talk: Talk) -> Any:
    told = []
    async with talk.socket():
        for class_, inputs in (
            ("RushesTestFail", {"reason": "no luck"}),
            ("RushesTestOutOfMemory", {"times": 1, "key": uuid.uuid4().hex}),
        ):
            done = await talk.run({"1": empty(4), "2": node(class_, image=["1", 0], **inputs), "3": save("2")})
            last = [m for m in done["messages"] if m["type"].startswith("execution_")]
            told.append([last, done["entry"]["status"], done["entry"]["outputs"]])
    return told


@scenario
async def an_interrupt_of_another_and_of_this(talk: Talk) -> Any:
    slow = node("RushesTestSleep", image=["1", 0], seconds=20.0, steps=1000)
    async with talk.socket():
        _, answer = await talk.prompt({"1": empty(5), "2": slow, "3": save("2")})
        id_ = answer["prompt_id"]
        await talk.until(lambda m: m["type"] == "progress")
        wrong = await talk.post("/interrupt", {"prompt_id": "another"})
        running = [entry[1] == id_ for entry in (await talk.get("/queue"))[1]["queue_running"]]
        right = await talk.post("/interrupt", {"prompt_id": id_})
        entry = await talk.ended(id_)
        kinds = ("execution_start", "execution_cached", "execution_interrupted", "execution_success")
        told = [m for m in talk.messages if m["type"] in kinds]
    return {"answers": [wrong, right], "running": running, "told": told, "entry": entry}


@scenario
async def the_queue_and_what_is_deleted_from_it(talk: Talk) -> Any:
    slow = node("RushesTestSleep", image=["1", 0], seconds=20.0, steps=1000)
    graph: Graph = {"1": empty(6), "2": slow, "3": save("2")}
    async with talk.socket():
        ids = [str(uuid.uuid4()) for _ in range(3)]
        answers = [
            await talk.prompt(graph, prompt_id=ids[0]),
            await talk.prompt(graph, prompt_id=ids[1], extra_data={"rushes": {"slot": "s"}}),
            await talk.prompt(graph, prompt_id=ids[2], front=True),
        ]
        await talk.until(lambda m: m["type"] == "progress")
        queue = (await talk.get("/queue"))[1]
        # As a client sees it: numbers depend on what ran before.
        shown = {key: [entry[1:] for entry in entries] for key, entries in queue.items()}
        deleted = await talk.post("/queue", {"delete": [ids[1], "unknown", ids[0]]})
        after = (await talk.get("/queue"))[1]
        cleared = await talk.post("/queue", {"clear": True})
        await talk.post("/interrupt", {})
        await talk.ended(ids[0])
        forgotten = await talk.post("/history", {"delete": [ids[0], "unknown"]})
        histories = [await talk.get(f"/history/{id_}") for id_ in ids]
    return {
        "answers": answers,
        "queue": shown,
        "deleted": [deleted, {key: [entry[1] for entry in entries] for key, entries in after.items()}],
        "cleared": [cleared, forgotten, histories],
    }


@scenario
async def prompts_that_are_refused(talk: Talk) -> Any:
    scale = {"image": ["1", 0], "upscale_method": "bogus", "width": 99999999, "crop": "center"}
    bad: Graph = {"1": node("LoadImage", image="missing.png"), "2": node("ImageScale", **scale), "3": save("2")}
    partial: Graph = {"1": empty(7), "2": save("1"), "3": node("LoadImage", image="zzz.png"), "4": save("3")}
    types: Graph = {"1": empty(width="wide"), "2": save("1")}
    video = node("SaveVideo", video=["2", 0], filename_prefix="x", format="auto", codec="auto")
    small: Graph = {"1": empty(), "2": node("CreateVideo", images=["1", 0], fps=0), "3": video}
    links: Graph = {"2": empty(), "3": video}
    async with talk.socket():
        answers = {
            "validation": await talk.prompt(bad),
            "types": await talk.prompt(types),
            "bounds": await talk.prompt(small),
            "links": await talk.prompt(links),
            "unknown node": await talk.prompt({"1": node("NopeNode")}),
            "no class": await talk.prompt({"1": {"inputs": {}}}),
            "no outputs": await talk.prompt({"1": empty()}),
            "no prompt": await talk.post("/prompt", {}),
            "broken JSON": await talk.post("/prompt", "{"),
            "partly valid": await talk.prompt(partial),
        }
        await talk.ended(answers["partly valid"][1]["prompt_id"])
    return answers


@scenario
async def one_id_twice(talk: Talk) -> Any:
    id_ = str(uuid.uuid4())
    async with talk.socket():
        answers = [await talk.prompt({"1": empty(n), "2": save("1")}, prompt_id=id_) for n in (8, 9)]
        while len([m for m in talk.messages if m["type"] == "executing" and m["data"]["node"] is None]) < 2:
            await asyncio.sleep(0.01)
        history = (await talk.get("/history"))[1]
    return [answers, len([one for one in history if one == id_])]


@scenario
async def a_socket_that_comes_back_in_mid_run(talk: Talk) -> Any:
    slow = node("RushesTestSleep", image=["1", 0], seconds=20.0, steps=1000)
    async with talk.socket():
        id_ = (await talk.prompt({"1": empty(10), "2": slow, "3": save("2")}))[1]["prompt_id"]
        await talk.until(lambda m: m["type"] == "progress")
    talk.messages.clear()
    async with talk.socket():
        told = await talk.until(lambda m: m["type"] == "executing")
        await talk.post("/interrupt", {"prompt_id": id_})
        await talk.ended(id_)
    return told


@scenario
async def uploads(talk: Talk) -> Any:
    async def upload(name: str, content: bytes, subfolder: str = "", **more: str) -> Any:
        form = aiohttp.FormData({"type": "input", "subfolder": subfolder, **more}, quote_fields=False)
        form.add_field("image", content, filename=name, content_type="image/png")
        async with talk.http.post(talk.url + "/upload/image", data=form) as answer:
            text = await answer.text()
            return [answer.status, json.loads(text) if text else ""]

    return [
        await upload("in_a.png", b"one", "req1"),
        await upload("in_a.png", b"one", "req1"),
        await upload("in_a.png", b"two", "req1"),
        await upload("in_a.png", b"three", "req1", overwrite="true"),
        await upload("in b.png", b"one"),
        await upload("x.png", b"one", "../../out"),
        await upload("../../x.png", b"one"),
    ]


@scenario
async def views(talk: Talk) -> Any:
    async with talk.socket():
        await talk.run({"1": empty(11), "2": save("1", "views/x")})
        answers = []
        for query in (
            {"filename": "x_00001_.png", "subfolder": "views", "type": "output"},
            {"filename": "nope.png", "subfolder": "views", "type": "output"},
            {"filename": "x_00001_.png", "subfolder": "views", "type": "nonsense"},
            {"filename": "../x.png"},
            {"filename": "x.png", "subfolder": "../../in"},
            {"subfolder": "views"},
        ):
            async with talk.http.get(talk.url + "/view", params=query) as answer:
                body = await answer.read()
                same = len(body) == int(answer.headers["Content-Length"])
                kept = {key: answer.headers.get(key) for key in ("Content-Type", "Content-Disposition")}
                answers.append(
                    [answer.status, kept if answer.status == 200 else {}, same, body[:4] == b"\x89PNG"]
                )
    return answers


@scenario
async def what_it_says_of_itself(talk: Talk) -> Any:
    async def shape(path: str) -> Any:
        status, answer = await talk.get(path)
        return [status, _shape(answer)]

    return [await shape("/system_stats"), await shape("/prompt"), (await talk.get("/features"))[1]]


@scenario
async def its_nodes(talk: Talk) -> Any:
    known = [*json.loads(STUB_NODES.read_text()), "RushesTestSleep", "RushesTestGifs", "RushesTestSaveText"]
    infos = {}
    for name in known:
        info = (await talk.get(f"/object_info/{name}"))[1][name]
        if name == "LoadImage":
            info["input"]["required"]["image"][0] = []
        info["python_module"] = re.sub(r"\..*rushes_test_nodes", ".rushes_test_nodes", info["python_module"])
        infos[name] = facts_of(info)
    return [infos, (await talk.get("/object_info/Nope"))]


def _shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shape(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_shape(one) for one in value[:1]]
    return type(value).__name__


async def transcript(name: str, url: str) -> Any:
    """What the server at ``url`` says in this conversation, as plain JSON."""
    async with aiohttp.ClientSession() as http:
        told = await SCENARIOS[name](Talk(url, http))
    return normal(json.loads(json.dumps(told)))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        comfy = Comfy("real", Path(folder)).start()
        try:
            told = {}
            for name in SCENARIOS:
                comfy.reset()
                told[name] = asyncio.run(transcript(name, comfy.url))
        finally:
            comfy.close()
    lines = [f' "{name}": {json.dumps(one)}' for name, one in told.items()]
    sys.stdout.write("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
