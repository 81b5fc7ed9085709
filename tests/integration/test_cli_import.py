"""`rushes models import`: files in, a model folder out, and what is said about it."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rushes.catalog.load import Catalog, load_model
from rushes.catalog.model import Model
from rushes.cli.exits import Exit
from rushes.cli.main import execute
from support.importing import OBJECT_INFO, object_info, template, text_to_image

INFO = ("--object-info", str(OBJECT_INFO))
Said = pytest.CaptureFixture[str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("RUSHES_")]:
        monkeypatch.delenv(name)
    return tmp_path


def save(file: Path, value: Any) -> Path:
    file.write_text(json.dumps(value), "utf-8")
    return file


def model_at(root: Path, id_: str) -> Model:
    return load_model(root / id_, root)


# -- formats ----------------------------------------------------------------------------------------------------
def test_the_api_format_becomes_a_model(here: Path, capfd: Said) -> None:
    save(here / "My Workflow (2).json", text_to_image())

    assert 0 == execute(["models", "import", "My Workflow (2).json", *INFO])

    out = capfd.readouterr().out
    model = model_at(here / "models", "local/my-workflow-2")
    assert "My Workflow (2)" == model.name
    assert ["6_text", "7_text", "5_widthx5_height", "3_seed", "3_steps", "3_cfg"] == [
        f.name for f in model.inputs
    ]
    assert all(field.name in out for field in model.inputs)
    assert ["graph.json", "model.toml", "sample.json"] == sorted(path.name for path in model.folder.iterdir())
    assert ["local"] == [path.name for path in (here / "models").iterdir()]


def test_the_pages_format_becomes_a_model(here: Path, capfd: Said) -> None:
    name = "video_wan2_2_14B_flf2v"
    save(here / f"{name}.json", template(name))

    assert 0 == execute(["models", "import", f"{name}.json", *INFO, "--id", "me/flf", "--into", "mine"])

    out = capfd.readouterr().out
    model = model_at(here / "mine", "me/flf")
    assert "video" == model.output
    assert "84.end_at_step = steps // 2" in out
    weights = {weight["file"]: weight for weight in model.options["comfyui"]["weights"]}
    assert "Comfy-Org/Wan_2.2_ComfyUI_Repackaged" == weights["wan_2.1_vae.safetensors"]["source"]


def picture(kind: str, file: Path, prompt: str, pages: str) -> None:
    """A picture with its workflow as ComfyUI's own nodes put it there (`nodes.py`, `nodes_images.py`)."""
    image = Image.new("RGB", (16, 16))
    if kind == "png":
        text = PngInfo()
        text.add_text("prompt", prompt)
        text.add_text("workflow", pages)
        image.save(file, pnginfo=text)
        return
    exif = image.getexif()
    exif[0x0110] = f"prompt:{prompt}"
    exif[0x010F] = f"workflow:{pages}"
    image.save(file, exif=exif)


def video(file: Path, prompt: str, pages: str) -> None:
    """As `comfy_api`'s save_to writes it: texts of the container."""
    with av.open(str(file), "w", options={"movflags": "use_metadata_tags"}) as container:
        container.metadata["prompt"] = prompt
        container.metadata["workflow"] = pages
        stream = container.add_stream("h264", rate=16)
        stream.width = stream.height = 64
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))))
        container.mux(stream.encode())


@pytest.mark.parametrize("kind", ["png", "webp", "mp4"])
def test_what_comfyui_saved_holds_its_workflow(here: Path, kind: str) -> None:
    address = "https://huggingface.co/a/b/resolve/main/c/model.safetensors"
    properties = {"models": [{"name": "model.safetensors", "url": address, "directory": "checkpoints"}]}
    pages = {"nodes": [{"type": "CheckpointLoaderSimple", "properties": properties}], "links": []}
    texts = json.dumps(text_to_image()), json.dumps(pages)
    file = here / f"made.{kind}"
    if kind == "mp4":
        video(file, *texts)
    else:
        picture(kind, file, *texts)

    assert 0 == execute(["models", "import", file.name])

    model = model_at(here / "models", "local/made")
    assert {"6_text": "a lighthouse in a storm"} == model.sample
    assert "a/b" == model.options["comfyui"]["weights"][0]["source"]


