"""`rushes models check` and `rushes doctor` against ComfyUI servers and folders; catalogue.py itself."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from rushes.cli.checking import check
from rushes.cli.comfyui import check_comfyui
from rushes.cli.doctor import doctor
from rushes.engines.comfyui.catalogue import (
    Installation,
    describe,
    fetch_object_info,
    fetch_system_stats,
    fetch_weights,
    sha256_of,
)
from rushes.errors import EngineError, ManifestError, NotFound, SettingsError
from rushes.settings import Settings
from rushes.wiring import DATABASE
from support.comfyui import Comfy, kinds
from support.server import free_port

FLF = "community/wan-2-2/first-last-frame"
GRAPH = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
}
MANIFEST = """
name = "Mine"
output = "image"
required = ["1_color"]
graph = "graph.json"
[[inputs]]
name = "1_color"
title = "Colour"
type = "integer"
minimum = 0
maximum = 16777215
default = 1
"""
WEIGHTS = """
[[engines.comfyui.weights]]
file = "a/w.safetensors"
folder = "unet"
source = "me/w"
bytes = 4
sha256 = "{digest}"
"""


@pytest.fixture(scope="module", params=kinds())
def comfy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    server = Comfy(request.param, tmp_path_factory.mktemp("comfy"))
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "me" / "mine"
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text(MANIFEST)
    (folder / "graph.json").write_text(json.dumps(GRAPH))
    return tmp_path / "models"


@pytest.fixture
def run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, command: Any = check, **settings: str) -> Result:
        environment = {"RUSHES_MODELS_DIR": str(models), **settings}
        result = CliRunner(env=environment).invoke(command, list(arguments), standalone_mode=False)
        if result.exception is not None:
            raise result.exception
        return result

    return call


@pytest.fixture
def answering() -> Iterator[Callable[[dict[str, Any]], str]]:
    """Starts a server that answers these paths with JSON (or, for str, with that text) and 404 else."""
    servers = []

    def start(answers: dict[str, Any]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                value = answers.get(self.path)
                body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
                self.send_response(404 if value is None else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def installation(tmp_path: Path) -> Path:
    """A ComfyUI's folder, as small as it can be, with weights in places of `extra_model_paths.yaml`."""
    folder = tmp_path / "ComfyUI"
    for name in ("comfy_extras", "custom_nodes/My-Pack", "custom_nodes/Off.disabled", "models/unet/a"):
        (folder / name).mkdir(parents=True)
    (folder / "main.py").write_text("")
    (folder / "nodes.py").write_text('NODE_CLASS_MAPPINGS = {"EmptyImage": EmptyImage}')
    (folder / "comfy_extras" / "more.py").write_text("io.Schema(node_id='SaveImage')")
    (folder / "custom_nodes" / "Off.disabled" / "x.py").write_text('"Switched"')
    (folder / "models" / "unet" / "a" / "w.safetensors").write_bytes(b"good")
    shelf = tmp_path / "shelf"
    (shelf / "vae").mkdir(parents=True)
    (shelf / "vae" / "v.safetensors").write_bytes(b"v")
    (shelf / "vae" / "readme.txt").write_text("no weights")
    (folder / "extra_model_paths.yaml").write_text(
        f"mine:\n  base_path: {shelf}\n  is_default: true\n  vae: vae/\n  clip: |\n    te\n    te2\n"
        "other:\n  loras: ../loras\n"
    )
    return folder


# -- the command -----------------------------------------------------------------------------------------
def test_a_model_that_fits_its_server(run: Callable[..., Result], comfy: Comfy) -> None:
    result = run("me/mine", "--comfyui", comfy.url)
    said = f"1 model(s) read; 0 error(s), 0 warning(s)\n1 of 1 can run on {comfy.url}\n"
    assert (0, said) == (result.return_value, result.stdout)
    assert "" == result.stderr


