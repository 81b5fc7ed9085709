"""The models that come with Rushes, each as its graph on a real ComfyUI with tiny weights, to real files.

Runs where ``COMFYUI_DIR`` names a ComfyUI; see `support.comfyui`. The weights are random and of a few MB, under
the official names: what is checked is that every node, link, name and size is right, not what is in the pictures.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import av
import numpy as np
import pytest
from PIL import Image

from rushes.catalog import load
from rushes.catalog.bindings import Binder
from rushes.catalog.manifest import read_manifest
from rushes.catalog.model import Model
from rushes.catalog.resolution import parse_resolution
from rushes.catalog.roles import roles_of
from rushes.catalog.samples import sample_path
from rushes.catalog.workflow import Graph, Workflow, read_graph, workflow_of
from rushes.engines.base import Job, Produced
from rushes.engines.comfyui.engine import ComfyUIEngine
from rushes.engines.comfyui.patch import with_loras
from rushes.requests.record import Progress
from support.comfyui import START_SECONDS, TESTS, Comfy, real_dir, real_python

FLF: Final = "community/wan-2-2/first-last-frame"
VACE: Final = "community/wan-2-2/vace-fun"
FUSIONX: Final = "community/wan-2-1/fusionx/image-to-video"
T2I: Final = "wan-ai/wan-2-5/text-to-image"
FRAMES: Final = 5
FPS: Final = 18

pytestmark = [
    pytest.mark.skipif(real_dir() is None, reason="COMFYUI_DIR names no ComfyUI"),
    pytest.mark.timeout(300),  # full sizes on two CPU cores
]


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    """A ComfyUI that knows tiny weights under the official names."""
    folder, weights = real_dir(), tmp_path_factory.mktemp("weights")
    assert folder is not None
    script = TESTS / "support" / "tiny_wan.py"
    environment = dict(os.environ) | {"PYTHONPATH": os.environ.get("COMFYUI_PYTHONPATH", "")}
    subprocess.run([real_python(folder), script, folder, weights], env=environment, check=True, timeout=120)
    paths = ("--extra-model-paths-config", str(weights / "paths.yaml"))
    server = Comfy("real", tmp_path_factory.mktemp("wan"), arguments=paths)
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture(scope="module")
def engine(comfy: Comfy) -> Iterator[ComfyUIEngine]:
    driver = ComfyUIEngine(comfy.url, identity="test", start_seconds=START_SECONDS)
    yield driver
    driver.close()


def model_of(id_: str) -> Model:
    root = Path(load.__file__).parent / "models"
    return read_manifest(root / id_, root)


def sample(name: str) -> Path:
    path = sample_path(name)
    assert path is not None, name
    return path


def parts(id_: str) -> tuple[Model, Workflow, Graph]:
    model = model_of(id_)
    workflow = workflow_of(model)
    return model, workflow, read_graph(model, workflow)


def input_of(model: Model, size: str) -> dict[str, Any]:
    """The model's own defaults, but few steps and frames: these are checked before an engine sees them."""
    small = {"resolution": size, "frames": FRAMES, "fps": FPS, "steps": 3, "prompt": "a puppy in the street"}
    own = model.sample | {field.name: field.default for field in model.inputs if field.default is not None}
    return own | {field.name: small[field.role] for field in model.inputs if field.role in small}


def job_of(id_: str, size: str, folder: Path, request: str = "r1") -> Job:
    model = model_of(id_)
    given = input_of(model, size)
    files = {name: sample(given[name]) for name in model.files()}
    of_files = {field.role: str(files[field.name]) for field in model.inputs if field.name in files}
    folder.mkdir()
    return Job(request, 1, model, given, roles_of(model, given) | of_files, files, folder)