def test_the_body_of_a_call_to_comfyui_is_taken_apart(here: Path) -> None:
    save(here / "call.json", {"client_id": "x", "prompt": text_to_image(), "extra_data": {}})

    assert 0 == execute(["models", "import", "call.json", *INFO])

    assert "6_text" == model_at(here / "models", "local/call").inputs[0].name


def test_links_and_lists_are_told_apart(here: Path) -> None:
    graph = text_to_image()
    graph["8"]["inputs"]["samples"] = [3, 0]
    graph["9"]["inputs"] |= {"size": [512, 512], "names": ["a", "b", "c"]}
    save(here / "w.json", graph)

    assert 0 == execute(["models", "import", "w.json", *INFO])

    written = json.loads((here / "models" / "local" / "w" / "graph.json").read_text("utf-8"))
    assert ["3", 0] == written["8"]["inputs"]["samples"]
    assert {"__value__": [512, 512]} == written["9"]["inputs"]["size"]
    assert {"__value__": ["a", "b", "c"]} == written["9"]["inputs"]["names"]


def test_without_anybody_to_ask_the_api_format_is_enough(here: Path, capfd: Said) -> None:
    save(here / "w.json", text_to_image())

    assert 0 == execute(["models", "import", "w.json"])

    assert "no ComfyUI was asked" in capfd.readouterr().out


# -- where it goes ----------------------------------------------------------------------------------------------
def test_the_folder_is_that_of_the_settings(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: Said) -> None:
    (here / "catalog").mkdir()
    monkeypatch.setenv("RUSHES_MODELS_DIR", str(here / "catalog"))
    save(here / "w.json", text_to_image())

    assert 0 == execute(["models", "import", "w.json", *INFO, "--name", "Storms"])

    entry = Catalog.load(here / "catalog").get("local/w")
    assert entry is not None
    assert "Storms" == entry.model.name
    assert "export RUSHES_MODELS_DIR" not in capfd.readouterr().out


def test_what_comes_next_can_be_pasted(here: Path, capfd: Said) -> None:
    graph = text_to_image()
    graph["6"]["inputs"]["text"] = 'it\'s "quoted" & $HOME'
    save(here / "w.json", graph)

    assert 0 == execute(["models", "import", "w.json", *INFO])

    lines = [line for line in capfd.readouterr().out.splitlines() if line]
    export, check, run = map(shlex.split, lines[-3:])
    assert ["export", f"RUSHES_MODELS_DIR={here / 'models'}"] == export
    assert ["rushes", "models", "check", "local/w"] == check
    assert ["rushes", "run", "local/w", "-i", '6_text=it\'s "quoted" & $HOME'] == run


@pytest.mark.parametrize(
    ("prompt", "short"),
    [
        ("a lighthouse,\nin a storm; " * 30, "a lighthouse, in a storm; a lighthouse"),
        ("x" * 500, "x" * 40),
        ("@home", "@@home"),
    ],
)
def test_the_command_to_paste_is_short(here: Path, capfd: Said, prompt: str, short: str) -> None:
    graph = text_to_image()
    graph["6"]["inputs"]["text"] = prompt
    save(here / "w.json", graph)

    assert 0 == execute(["models", "import", "w.json", *INFO])

    last = capfd.readouterr().out.splitlines()[-1]
    assert ["rushes", "run", "local/w", "-i", f"6_text={short}"] == shlex.split(last)
    assert prompt == model_at(here / "models", "local/w").sample["6_text"]


def test_what_a_running_server_needs_is_said(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: Said) -> None:
    save(here / "w.json", text_to_image())
    said = f"a server shows it if it was started with RUSHES_MODELS_DIR={here / 'models'}:"

    assert 0 == execute(["models", "import", "w.json", *INFO])
    assert said in capfd.readouterr().out

    monkeypatch.setenv("RUSHES_MODELS_DIR", "models")
    assert 0 == execute(["models", "import", "w.json", *INFO, "--force"])
    assert said in capfd.readouterr().out


