"""Weights of the Wan engine: found, fetched from a hub by its real client, half there, refused."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rushes.catalog import audit_wan
from rushes.catalog.load import Catalog
from rushes.catalog.model import Model
from rushes.catalog.wan import WanLora
from rushes.engines.wan import layout
from rushes.engines.wan.weights import Local, Missing, Weights, shown_size
from rushes.errors import EngineError, SettingsError
from rushes.settings import Settings
from support.hub import (
    MANIFEST,
    MODEL,
    REPOSITORY,
    UNUSED,
    USED,
    Hub,
    Site,
    blob_id,
    pipeline,
    safetensors,
    serve_hub,
    sha256,
)

pytest.importorskip("huggingface_hub", reason="needs the extra: pip install 'rushes[wan]'")

LORAS = "studio/loras"
PROGRAM = """
import json, sys
from pathlib import Path
from rushes.catalog.load import Catalog
from rushes.engines.wan.weights import Local, weights_of
from rushes.errors import EngineError, RushesError
from rushes.settings import load
import msgspec

def say(**what):
    print(json.dumps(what, default=str), flush=True)

settings = load()
model = Catalog.load(settings.models_dir).get("me/mine").model
weights = weights_of(settings)
try:
    if sys.argv[1] == "find":
        found = weights.find(model)
    else:
        found = weights.fetch(model, lambda text, done, total: say(told=[text, done, total]))
except EngineError as error:
    say(error=error.reason, message=error.message, retryable=error.retryable)
except RushesError as error:
    say(error=type(error).__name__, message=error.message)
else:
    kind = "local" if isinstance(found, Local) else "missing"
    say(**{kind: msgspec.to_builtins(found, enc_hook=str)})