def test_the_servers_of_the_settings_are_asked_unless_offline(run: Callable[..., Result], comfy: Comfy) -> None:
    result = run(FLF, "--json", RUSHES_COMFYUI_URLS=comfy.url)
    value = json.loads(result.stdout)
    assert 1 == result.return_value
    assert [comfy.url] == value["comfyui"]
    assert {"missing_node"} >= {one["kind"] for one in value["findings"]} - {"missing_weights"}
    assert value["findings"]
    assert all(one["model"] == FLF and one["fix"] for one in value["findings"])
    result = run(FLF, "--offline", RUSHES_COMFYUI_URLS=comfy.url)
    assert 0 == result.return_value
    assert "No ComfyUI was asked" in result.stderr


def test_an_error_is_said_with_its_place_and_the_next_step(
    run: Callable[..., Result], comfy: Comfy, models: Path
) -> None:
    graph = json.loads(json.dumps(GRAPH))
    graph["1"]["class_type"] = "EmptyImag"
    (models / "me" / "mine" / "graph.json").write_text(json.dumps(graph))
    result = run("me/mine", "--comfyui", comfy.url)
    lines = result.stdout.splitlines()
    assert 1 == result.return_value
    assert "me/mine" == lines[0]
    assert ["error", "1", "(EmptyImag)"] == lines[1].split()
    assert "there is no node class EmptyImag" == lines[2].strip()
    assert lines[3].strip().startswith("-> did you mean EmptyImage?")
    assert "1 model(s) read; 1 error(s), 0 warning(s)" == lines[4]
    assert f"0 of 1 can run on {comfy.url}" == lines[5]


def test_a_finding_of_one_server_of_several_names_it(
    run: Callable[..., Result], comfy: Comfy, answering: Callable[..., str]
) -> None:
    nodes = fetch_object_info(comfy.url)
    other = answering({"/object_info": {name: info for name, info in nodes.items() if name != "EmptyImage"}})
    result = run("me/mine", "--comfyui", comfy.url, "--comfyui", other)
    assert 1 == result.return_value
    assert f"1 (EmptyImage) (on {other})" in result.stdout
    assert [f"1 of 1 can run on {comfy.url}", f"0 of 1 can run on {other}"] == result.stdout.splitlines()[-2:]
    value = json.loads(run("me/mine", "--json", "--comfyui", comfy.url, "--comfyui", f"{other}/").stdout)
    assert {comfy.url: 1, other: 0} == value["runnable"]
    assert (1, 1, 0) == (value["models"], value["errors"], value["warnings"])


def test_a_server_that_is_away_is_an_error_and_the_others_are_asked(
    run: Callable[..., Result], comfy: Comfy, answering: Callable[..., str]
) -> None:
    away, page = f"http://u:secret@127.0.0.1:{free_port()}", answering({"/object_info": "<html>"})
    result = run("me/mine", "--json", *("--comfyui", away), *("--comfyui", page), *("--comfyui", comfy.url))
    value = json.loads(result.stdout)
    assert 1 == result.return_value
    assert [("error", "comfyui"), ("error", "comfyui")] == [
        (one["severity"], one["kind"]) for one in value["findings"]
    ]
    assert "no ComfyUI answers at http://127.0.0.1:" in value["findings"][0]["text"]
    assert "does not answer as a ComfyUI does" in value["findings"][1]["text"]
    assert "secret" not in result.stdout
    assert [comfy.url] == value["comfyui"]


def test_a_broken_manifest_is_told_as_ever(run: Callable[..., Result], models: Path) -> None:
    (models / "me" / "mine" / "model.toml").write_text(MANIFEST.replace('"integer"', '"colour"'))
    result = run("me/mine")
    assert 1 == result.return_value
    assert "colour" in result.stderr
    assert "0 model(s) read; 1 error(s), 0 warning(s)" in result.stdout
    (finding,) = json.loads(run("me/mine", "--json").stdout)["findings"]
    assert ("error", "manifest") == (finding["severity"], finding["kind"])
    assert "model.toml" in finding["where"]


def test_a_model_that_is_not_there(run: Callable[..., Result]) -> None:
    with pytest.raises(NotFound, match="no/such"):
        run("no/such")
    with pytest.raises(NotFound, match="me/min'"):
        run("me/mine", "me/min")