def test_an_empty_folder_for_models_is_none(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSHES_MODELS_DIR", "")
    save(here / "w.json", text_to_image())

    assert 0 == execute(["models", "import", "w.json", *INFO])

    assert ["models", "w.json"] == sorted(path.name for path in here.iterdir())


def test_an_id_that_hides_a_model_of_ours_is_noted(here: Path, capfd: Said) -> None:
    save(here / "w.json", text_to_image())
    id_ = "community/wan-2-2/first-last-frame"

    assert 0 == execute(["models", "import", "w.json", *INFO, "--id", id_])
    assert f"{id_} comes with Rushes, too" in capfd.readouterr().out

    assert 0 == execute(["models", "import", "w.json", *INFO])
    assert "comes with Rushes" not in capfd.readouterr().out


def test_a_model_that_is_there_is_not_written_over(here: Path, capfd: Said) -> None:
    save(here / "w.json", text_to_image())
    assert 0 == execute(["models", "import", "w.json", *INFO])
    manifest = here / "models" / "local" / "w" / "model.toml"
    manifest.write_text(manifest.read_text("utf-8").replace('title = "Prompt"', 'title = "Mine"'), "utf-8")

    assert Exit.USAGE == execute(["models", "import", "w.json", *INFO])

    assert "--force" in capfd.readouterr().err
    assert 'title = "Mine"' in manifest.read_text("utf-8")
    assert 0 == execute(["models", "import", "w.json", *INFO, "--force"])
    assert 'title = "Mine"' not in manifest.read_text("utf-8")


@pytest.mark.parametrize("id_", ["one", "Upper/case", "../out", "a/../b", "/etc/x", "a//b", "a/b/", "a/ü", "."])
def test_ids_that_are_none_are_refused_before_anything_is_written(here: Path, id_: str) -> None:
    save(here / "w.json", text_to_image())

    assert Exit.USAGE == execute(["models", "import", "w.json", *INFO, "--id", id_])

    assert ["w.json"] == [path.name for path in here.iterdir()]


@pytest.mark.parametrize(
    ("id_", "likely"),
    [
        ("foo", "local/foo"),
        ("Me/My Model", "me/my-model"),
        ("/", "local/name"),
        ("a/openapi.json", "a/openapi-json"),
    ],
)
def test_an_id_that_is_none_is_told_how_to_be_written(here: Path, capfd: Said, id_: str, likely: str) -> None:
    save(here / "w.json", text_to_image())

    assert Exit.USAGE == execute(["models", "import", "w.json", *INFO, "--id", id_])

    said = " ".join(capfd.readouterr().err.split())
    assert "an id is OWNER/NAME" in said
    assert said.endswith(f"such as {likely}")


# -- what cannot be imported ------------------------------------------------------------------------------------
def test_the_pages_format_needs_a_comfyui(here: Path, capfd: Said) -> None:
    save(here / "w.json", template("text_to_video_wan"))

    assert Exit.FAILED == execute(["models", "import", "w.json"])

    assert "--comfyui URL or --object-info FILE" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not JSON"),
        (b"[]", "this is no workflow"),
        (b"{}", "this is no workflow"),
        (b'{"name": "x", "scripts": {"build": "make"}}', "this is no workflow: there is no node in it"),
        (b'{"prompt": {"a": 1}}', "this is no workflow"),
        (b'{"1": {"inputs": {}}}', "no class_type"),
        (b'{"1": {"class_type": "SaveImage", "inputs": {"images": ["9", 0]}}}', "which is not in the graph"),
        (b"GIF89a", "holds no workflow"),
        (b"\x89PNG\r\n\x1a\nbroken", "cannot be read"),
        (b"", "holds no workflow"),
    ],
)
def test_files_that_hold_no_workflow_say_why(here: Path, capfd: Said, content: bytes, said: str) -> None:
    (here / "w.json").write_bytes(content)

    assert Exit.FAILED == execute(["models", "import", "w.json", *INFO])

    assert said in capfd.readouterr().err
    assert not (here / "models").exists()