"""


class Place(Site):
    """A site whose processes say what they found."""

    def start(self, command: str, **more: str) -> "subprocess.Popen[str]":
        return self.python("-c", PROGRAM, command, **more)

    def ask(self, command: str, **more: str) -> dict[str, Any]:
        """The last that the process says."""
        out, errors = self.start(command, **more).communicate(timeout=90)
        assert out, errors
        return dict(json.loads(out.splitlines()[-1]))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as served:
        yield served


@pytest.fixture
def place(tmp_path: Path, hub: Hub) -> Place:
    hub.add(REPOSITORY, pipeline())
    return Place(tmp_path, hub)


# -- fetching ----------------------------------------------------------------------------------------------
def test_a_pipeline_is_fetched_and_found_again_without_the_hub(place: Place, hub: Hub) -> None:
    assert "missing" in place.ask("find")
    assert [] == hub.asked  # looking asks nobody
    process = place.start("fetch")
    out, errors = process.communicate(timeout=90)
    lines = [json.loads(line) for line in out.splitlines()]
    local = lines[-1]["local"]
    assert USED == sorted(place.files()), errors  # and nothing else of what the repository holds
    contents = pipeline()
    assert all(contents[name] == path.read_bytes() for name, path in place.files().items())
    assert local["folder"].endswith(hub.repositories[REPOSITORY].branches["main"])
    assert sum(len(contents[name]) for name in USED) == local["bytes"]
    told = [line["told"] for line in lines[:-1]]
    assert [f"asking for {REPOSITORY}", 0, None] == told[0]
    total = sum(len(contents[name]) for name in USED if name != layout.INDEX)
    counts = [done for _, done, of in told[1:] if of == total]
    assert sorted(counts) == counts
    assert total == counts[-1]
    before = len(hub.asked)
    assert local == place.ask("find")["local"] == place.ask("fetch", HF_HUB_OFFLINE="1")["local"]
    assert before == len(hub.asked)


def test_the_commit_that_was_met_first_is_kept(place: Place, hub: Hub) -> None:
    first = hub.repositories[REPOSITORY].branches["main"]
    assert place.ask("fetch")["local"]["folder"].endswith(first)
    newer = hub.repositories[REPOSITORY].commit(pipeline(5000))
    assert place.ask("fetch")["local"]["folder"].endswith(first)
    pins = json.loads((place.data / "wan" / "revisions.json").read_text())
    assert first == pins[REPOSITORY]["commit"]
    place.home = place.home.with_name("empty")  # another cache: the same commit again, not the newest
    assert place.ask("fetch")["local"]["folder"].endswith(first)
    (place.data / "wan" / "revisions.json").unlink()
    place.home = place.home.with_name("new")
    assert place.ask("fetch")["local"]["folder"].endswith(newer)


def test_the_manifest_or_the_operator_names_another_revision(place: Place, hub: Hub) -> None:
    repository = hub.repositories[REPOSITORY]
    first = repository.branches["main"]
    repository.commit(pipeline(5000))
    tried = repository.commit(pipeline(6000), branch="tried")
    place.manifest(MANIFEST.format(weights=REPOSITORY) + f'revision = "{first}"\n')
    assert place.ask("fetch")["local"]["folder"].endswith(first)
    override = {"RUSHES_WAN_WEIGHTS": f"{MODEL}={REPOSITORY}@tried"}
    assert place.ask("fetch", **override)["local"]["folder"].endswith(tried)
    assert place.ask("find")["local"]["folder"].endswith(first)


def test_a_commit_that_is_gone_from_the_hub_is_told_with_where_it_is_kept(place: Place, hub: Hub) -> None:
    place.ask("fetch")
    hub.add(REPOSITORY, pipeline(5000))
    place.home = place.home.with_name("empty")
    said = place.ask("fetch")
    assert "weights_not_found" == said["error"]
    assert "revisions.json" in said["message"]


def test_what_another_program_downloaded_is_used_and_its_commit_kept(place: Place, hub: Hub) -> None:
    program = f"import huggingface_hub; huggingface_hub.snapshot_download({REPOSITORY!r})"
    subprocess.run([sys.executable, "-c", program], env=place.environ(), check=True, capture_output=True)
    before = len(hub.asked)
    local = place.ask("fetch")["local"]
    assert before == len(hub.asked)
    assert sum(len(pipeline()[name]) for name in USED) == local["bytes"]
    pins = json.loads((place.data / "wan" / "revisions.json").read_text())
    assert hub.repositories[REPOSITORY].branches["main"] == pins[REPOSITORY]["commit"]
    assert USED == sorted(pins[REPOSITORY]["files"])


LORA_TABLES = f"""
[[engines.wan.loras]]
source = "{LORAS}"
path = "deep/[1] style.safetensors"
scale = 0.5
[engines.wan.turbo]
steps = 4
[[engines.wan.turbo.loras]]
source = "{LORAS}"
path = "few-steps.safetensors"
experts = "high"
"""


@pytest.mark.parametrize("profile", ["exact", "turbo"])
def test_loras_come_with_the_pipeline_and_those_of_the_turbo_with_its_profile(
    place: Place, hub: Hub, profile: str
) -> None:
    files = {"deep/[1] style.safetensors": safetensors(500), "few-steps.safetensors": safetensors(300)}
    hub.add(LORAS, files | {"other.safetensors": safetensors(100)})
    place.manifest(MANIFEST.format(weights=REPOSITORY) + LORA_TABLES)
    turbo = profile == "turbo"
    local = place.ask("fetch", RUSHES_WAN_PROFILE=profile)["local"]
    wanted = sorted(files) if turbo else ["deep/[1] style.safetensors"]
    assert wanted == sorted(place.files(LORAS))
    ((style, lora),) = local["loras"]
    assert files["deep/[1] style.safetensors"] == Path(style).read_bytes()
    assert (0.5, "both") == (lora["scale"], lora["experts"])
    assert (["high"] if turbo else []) == [lora["experts"] for _, lora in local["turbo_loras"]]


def test_two_processes_fetch_it_once(place: Place, hub: Hub) -> None:
    event = hub.faults.hold["vae/diffusion_pytorch_model.safetensors"] = threading.Event()
    first = place.start("fetch")
    _until(lambda: bool(hub.downloads("vae/diffusion_pytorch_model.safetensors")))
    second = place.start("fetch")
    assert second.stdout is not None
    assert "another process is fetching it" in second.stdout.readline()
    event.set()
    for process in (first, second):
        out, errors = process.communicate(timeout=90)
        assert "local" in json.loads(out.splitlines()[-1]), errors
    assert 1 == len(hub.downloads("vae/diffusion_pytorch_model.safetensors"))


# -- what goes wrong on the way ----------------------------------------------------------------------------
def test_a_connection_that_is_cut_is_taken_up_where_it_was(place: Place, hub: Hub) -> None:
    name = "vae/diffusion_pytorch_model.safetensors"
    large = safetensors(11_000_000)
    hub.add(REPOSITORY, pipeline() | {name: large})
    hub.faults.cut[name] = [10_800_000]
    assert "local" in place.ask("fetch")
    assert large == place.files()[name].read_bytes()
    # The client writes, and so goes on, in chunks of 10 MiB.
    assert [None, f"bytes={10 * 2**20}-"] == [one.range for one in hub.downloads(name)]


def test_a_download_that_fails_is_half_there_and_goes_on_later(place: Place, hub: Hub) -> None:
    name = "transformer_2/diffusion_pytorch_model-00002-of-00002.safetensors"
    hub.faults.refuse[name] = 503
    said = place.ask("fetch")
    assert ("weights_unreachable", True) == (said["error"], said["retryable"])
    assert "503" in said["message"]
    assert hub.signature not in said["message"]
    missing = place.ask("find")["missing"]
    assert missing["begun"]
    assert [f"{REPOSITORY}/{name}", "is missing"] in missing["files"]
    assert "half-downloaded" in missing["text"]
    assert f"rushes models fetch {MODEL}" in missing["text"]
    assert sum(len(pipeline()[one]) for one in USED if one not in place.files()) == missing["bytes"]
    hub.faults.refuse.clear()
    there = set(place.files())
    hub.asked.clear()
    assert "local" in place.ask("fetch")
    assert [] == [one for one in there if one.endswith(".safetensors") and hub.downloads(one)]


def test_a_download_that_was_killed_is_half_there_and_its_parts_go_after_an_hour(
    place: Place, hub: Hub
) -> None:
    name = "vae/diffusion_pytorch_model.safetensors"
    event = hub.faults.hold[name] = threading.Event()
    process = place.start("fetch")
    _until(lambda: bool(hub.downloads(name)) and len(place.files()) == len(USED) - 1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    event.set()
    hub.faults.hold.clear()
    (part,) = place.blobs().glob("*.incomplete")
    missing = place.ask("find")["missing"]
    assert [[f"{REPOSITORY}/{name}", "is missing"]] == missing["files"]
    assert len(pipeline()[name]) == missing["bytes"]
    assert "local" in place.ask("fetch")
    assert part.exists()  # somebody else may be writing it
    assert "local" in place.ask("find")  # and it says nothing about what is whole
    place.files()[name].unlink()
    os.utime(part, (time.time() - 7200, time.time() - 7200))
    assert "local" in place.ask("fetch")
    assert not part.exists()


def test_a_file_that_was_cut_off_on_the_disk_is_fetched_again(place: Place, hub: Hub) -> None:
    place.ask("fetch")
    for name in ("text_encoder/model.safetensors", "tokenizer/tokenizer.json"):
        blob = place.files()[name].resolve()
        blob.write_bytes(blob.read_bytes()[:-7])
    missing = place.ask("find")["missing"]
    assert {"text_encoder/model.safetensors", "tokenizer/tokenizer.json"} == {
        name.removeprefix(f"{REPOSITORY}/") for name, _ in missing["files"]
    }
    assert "local" in place.ask("fetch")
    assert (
        pipeline()["text_encoder/model.safetensors"]
        == place.files()["text_encoder/model.safetensors"].read_bytes()
    )


def test_a_gated_repository(place: Place, hub: Hub) -> None:
    hub.repositories[REPOSITORY].gated = True
    said = place.ask("fetch")
    assert "weights_gated" == said["error"]
    assert f"{hub.url}/{REPOSITORY}" in said["message"]
    assert "HF_TOKEN" in said["message"]
    hub.granted = {"hf_other": set(), "hf_mine": {REPOSITORY}}
    said = place.ask("fetch", HF_TOKEN="hf_other")
    assert "weights_gated" == said["error"]
    assert "make a token" not in said["message"]
    assert "accept its terms" in said["message"]
    assert "local" in place.ask("fetch", HF_TOKEN="hf_mine")
    assert {None} == {
        one.authorization for one in hub.asked if "/resolve" not in one.path and "/api" not in one.path
    }


@pytest.mark.parametrize(
    ("weights", "more", "reason", "words"),
    [
        ("studio/nothing", {}, "weights_not_found", "there is no repository"),
        ("studio/private", {}, "weights_not_found", "for a private one set HF_TOKEN"),
        ("studio/private", {"HF_TOKEN": "hf_other"}, "weights_not_found", "or it is private"),
        (REPOSITORY, {"HF_TOKEN": "hf_nobody's"}, "weights_denied", "check HF_TOKEN"),
        (
            REPOSITORY,
            {"RUSHES_WAN_WEIGHTS": f"{MODEL}={REPOSITORY}@v9"},
            "weights_not_found",
            "no revision 'v9'",
        ),
        ("studio/original", {}, "weights_incomplete", "end in -Diffusers"),
        (REPOSITORY, {"HF_HUB_OFFLINE": "1"}, "weights_unreachable", "HF_HUB_OFFLINE is set"),
        (REPOSITORY, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "weights_unreachable", "cannot be fetched"),
    ],
)
def test_what_cannot_be_fetched_says_why(
    place: Place, hub: Hub, weights: str, more: Mapping[str, str], reason: str, words: str
) -> None:
    hub.add("studio/private", pipeline(), private=True)
    hub.add("studio/original", {"wan.safetensors": safetensors(10)})
    hub.granted = {"hf_other": set()}
    place.manifest(MANIFEST.format(weights=weights))
    said = place.ask("fetch", **more)
    assert (reason, reason == "weights_unreachable") == (said["error"], said["retryable"])
    assert words in said["message"]
    assert {} == place.files(weights)


def test_a_lora_that_its_repository_does_not_hold(place: Place, hub: Hub) -> None:
    hub.add(LORAS, {"other.safetensors": safetensors(100)})
    place.manifest(MANIFEST.format(weights=REPOSITORY) + LORA_TABLES)
    said = place.ask("fetch")
    assert "weights_not_found" == said["error"]
    assert "mend `path`" in said["message"]
    assert ["model_index.json"] == sorted(place.files())  # nothing large was fetched for nothing


def test_what_does_not_fit_on_the_disk_is_not_begun(place: Place, hub: Hub) -> None:
    hub.faults.sizes["vae/diffusion_pytorch_model.safetensors"] = 10**18
    said = place.ask("fetch")
    assert "weights_no_room" == said["error"]
    assert "1000000000.0 GB" in said["message"]
    assert ["model_index.json"] == sorted(place.files())


def test_a_repository_that_lacks_a_shard_is_not_usable(place: Place, hub: Hub) -> None:
    lost = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
    hub.add(REPOSITORY, {name: content for name, content in pipeline().items() if name != lost})
    said = place.ask("fetch")
    assert "weights_incomplete" == said["error"]
    assert f"{REPOSITORY}/{lost} is missing: the repository lacks it: name another" in said["message"]
    assert "rushes models fetch" not in said["message"]
    missing = place.ask("find")["missing"]  # nor is it told to fetch it again later
    assert (said["message"], False) == (missing["text"], missing["fetchable"])


@pytest.mark.parametrize(
    ("part", "words"),
    [("transformer_2", "transformer_2"), ("", "text_encoder, transformer, transformer_2, vae")],
)
def test_a_repository_without_safetensors_is_refused_before_it_is_downloaded(
    place: Place, hub: Hub, part: str, words: str
) -> None:
    files = pipeline()
    other = {
        name.replace(".safetensors", ".bin") if name.startswith(part) else name: content
        for name, content in files.items()
    }
    hub.add(REPOSITORY, other)
    said = place.ask("fetch")
    assert "weights_incomplete" == said["error"]
    assert f"no safetensors weights of {words}, and other formats are refused" in said["message"]
    assert "rushes models fetch" not in said["message"]
    assert ["model_index.json"] == sorted(place.files())


def flux() -> dict[str, bytes]:
    """The files of a pipeline that is none of Wan's."""
    files = pipeline()
    return files | {layout.INDEX: files[layout.INDEX].replace(b'"WanPipeline"', b'"FluxPipeline"')}