def test_several_models_are_checked_at_once(run: Callable[..., Result], models: Path) -> None:
    result = run("me/mine", FLF)
    assert 0 == result.return_value
    assert "2 model(s) read; " in result.stdout
    shutil.copytree(models / "me" / "mine", models / "me" / "mine2")
    (models / "me" / "mine2" / "model.toml").write_text("name = ")
    assert 0 == run("me/mine", FLF).return_value
    assert 1 == run("me/mine2", FLF).return_value


def test_a_model_without_a_workflow_cannot_run_there(
    run: Callable[..., Result], comfy: Comfy, models: Path
) -> None:
    text = MANIFEST.replace('graph = "graph.json"', "")
    (models / "me" / "mine" / "model.toml").write_text(text)
    result = run("me/mine", "--comfyui", comfy.url)
    assert 0 == result.return_value
    assert f"0 of 1 can run on {comfy.url}" == result.stdout.splitlines()[-1]


def test_an_address_without_its_scheme_is_told_how_to_be_written(run: Callable[..., Result]) -> None:
    with pytest.raises(click.BadParameter, match="such as http://localhost:8188"):
        run("--comfyui", "localhost:8188")


def test_variants_that_no_model_has_are_noted(run: Callable[..., Result], models: Path) -> None:
    manifest = models / "me" / "mine" / "model.toml"
    noted = "RUSHES_COMFYUI_VARIANTS"
    found = json.loads(run("me/mine", "--json", RUSHES_COMFYUI_VARIANTS="nope").stdout)["findings"]
    assert [("note", noted, "unknown_variant")] == [
        (one["severity"], one["where"], one["kind"]) for one in found if one["where"] == noted
    ]
    manifest.write_text(MANIFEST + '[engines.comfyui.variants.fp8]\ngraph = "graph.json"\n')
    result = run(FLF, RUSHES_COMFYUI_VARIANTS="fp9,fp8")
    assert 0 == result.return_value
    assert "no model has a variant 'fp9'; did you mean fp8?" in result.stdout
    assert "'fp8'" not in result.stdout
    lines = run(command=doctor, RUSHES_COMFYUI_VARIANTS="fp9,fp8").stdout.splitlines()
    (line,) = [line for line in lines if noted in line]
    assert line.startswith("note")
    assert "'fp9'" in line


def test_a_folder_is_compared_without_starting_it(
    run: Callable[..., Result], models: Path, installation: Path
) -> None:
    folder = models / "me" / "mine"
    graph = {**GRAPH, "3": {"class_type": "UNETLoader", "inputs": {"unet_name": "a/w.safetensors"}}}
    (folder / "graph.json").write_text(json.dumps(graph))

    def found(*arguments: str, digest: str) -> set[tuple[str, str, str]]:
        (folder / "model.toml").write_text(MANIFEST + WEIGHTS.format(digest=digest))
        result = run("me/mine", "--json", *arguments, RUSHES_COMFYUI_DIR=str(installation))
        return {(one["severity"], one["kind"], one["where"]) for one in json.loads(result.stdout)["findings"]}

    missing = {("error", "missing_node", "3 (UNETLoader)")}
    wrong, right = "0" * 64, hashlib.sha256(b"good").hexdigest()
    assert missing == found(digest=wrong)
    assert missing == found("--hash", digest=right)
    damaged = ("error", "damaged_weights", "3.unet_name (UNETLoader)")
    assert missing | {damaged} == found("--hash", digest=wrong)
    (installation / "models" / "unet" / "a" / "w.safetensors").write_bytes(b"half a")
    assert missing | {damaged} == found(digest=right)
    (installation / "models" / "unet" / "a" / "w.safetensors").unlink()
    assert missing | {("error", "missing_weights", "3.unet_name (UNETLoader)")} == found(digest=right)