def test_a_picture_without_a_workflow_says_so(here: Path, capfd: Said) -> None:
    Image.new("RGB", (16, 16)).save(here / "plain.png")

    assert Exit.FAILED == execute(["models", "import", "plain.png", *INFO])

    assert "holds no workflow" in capfd.readouterr().err


def test_a_file_that_is_not_there(here: Path, capfd: Said) -> None:
    assert Exit.FAILED == execute(["models", "import", "nowhere.json", *INFO])

    assert "nowhere.json: cannot be read: No such file" in capfd.readouterr().err


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', "{"])
def test_a_file_that_is_no_object_info(here: Path, capfd: Said, content: str) -> None:
    save(here / "w.json", text_to_image())
    (here / "info.json").write_text(content)

    assert Exit.FAILED == execute(["models", "import", "w.json", "--object-info", "info.json"])

    assert "info.json" in capfd.readouterr().err


def test_a_comfyui_that_does_not_answer(here: Path, capfd: Said) -> None:
    save(here / "w.json", text_to_image())

    assert Exit.FAILED == execute(["models", "import", "w.json", "--comfyui", "http://127.0.0.1:9"])

    assert "no ComfyUI answers at http://127.0.0.1:9" in capfd.readouterr().err


def test_one_source_of_descriptions_is_enough(here: Path) -> None:
    save(here / "w.json", text_to_image())

    assert Exit.USAGE == execute(["models", "import", "w.json", *INFO, "--comfyui", "http://127.0.0.1:9"])


def test_exposing_what_is_not_there_writes_nothing(here: Path, capfd: Said) -> None:
    save(here / "w.json", text_to_image())

    assert Exit.FAILED == execute(["models", "import", "w.json", *INFO, "--expose", "3.step"])

    assert "did you mean steps?" in capfd.readouterr().err
    assert not (here / "models").exists()


def test_exposing_a_path_is_refused(here: Path, capfd: Said) -> None:
    save(here / "w.json", text_to_image())

    assert Exit.FAILED == execute(["models", "import", "w.json", *INFO, "--expose", "9.filename_prefix"])

    said = capfd.readouterr().err
    assert "--expose 9.filename_prefix: it names a path on ComfyUI's disk, which no request may choose" in said
    assert not (here / "models").exists()


# -- the converter ----------------------------------------------------------------------------------------------
def test_without_the_converter_the_error_says_what_to_install(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: Said
) -> None:
    monkeypatch.setitem(sys.modules, "comfy_cli", None)  # how Python notes that there is no such package
    save(here / "w.json", template("text_to_video_wan"))

    assert Exit.FAILED == execute(["models", "import", "w.json", *INFO])

    assert "pip install 'rushes[import]'" in capfd.readouterr().err


def test_the_converter_leaves_nothing_in_the_home(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = here / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    save(here / "w.json", template("text_to_video_wan"))

    assert 0 == execute(["models", "import", "w.json", *INFO])

    assert [] == list(home.iterdir())


def test_a_workflow_that_the_converter_refuses(here: Path, capfd: Said) -> None:
    save(here / "w.json", {"nodes": [], "links": {}})

    assert Exit.FAILED == execute(["models", "import", "w.json", *INFO])

    assert "cannot be converted" in capfd.readouterr().err


def test_a_class_that_the_server_does_not_have_is_said(here: Path, capfd: Said) -> None:
    info = object_info()
    del info["ModelSamplingSD3"]
    save(here / "info.json", info)
    save(here / "w.json", template("text_to_video_wan"))

    assert 0 == execute(["models", "import", "w.json", "--object-info", "info.json"])

    assert "this ComfyUI has no ModelSamplingSD3" in capfd.readouterr().out