def test_a_pipeline_that_is_no_wan_is_refused_before_it_is_downloaded(place: Place, hub: Hub) -> None:
    hub.add(REPOSITORY, flux())
    said = place.ask("fetch")
    assert "weights_unusable" == said["error"]
    assert "'FluxPipeline'; known are WanPipeline, WanImageToVideoPipeline, WanVACEPipeline" in said["message"]
    assert ["model_index.json"] == sorted(place.files())


def test_a_pipeline_that_is_no_wan_is_not_found(place: Place, hub: Hub) -> None:
    hub.add(REPOSITORY, flux())
    program = f"import huggingface_hub; huggingface_hub.snapshot_download({REPOSITORY!r})"
    subprocess.run([sys.executable, "-c", program], env=place.environ(), check=True, capture_output=True)
    missing = place.ask("find")["missing"]
    assert (False, "weights_unusable") == (missing["fetchable"], missing["reason"])
    said = place.ask("fetch")
    assert ("weights_unusable", missing["text"]) == (said["error"], said["message"])
    assert f"{REPOSITORY}/{layout.INDEX} names the pipeline 'FluxPipeline'" in said["message"]


def test_models_check_knows_the_same_pipelines() -> None:
    assert audit_wan.PIPELINES == tuple(layout.PIPELINES)