def decoded(path: Path) -> tuple[int, int, int, float]:
    """(width, height, frames, frames per second) of a video, all of it decoded."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [(frame.width, frame.height) for frame in container.decode(stream)]
        assert 1 == len(set(frames))
        assert stream.average_rate is not None
        return (*frames[0], len(frames), float(stream.average_rate))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def check(made: list[Produced], id_: str, size: str) -> None:
    width, height = parse_resolution(size)
    (one,) = made
    assert (width, height) == (one.width, one.height)
    if T2I == id_:
        assert ("image", "image/png", 1) == (one.kind, one.content_type, one.frames)
        assert (height, width, 3) == pixels(one.path).shape
        assert pixels(one.path).std() > 5  # something of everywhere, not one colour
        return
    assert ("video", "video/mp4", FRAMES, FPS) == (one.kind, one.content_type, one.frames, one.fps)
    assert (width, height, FRAMES, FPS) == decoded(one.path)


# -- to real files --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", ["64x64", "72x56"])
@pytest.mark.parametrize("id_", [FLF, VACE, FUSIONX, T2I])
def test_small(engine: ComfyUIEngine, tmp_path: Path, id_: str, size: str) -> None:
    """72x56 is no multiple of 16: 80x64 is generated and cut."""
    seen: list[Progress] = []

    made = engine.run(job_of(id_, size, tmp_path / "out"), seen.append)

    check(made, id_, size)
    assert seen


@pytest.mark.parametrize(
    ("id_", "size"),
    [
        (FLF, "540x960 (9:16)"),
        (VACE, "960x540 (16:9)"),
        (FUSIONX, "540x960 (9:16)"),
        (T2I, "1024:1365 (3:4)"),
    ],
)
def test_full_sizes_that_are_no_multiple_of_16(
    engine: ComfyUIEngine, tmp_path: Path, id_: str, size: str
) -> None:
    assert size in (next(field.enum for field in model_of(id_).inputs if field.role == "resolution") or ())

    made = engine.run(job_of(id_, size, tmp_path / "out"), lambda progress: None)

    check(made, id_, size)


def test_one_text_twice_makes_two_images(engine: ComfyUIEngine, tmp_path: Path) -> None:
    first, second = (
        engine.run(job_of(T2I, "64x64", tmp_path / name, name), lambda progress: None)[0] for name in ("a", "b")
    )

    assert (pixels(first.path) != pixels(second.path)).any()


# -- on the same server, by hand ------------------------------------------------------------------------------
def picture(comfy: Comfy, graph: Graph, output: str) -> np.ndarray:
    entry = comfy.entry(comfy.queue_prompt(graph), 60)
    assert "success" == entry["status"]["status_str"], entry["status"]
    (file,) = entry["outputs"][output]["images"]
    return pixels(comfy.output_dir / file["subfolder"] / file["filename"])


@pytest.mark.parametrize("size", ["540x960", "960x540", "480x480"])
def test_images_are_fitted_and_cropped_without_being_moved_or_stretched(comfy: Comfy, size: str) -> None:
    """The way of the start image, with the model between fitting and cropping left out, is that of one crop."""
    model, workflow, graph = parts(FLF)
    given = input_of(model, size)
    width, height = parse_resolution(size)
    source = sample(given["68_image"])
    (comfy.input_dir / "fit.png").write_bytes(source.read_bytes())
    bound = Binder(model, workflow, graph).bind(
        given, roles_of(model, given), dict.fromkeys(model.files(), "fit.png")
    )
    way = {id_: bound[id_] for id_ in ("68", "71", "74")}
    way["74"]["inputs"]["image"] = ["71", 0]
    way["1"] = {"class_type": "SaveImage", "inputs": {"images": ["74", 0], "filename_prefix": "fit"}}

    fitted = picture(comfy, way, "1")

    with Image.open(source) as image:
        full = image.convert("RGB")
    scale = max(width / full.width, height / full.height)
    across, down = width / scale, height / scale
    left, top = (full.width - across) / 2, (full.height - down) / 2
    wanted = np.asarray(
        full.resize((width, height), Image.Resampling.LANCZOS, (left, top, left + across, top + down))
    )
    assert wanted.shape == fitted.shape
    differences = [
        np.abs(np.roll(wanted.astype(int), shift, (0, 1))[8:-8, 8:-8] - fitted[8:-8, 8:-8]).mean()
        for shift in ((0, 0), (0, 4), (0, -4), (4, 0), (-4, 0))
    ]
    assert differences[0] < 3  # of 255
    assert differences[0] == min(differences)


@pytest.mark.parametrize("id_", [FLF, VACE, FUSIONX, T2I])
def test_a_lora_behind_the_nodes_that_the_manifest_names_changes_the_result(comfy: Comfy, id_: str) -> None:
    model, workflow, graph = parts(id_)
    given = input_of(model, "64x64")
    for name in model.files():
        (comfy.input_dir / "lora.png").write_bytes(sample(given[name]).read_bytes())
    binder = Binder(model, workflow, graph, draw_seed=lambda low, high: 7)
    bound = binder.bind(given, roles_of(model, given), dict.fromkeys(model.files(), "lora.png"))
    crop = next(node_id for node_id, node in bound.items() if "ImageCrop" == node["class_type"])
    bound["first"] = {
        "class_type": "ImageFromBatch",
        "inputs": {"image": [crop, 0], "batch_index": 0, "length": 1},
    }
    bound["save"] = {"class_type": "SaveImage", "inputs": {"images": ["first", 0], "filename_prefix": "lora"}}

    def made(scale: float) -> np.ndarray:
        loras = [{"path": "tiny_wan_lora.safetensors", "scale": scale}]
        return picture(comfy, with_loras(bound, workflow.loras, loras), "save")

    assert (made(1.0) != made(0.0)).any()
    assert (picture(comfy, bound, "save") == made(0.0)).all()