def test_the_paths_that_the_arguments_name_count(
    run: Callable[..., Result], models: Path, installation: Path, tmp_path: Path
) -> None:
    folder = models / "me" / "mine"
    graph = {**GRAPH, "3": {"class_type": "EmptyImage", "inputs": {"unet_name": "a/w.safetensors"}}}
    (folder / "graph.json").write_text(json.dumps(graph))
    (folder / "model.toml").write_text(MANIFEST + WEIGHTS.format(digest="0" * 64))
    weights = installation / "models" / "unet" / "a"
    (tmp_path / "far").mkdir()
    weights.rename(tmp_path / "far" / "a")
    (tmp_path / "one.yaml").write_text("x:\n  vae: nowhere\n")
    (installation / "two.yaml").write_text("x:\n  unet: ../far\n")

    def found(arguments: str) -> list[str]:
        settings = {"RUSHES_COMFYUI_DIR": str(installation), "RUSHES_COMFYUI_ARGS": arguments}
        return [one["kind"] for one in json.loads(run("me/mine", "--json", **settings).stdout)["findings"]]

    assert ["missing_weights"] == found("--lowvram")
    assert [] == found(f"--lowvram --extra-model-paths-config '{tmp_path}/one.yaml' two.yaml --port 1")
    assert [] == found(f"--extra-model-paths-config={tmp_path}/one.yaml --extra-model-paths-config two.yaml")
    assert ["comfyui"] == found("--extra-model-paths-config three.yaml")
    assert ["comfyui"] == found("--extra-model-paths-config")