LOADED = """
import sys
from pathlib import Path
from support.tiny_diffusers import save
save("image", Path(sys.argv[1]))
print("saved", flush=True)
folder = sys.stdin.readline().strip()
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(folder)
print(type(pipe).__name__, type(pipe.image_encoder).__name__, flush=True)
"""


def test_what_is_fetched_is_all_that_diffusers_loads(place: Place, hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="needs the extra: pip install 'rushes[wan]'")
    made = tmp_path / "tiny"
    loading = place.python("-c", LOADED, str(made), HF_HUB_OFFLINE="1")
    assert loading.stdout is not None
    assert "saved\n" == loading.stdout.readline()
    files = {path.relative_to(made).as_posix(): path.read_bytes() for path in made.rglob("*") if path.is_file()}
    hub.add(REPOSITORY, files | {name: b"x" for name in UNUSED if not name.startswith("image_encoder")})
    local = place.ask("fetch")["local"]
    assert sorted(files) == sorted(place.files())
    out, errors = loading.communicate(local["folder"] + "\n", timeout=100)
    assert "WanImageToVideoPipeline CLIPVisionModel\n" == out, errors


# -- the server's start ------------------------------------------------------------------------------------
SERVED = """
import json, sys
from rushes.catalog.load import Catalog
from rushes.engines.wan.weights import wanted_weights
from rushes.errors import RushesError
from rushes.settings import load
settings = load()
catalog = Catalog.load(settings.models_dir)
told = []
try:
    served = wanted_weights(settings, catalog, told.append).local
    folders = {}
    for name in ("me/mine", "me/other"):
        try:
            folders[name] = str(served(catalog.get(name).model).folder)
        except RushesError as error:
            folders[name] = error.reason
    print(json.dumps([told, folders]))
except RushesError as error:
    print(json.dumps([type(error).__name__, error.message]))
"""


