"""A `rushes serve` whose engine is `wan` on tiny weights: what it serves, how it is asked, and what it made."""

import io
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, NamedTuple

import av
from PIL import Image

from rushes.catalog.load import BUILTIN, load_model
from rushes.catalog.wan import WanModel, wan_of
from rushes.requests.record import Request
from support.hub import Hub, Repository
from support.server import Server, eventually
from support.tiny_diffusers import Kind, save_lora

TEXT: Final = "wan-ai/wan-2-5/text-to-image"
FUSIONX: Final = "community/wan-2-1/fusionx/image-to-video"
FIRST_LAST: Final = "community/wan-2-2/first-last-frame"
VACE: Final = "community/wan-2-2/vace-fun"
KINDS: Final[dict[str, Kind]] = {
    TEXT: "text-two-experts",
    FUSIONX: "image",
    FIRST_LAST: "image-two-experts",
    VACE: "vace-two-experts",
}
"""Which tiny pipeline is of the kind of which built-in model's weights."""

PLAIN, BROKEN = "tiny/plain", "tiny/broken"
"""Models of text and nothing else; the weights of the second are not there at first."""
TIME_LIMIT: Final = 15.0
"""Of the first; seconds. Short for a job that never ends, long for one whose machine is busy."""
_MANIFEST: Final = """
name = "Tiny"
description = "A model of the tests."
categories = ["text-to-video"]
output = "video"
time_limit = {time_limit}
required = ["prompt"]
[[inputs]]
name = "prompt"
title = "Prompt"
type = "string"
role = "prompt"
[[inputs]]
name = "size"
title = "Size"
type = "string"
role = "resolution"
default = "48x32"
[[inputs]]
name = "frames"
title = "Frames"
type = "integer"
role = "frames"
default = 9
[[inputs]]
name = "seed"
title = "Seed"
type = "integer"
role = "seed"
default = 7
[[inputs]]
name = "steps"
title = "Steps"
type = "integer"
role = "steps"
minimum = 1
maximum = 100000
default = 3
[engines.wan]
weights = "{weights}"
guidance = 3.0
fps = 12
"""


class WanServer(Server):
    """With variables of its own besides the settings; one thread of computing for each of its processes, which share
    the cores with each other and with the other tests.
    """

    def __init__(self, data_dir: Path, *, environ: Mapping[str, str] | None = None, **settings: object) -> None:
        defaults = {"engine": "wan", "wan_device": "cpu", "lease_seconds": 10}
        super().__init__(data_dir, **{**defaults, **settings})
        self._environ = {"OMP_NUM_THREADS": "1", **(environ or {})}

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | self._environ

    def wait(self) -> None:
        """Until it answers, after :meth:`spawn`."""
        eventually(self._ready, 60, "the server is ready")
        self.take_key()

    def end(self) -> None:
        """By force, where it runs yet."""
        if self.process is not None and self.process.poll() is None:
            self.kill_everything()

    # -- asking ----------------------------------------------------------------------------------------
    def ask(self, model: str, **values: Any) -> str:
        """Submit; the request's id."""
        answer = self.call("POST", f"/v1/models/{model}", json={**values})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["request_id"])

    def upload(self, content: bytes) -> str:
        """The address of a file."""
        answer = self.call("POST", "/v1/files", content=content, headers={"X-File-Name": "picture"})
        assert answer.is_success, answer.text
        return str(answer.json()["url"])

    def upload_png(self, picture: Image.Image) -> str:
        file = io.BytesIO()
        picture.save(file, "PNG")
        return self.upload(file.getvalue())

    def succeeded(self, id_: str, seconds: float = 60.0) -> dict[str, Any]:
        result = self.finished(id_, seconds)
        assert result["status"] == "succeeded", (result, self.log.read_text()[-4000:])
        return result

    def finished(self, id_: str, seconds: float = 60.0) -> dict[str, Any]:
        """The result, once it is there; asked for rarely, since its work has the same cores."""

        def ended() -> dict[str, Any] | None:
            result = self.result(id_)
            if result["status"] in ("succeeded", "failed", "cancelled"):
                return result
            time.sleep(0.1)
            return None

        return dict(eventually(ended, seconds, f"{id_} has an outcome"))

    def failed(self, id_: str, seconds: float = 60.0) -> dict[str, Any]:
        """The error."""
        result = self.finished(id_, seconds)
        assert result["status"] == "failed", result
        return dict(result["error"])

    def made(self, id_: str, seconds: float = 60.0) -> bytes:
        """The stored file of a request, once it has succeeded."""
        (file,) = self.succeeded(id_, seconds)["files"]
        answer = self.call("GET", file["url"])
        assert answer.status_code == 200, answer.text
        assert file["size"] == len(answer.content)
        return answer.content

    def record(self, id_: str) -> Request:
        found = self.with_store(lambda store: store.get(id_))
        assert found is not None
        return found

    # -- looking ---------------------------------------------------------------------------------------
    def events(self, name: str, **fields: Any) -> list[dict[str, Any]]:
        """Those of the log with this name and these fields."""
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("{")]
        told = [json.loads(line) for line in lines]
        return [one for one in told if {"event": name, **fields}.items() <= one.items()]


