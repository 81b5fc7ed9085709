"""`rushes models import`, `rushes serve`, `rushes run`: from a workflow to a file.

On the stub with a small workflow; on a real ComfyUI (see `support.comfyui`) with official Wan workflows and tiny
weights under the names that they ask for.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import pytest

from rushes.catalog.load import load_model
from rushes.catalog.model import Model
from rushes.cli.main import execute
from support.comfyui import TESTS, Comfy, real_dir, real_python
from support.importing import node, template
from support.server import Server

Serve = Callable[[Comfy], Server]
TINY = {
    "diffusion_models/wan2.1_vace_14B_fp16.safetensors": "wan2.2_fun_vace_high_noise_14B_fp8_scaled.safetensors",
    "diffusion_models/wan2.1_i2v_480p_14B_fp16.safetensors": "Wan14Bi2vFusioniX.safetensors",
    "diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors": "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
    "loras/Wan21_CausVid_14B_T2V_lora_rank32.safetensors": "tiny_wan_lora.safetensors",
    "text_encoders/umt5_xxl_fp16.safetensors": "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
}
"""Weights of the official workflows, and those of `support.tiny_wan` that stand in for them."""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of models, as the settings name it."""
    for name in [name for name in os.environ if name.startswith("RUSHES_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "catalog"
    folder.mkdir()
    monkeypatch.setenv("RUSHES_MODELS_DIR", str(folder))
    return folder


@pytest.fixture
def serve(tmp_path: Path, root: Path) -> Iterator[Serve]:
    made: list[Server] = []

    def start(comfy: Comfy) -> Server:
        server = Server(tmp_path / "data", engine="comfyui", comfyui_urls=comfy.url, models_dir=root)
        made.append(server)
        return server.start()

    yield start
    for server in made:
        if server.process is not None and server.process.poll() is None:
            server.kill_everything()


def imported(file: Path, root: Path, *options: str) -> Model:
    assert 0 == execute(["models", "import", str(file), "--id", "me/imported", *options])
    return load_model(root / "me" / "imported", root)


def made_by(server: Server, model: Model, tmp_path: Path, *inputs: str) -> list[Path]:
    """Run the sample with some inputs changed, by the command line; the files that came of it."""
    sample = tmp_path / "sample-input.json"
    sample.write_text(json.dumps(model.sample))
    options = [word for one in inputs for word in ("-i", one)]
    where = ("--base-url", server.url, "--api-key", server.key, "--output-dir", str(tmp_path / "made"))
    server.command("run", model.id, "--input", f"@{sample}", *options, *where)
    return [
        file for file in (tmp_path / "made").rglob("*") if file.suffix in (".mp4", ".webm", ".png", ".webp")
    ]


def decoded(path: Path) -> tuple[int, int, int, float]:
    """(width, height, frames, frames per second) of a video, all of it decoded."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [(frame.width, frame.height) for frame in container.decode(stream)]
        assert stream.average_rate is not None
        return (*frames[0], len(frames), float(stream.average_rate))


def test_a_workflow_becomes_a_model_that_makes_files(
    comfy: Comfy, root: Path, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph: dict[str, Any] = {
        "1": node("LoadImage", image="somebody's.png"),
        "2": node("ImageScale", image=["1", 0], upscale_method="area", width=96, height=64, crop="center"),
        "3": node("PrimitiveInt", "How many frames", value=3),
        "4": node("RepeatImageBatch", image=["2", 0], amount=["3", 0]),
        "5": node("CreateVideo", images=["4", 0], fps=8),
        "6": node("SaveVideo", video=["5", 0], filename_prefix="video/x", format="auto", codec="auto"),
    }
    file = tmp_path / "workflow.json"
    file.write_text(json.dumps(graph))
    monkeypatch.setenv("RUSHES_COMFYUI_URLS", comfy.url)
    model = imported(file, root)
    assert ["1_image", "2_widthx2_height", "5_fps", "3_value"] == [field.name for field in model.inputs]

    (video,) = made_by(serve(comfy), model, tmp_path, "5_fps=12", "3_value=5")

    assert (96, 64, 5, 12) == decoded(video)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    """A real ComfyUI that has the weights of the official workflows, a few MB each."""
    folder, weights = real_dir(), tmp_path_factory.mktemp("weights")
    assert folder is not None
    script = TESTS / "support" / "tiny_wan.py"
    environment = dict(os.environ) | {"PYTHONPATH": os.environ.get("COMFYUI_PYTHONPATH", "")}
    subprocess.run([real_python(folder), script, folder, weights], env=environment, check=True, timeout=120)
    for wanted, tiny in TINY.items():
        shutil.copyfile((weights / wanted).parent / tiny, weights / wanted)
    paths = ("--extra-model-paths-config", str(weights / "paths.yaml"))
    server = Comfy("real", tmp_path_factory.mktemp("wan"), arguments=paths)
    try:
        yield server.start()
    finally:
        server.close()


@pytest.mark.skipif(real_dir() is None, reason="COMFYUI_DIR names no ComfyUI")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "size", "steps", "frames", "fps"),
    [
        ("video_wan2_2_14B_flf2v", "81_widthx81_height", "84_steps", "81_length", "86_fps"),
        ("video_wan_vace_14B_ref2v", "109_widthx109_height", "108_steps", "109_length", "68_fps"),
        ("text_to_video_wan", "40_widthx40_height", "3_steps", "40_length", "49_fps"),
        ("image_to_video_wan", "50_widthx50_height", "3_steps", "50_length", "55_fps"),
    ],
)
def test_official_workflows_make_files(
    wan: Comfy,
    root: Path,
    serve: Serve,
    tmp_path: Path,
    name: str,
    size: str,
    steps: str,
    frames: str,
    fps: str,
) -> None:
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(template(name)))
    model = imported(file, root, "--comfyui", wan.url)
    manifest = model.folder / "model.toml"
    edited = manifest.read_text("utf-8").replace("enum = [17, 33", "enum = [5, 17, 33")
    edited = edited.replace('(16:9)",\n]', '(16:9)",\n  "64x80",\n]')  # as one edits it for a small machine
    manifest.write_text(edited, "utf-8")

    inputs = (f"{size}=64x80", f"{steps}=3", f"{frames}=5", f"{fps}=10")
    (video,) = made_by(serve(wan), model, tmp_path, *inputs)

    assert (64, 80, 5, 10) == decoded(video)