DEFAULT = """
import json
from rushes.catalog.load import Catalog
from rushes.engines.wan.weights import wanted_weights
from rushes.errors import RushesError
from rushes.settings import load
settings = load()
try:
    print(json.dumps(wanted_weights(settings, Catalog.load(settings.models_dir), print).models))
except RushesError as error:
    print(json.dumps([type(error).__name__, error.message]))
"""


def test_a_server_that_names_no_models_serves_those_that_have_weights_and_fetches_nothing(
    place: Place, hub: Hub
) -> None:
    def serve(**more: str) -> list[str]:
        out, errors = place.python("-c", DEFAULT, **more).communicate(timeout=90)
        assert out, errors
        models: list[str] = json.loads(out)
        return models

    kind, message = serve()
    assert "SettingsError" == kind
    assert "RUSHES_MODELS" in message
    assert "me/mine" in message
    place.python("-c", SERVED, RUSHES_MODELS="me/mine").communicate(timeout=90)
    asked = len(hub.asked)
    assert ["me/mine"] == serve()
    assert asked == len(hub.asked)
    place.manifest(MANIFEST.partition("[engines.wan]")[0], "me/plain")  # which this engine cannot run
    assert ["me/mine"] == serve(RUSHES_MODELS="me/*")


def test_a_server_fetches_what_its_models_need_and_bears_one_that_cannot_be_had(place: Place, hub: Hub) -> None:
    hub.add("studio/gated", pipeline(), gated=True)
    other = place.models / "me" / "other"
    other.mkdir()
    (other / "model.toml").write_text(MANIFEST.format(weights="studio/gated"))

    def serve(models: str) -> tuple[Any, Any]:
        out, errors = place.python("-c", SERVED, RUSHES_MODELS=models).communicate(timeout=90)
        assert out, errors
        first, second = json.loads(out.splitlines()[-1])
        return first, second

    kind, message = serve("me/other")
    assert "SettingsError" == kind
    assert "accept its terms" in message
    assert ["SettingsError"] == [serve("nobody/*")[0]]
    told, folders = serve("me/*")
    commit = hub.repositories[REPOSITORY].branches["main"]
    assert folders["me/mine"].endswith(commit)
    assert "weights_gated" == folders["me/other"]
    total = shown_size(sum(len(pipeline()[name]) for name in USED if name != layout.INDEX))
    assert f"{MODEL}: fetching {REPOSITORY}: {total} of {total}" in told