class Video(NamedTuple):
    width: int
    height: int
    frames: int
    fps: Fraction


def decoded_video(content: bytes) -> Video:
    """What a player finds in the file: every frame is decoded."""
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.video[0]
        frames = [(frame.width, frame.height) for frame in container.decode(stream)]
        assert stream.average_rate is not None
        (size,) = set(frames)
        return Video(*size, len(frames), stream.average_rate)


def decoded_image(content: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(content))
    picture.load()
    return picture


# -- the models that are served ------------------------------------------------------------------------------
def shrink(id_: str, root: Path) -> None:
    """Copy a built-in model into a models folder, its sizes a tenth, so that ``54x96 (9:16)`` is 540x960's, and with
    9 frames to choose besides.
    """
    folder = _copied(id_, root)
    for name in ("model.toml", "sample.json"):
        text = (folder / name).read_text("utf-8")
        smaller = re.sub(r'"(\d+)x(\d+) \(', lambda size: f'"{int(size[1]) // 10}x{int(size[2]) // 10} (', text)
        (folder / name).write_text(smaller.replace("[81, 141]", "[9, 81, 141]"), "utf-8")


def shorten(id_: str, root: Path, steps: int) -> None:
    """Copy a built-in model whose manifest says how many steps it takes, with fewer."""
    folder = _copied(id_, root)
    text = (folder / "model.toml").read_text("utf-8")
    fewer, found = re.subn(r"(?m)^steps = 20$", f"steps = {steps}", text)
    assert found == 1, f"{folder} has no steps of its own"
    (folder / "model.toml").write_text(fewer, "utf-8")


def _copied(id_: str, root: Path) -> Path:
    return Path(shutil.copytree(BUILTIN / id_, root / id_))


def add_plain(id_: str, root: Path, weights: Path, time_limit: float) -> None:
    """A model of text and nothing else, with any number of steps."""
    folder = root / id_
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text(_MANIFEST.format(time_limit=time_limit, weights=weights), "utf-8")
    (folder / "sample.json").write_text('{"prompt": "a cat"}', "utf-8")


def of_hub(files: Mapping[str, bytes], commit: str) -> Repository:
    """What a hub has under the commit that a manifest names."""
    return Repository(commits={commit: dict(files)}, branches={"main": commit})


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {os.fspath(path.relative_to(folder)): path.read_bytes() for path in paths}


# -- the servers ---------------------------------------------------------------------------------------------
def builtin_server(root: Path, hub: Hub, weights: Mapping[str, Path]) -> WanServer:
    """The built-in manifests with smaller videos, fewer steps, and folders for their pipelines. The LoRA of FusionX
    comes from the hub, as its manifest says.
    """
    models = root / "models"
    for id_ in (FUSIONX, FIRST_LAST, VACE):
        shrink(id_, models)
    shorten(TEXT, models, steps=2)
    (lora,) = builtin_table(FUSIONX).loras
    hub.add(lora.source, {lora.path: save_lora(root / "fusionx.safetensors").read_bytes()})
    return WanServer(
        root / "builtin",
        environ=hub.environ(root / "home", HF_HUB_OFFLINE="0"),
        models_dir=models,
        models=",".join(KINDS),
        wan_weights=",".join(f"{id_}={folder}" for id_, folder in weights.items()),
        warm_age_seconds=300,
        drain_seconds=25,
    )


def faulty_server(root: Path, weights: Path, broken: Path, holds: Path) -> WanServer:
    """:data:`PLAIN` and :data:`BROKEN`, with an engine that takes orders; ``holds`` is for its held requests."""
    holds.mkdir()
    add_plain(PLAIN, root / "faulty-models", weights, TIME_LIMIT)
    add_plain(BROKEN, root / "faulty-models", broken, 60)
    return WanServer(
        root / "faulty",
        engine="support.wan_faults:make",
        models_dir=root / "faulty-models",
        models="tiny/*",
        test_holds=holds,
        drain_seconds=1,
    )


def turbo_server(root: Path, hub: Hub, id_: str, weights: Path) -> WanServer:
    """One built-in model, smaller, with all that it needs on the hub at the commits that its manifest names."""
    shrink(id_, root / "turbo-models")
    wan = builtin_table(id_)
    hub.repositories[wan.weights] = of_hub(contents(weights), wan.revision)
    assert wan.turbo is not None
    files = {
        lora.path: save_lora(root / f"{seed}.safetensors", seed=seed).read_bytes()
        for seed, lora in enumerate(wan.turbo.loras)
    }
    (place,) = {(lora.source, lora.revision) for lora in wan.turbo.loras}
    hub.repositories[place[0]] = of_hub(files, place[1])
    return WanServer(
        root / "turbo",
        environ=hub.environ(root / "turbo-home", HF_HUB_OFFLINE="0"),
        models_dir=root / "turbo-models",
        models=id_,
        wan_profile="turbo",
    )


def builtin_table(id_: str) -> WanModel:
    """What the manifest of a built-in model says to this engine."""
    return wan_of(load_model(BUILTIN / id_, BUILTIN))