def test_a_folder_that_is_none(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("me/mine", RUSHES_COMFYUI_DIR=str(tmp_path))
    assert 1 == result.return_value
    assert "is not the folder of a ComfyUI" in result.stdout


# -- the parts -------------------------------------------------------------------------------------------
def test_what_a_server_has(comfy: Comfy, answering: Callable[..., str]) -> None:
    assert {"EmptyImage", "SaveVideo"} <= fetch_object_info(f"{comfy.url}/").keys()
    assert "ComfyUI " in describe(fetch_system_stats(comfy.url))
    assert {} == fetch_weights(comfy.url, ["no-such-kind"])
    url = answering({"/models/vae": ["a.safetensors"]})
    assert {"vae": frozenset({"a.safetensors"})} == fetch_weights(url, ["vae", "loras"])
    with pytest.raises(EngineError, match="answers 404"):
        fetch_system_stats(url)


def test_what_an_older_server_leaves_out_of_its_description() -> None:
    assert "ComfyUI" == describe({})
    assert "ComfyUI of unknown version, cuda:0" == describe({"system": {}, "devices": [{"name": "cuda:0"}]})
    card = {"name": "card", "vram_total": 24 * 2**30, "vram_free": 6 * 2**30}
    text = "ComfyUI 0.3.64, torch 2.8, card (6.0 of 24.0 GiB free)"
    stats = {"system": {"comfyui_version": "0.3.64", "pytorch_version": "2.8"}, "devices": [card]}
    assert text == describe(stats)


def test_what_a_folder_has(installation: Path) -> None:
    there, shelf = Installation(installation), installation.parent / "shelf"
    models = installation / "models"
    assert frozenset({"a/w.safetensors"}) == there.weights("diffusion_models") == there.weights("unet")
    assert frozenset({"v.safetensors"}) == there.weights("vae")
    assert (shelf / "vae" / "v.safetensors") == there.weight("vae", "v.safetensors")
    # As ComfyUI has it: what is called default last comes first.
    assert (shelf / "te2", shelf / "te", models / "text_encoders", models / "clip") == there.places("clip")
    assert (models / "loras", installation.parent / "loras") == there.places("loras")
    assert (shelf / "vae", models / "loras") == (there.home("vae"), there.home("loras"))
    assert there.weight("vae", "../vae/v.safetensors") is None
    assert there.weight("vae", str(shelf / "vae" / "v.safetensors")) is None
    assert frozenset({"EmptyImage", "SaveImage"}) == there.classes({"EmptyImage", "SaveImage", "Switched"})
    assert frozenset({"my-pack"}) == there.packs()
    moved = Installation(installation, "--base-directory ../far")
    assert (installation / ".." / "far" / "models" / "loras") == moved.home("loras")
    assert frozenset() == moved.packs()
    assert hashlib.sha256(b"v").hexdigest() == sha256_of(shelf / "vae" / "v.safetensors")


def test_extra_paths_that_cannot_be_read(installation: Path) -> None:
    (installation / "extra_model_paths.yaml").write_text("a: [")
    with pytest.raises(ManifestError, match=r"extra_model_paths\.yaml"):
        Installation(installation)


# -- doctor ----------------------------------------------------------------------------------------------
def test_doctor_says_which_comfyui_answers(run: Callable[..., Result], comfy: Comfy) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    result = run(command=doctor, RUSHES_COMFYUI_URLS=f"{comfy.url},{away}")
    assert 1 == result.return_value
    (well,) = [line for line in result.stdout.splitlines() if comfy.url in line]
    assert well.startswith("ok")
    assert f"{len(fetch_object_info(comfy.url))} node classes" in well
    (bad,) = [line for line in result.stdout.splitlines() if away in line]
    assert bad.startswith("bad")
    assert "start it" in bad


def test_doctor_says_whether_a_folder_can_be_started(
    run: Callable[..., Result], installation: Path, tmp_path: Path
) -> None:
    (tmp_path / "packages" / "torch").mkdir(parents=True)
    (tmp_path / "packages" / "torch" / "__init__.py").write_text("raise ModuleNotFoundError('torch')")
    python = tmp_path / "python-without-torch"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/packages exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    settings = {"RUSHES_COMFYUI_DIR": str(installation), "RUSHES_COMFYUI_PYTHON": str(python)}
    result = run(command=doctor, **settings)
    (line,) = [line for line in result.stdout.splitlines() if f"ComfyUI {installation}" in line]
    assert "RUSHES_COMFYUI_PYTHON" in line
    result = run(command=doctor, **{**settings, "RUSHES_COMFYUI_PYTHON": "/no/python"})
    (line,) = [line for line in result.stdout.splitlines() if f"ComfyUI {installation}" in line]
    assert "'/no/python' is no program that is there" in line
    result = run(command=doctor, **{**settings, "RUSHES_COMFYUI_ARGS": "--extra-model-paths-config 'a b"})
    (line,) = [line for line in result.stdout.splitlines() if f"ComfyUI {installation}" in line]
    assert "RUSHES_COMFYUI_ARGS cannot be read" in line
    result = run(command=doctor)
    (line,) = [line for line in result.stdout.splitlines() if "  models: " in line]
    assert "model(s) read; 0 error(s)" in line


# -- settings that no ComfyUI can be started with ----------------------------------------------------------
@pytest.mark.parametrize("command", ["serve", "worker"])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"DIR": "/nope"}, "RUSHES_COMFYUI_DIR: /nope is not the folder of a ComfyUI: it is not there"),
        ({"DIR": "{data}"}, "it has no main.py"),
        ({"PYTHON": "/no/python"}, "RUSHES_COMFYUI_PYTHON: '/no/python' is no program that is there"),
        ({"PYTHON": "{comfyui}/main.py"}, "cannot be executed"),
        ({"ARGS": "--lowvram '"}, "RUSHES_COMFYUI_ARGS cannot be read (No closing quotation)"),
        ({"ARGS": "--extra-model-paths-config no.yaml"}, "there is no file {comfyui}/no.yaml"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(
    tmp_path: Path, installation: Path, command: str, settings: dict[str, str], words: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / DATABASE).touch()  # a worker wants one; it is not opened
    places = {"data": str(data), "comfyui": str(installation)}
    given = {"DIR": str(installation), **settings}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RUSHES_")}
    environment |= {f"RUSHES_COMFYUI_{name}": text.format(**places) for name, text in given.items()}
    port = ["--port", "0"] if command == "serve" else []
    done = subprocess.run(
        [sys.executable, "-m", "rushes.cli.main", command, *port, "--data-dir", str(data)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (2, "") == (done.returncode, done.stdout)
    (line,) = done.stderr.splitlines()
    assert words.format(**places) in line
    assert [DATABASE] == [file.name for file in data.iterdir()]


def test_they_are_looked_at_only_where_slots_start_a_comfyui(tmp_path: Path, installation: Path) -> None:
    nowhere = Path("/nope")
    check_comfyui(Settings(engine="comfyui", comfyui_dir=nowhere, workers=0))
    check_comfyui(Settings(engine="draft", comfyui_dir=nowhere))
    check_comfyui(Settings(engine="comfyui", comfyui_dir=installation))
    with pytest.raises(SettingsError, match="/nope"):
        check_comfyui(Settings(engine="comfyui", comfyui_dir=nowhere))