# -- folders of the operator's own -------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline in a folder."""
    for name, content in pipeline().items():
        path = tmp_path / "weights" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "weights"


def model_of(root: Path, manifest: str) -> Model:
    place = root / "models" / MODEL
    place.mkdir(parents=True, exist_ok=True)
    (place / "model.toml").write_text(manifest)
    entry = Catalog.load(root / "models").get(MODEL)
    assert entry is not None
    return entry.model


def test_a_folder_is_used_as_it_is(tmp_path: Path, folder: Path) -> None:
    (folder / "style.safetensors").write_bytes(safetensors(50))
    lora = f'[[engines.wan.loras]]\nsource = "{folder}"\npath = "style.safetensors"\n'
    model = model_of(tmp_path, MANIFEST.format(weights=folder) + lora)
    weights = Weights(tmp_path / "pins.json", {})
    found = weights.find(model)
    assert isinstance(found, Local)
    assert folder == found.folder
    assert ((folder / "style.safetensors", WanLora(str(folder), "style.safetensors")),) == found.loras
    assert found == weights.fetch(model)
    assert not (tmp_path / "pins.json").exists()


def test_a_folder_below_the_models_own_and_one_that_the_operator_names(tmp_path: Path, folder: Path) -> None:
    model = model_of(tmp_path, MANIFEST.format(weights="./w"))
    missing = Weights(tmp_path / "pins.json", {}).find(model)
    assert isinstance(missing, Missing)
    assert f"{model.folder / 'w'} is not there" in missing.text
    assert not missing.fetchable
    overridden = Weights(tmp_path / "pins.json", {MODEL: str(folder)}).find(model)
    assert isinstance(overridden, Local)
    folder.rename(model.folder / "w")
    found = Weights(tmp_path / "pins.json", {}).find(model)
    assert isinstance(found, Local)
    assert overridden.bytes == found.bytes


def _remove(path: Path) -> None:
    path.unlink()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def _point(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10000000\n")


def _scribble(path: Path) -> None:
    path.write_bytes(b"\xff" * 200)


VAE = "vae/diffusion_pytorch_model.safetensors"
SHARDS = "transformer/diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    ("name", "harm", "words"),
    [
        ("model_index.json", _remove, "has no model_index.json"),
        ("model_index.json", _scribble, "cannot be read"),
        (VAE, _remove, "is missing"),
        (VAE, _empty, "is empty"),
        (VAE, _cut, "is cut off"),
        (VAE, _lengthen, "is longer than it says"),
        (VAE, _scribble, "is not a safetensors file"),
        (VAE, _point, "git lfs pull"),
        (SHARDS, _remove, "is missing"),
        (SHARDS, _scribble, "is not JSON"),
        ("transformer_2/diffusion_pytorch_model-00001-of-00002.safetensors", _remove, "is missing"),
        ("tokenizer/tokenizer_config.json", _remove, "is missing"),
        ("scheduler/scheduler_config.json", _cut, "is not JSON"),
        ("text_encoder/config.json", _remove, "is missing"),
    ],
)
def test_a_folder_that_is_not_whole(
    tmp_path: Path, folder: Path, name: str, harm: Callable[[Path], None], words: str
) -> None:
    harm(folder / name)
    model = model_of(tmp_path, MANIFEST.format(weights=folder))
    found = Weights(tmp_path / "pins.json", {}).find(model)
    assert isinstance(found, Missing)
    assert words in found.text
    assert name.rpartition("/")[2] in found.text
    assert not found.fetchable
    with pytest.raises(EngineError) as caught:
        Weights(tmp_path / "pins.json", {}).fetch(model)
    assert ("weights_incomplete", found.text) == (caught.value.reason, caught.value.message)


def test_a_tokenizer_in_its_older_form_is_whole(tmp_path: Path, folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    model = model_of(tmp_path, MANIFEST.format(weights=folder))
    assert isinstance(Weights(tmp_path / "pins.json", {}).find(model), Local)
    (folder / "tokenizer" / "spiece.model").unlink()
    assert isinstance(Weights(tmp_path / "pins.json", {}).find(model), Missing)


def test_pins_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "pins.json").write_text("{")
    model = model_of(tmp_path, MANIFEST.format(weights=REPOSITORY))
    with pytest.raises(SettingsError, match=r"pins\.json"):
        Weights(tmp_path / "pins.json", {}).find(model)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (1500, "1.5 kB"), (2_000_000, "2.0 MB"), (126_000_000_000, "126.0 GB")]
)
def test_sizes_are_shown_in_units_of_ten(count: int, text: str) -> None:
    assert text == shown_size(count)


def test_the_hub_of_these_tests_names_files_as_git_does() -> None:
    assert "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391" == blob_id(b"")  # git hash-object of an empty file
    assert sha256(b"").startswith("e3b0c44298fc1c14")
    assert Settings().wan_weights == ()


def _until(ready: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)
