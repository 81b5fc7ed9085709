"""`rushes models fetch`, and what `rushes doctor` says of the engine `wan`: real processes, a local hub."""

import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rushes.engines.wan.devices import choose
from rushes.engines.wan.weights import shown_size
from rushes.errors import SettingsError
from support.hub import MANIFEST, MODEL, REPOSITORY, USED, Hub, Site, pipeline, safetensors, serve_hub

pytest.importorskip("huggingface_hub", reason="needs the extra: pip install 'rushes[wan]'")

TOTAL = shown_size(sum(len(pipeline()[name]) for name in USED))
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as served:
        yield served


@pytest.fixture
def site(tmp_path: Path, hub: Hub) -> Site:
    hub.add(REPOSITORY, pipeline())
    return Site(tmp_path, hub)


def rushes(site: Site, *arguments: str, **more: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    process = site.python("-m", "rushes.cli.main", *arguments, **more)
    out, errors = process.communicate(timeout=110)
    return process.returncode, out, errors


def stand_in(folder: Path, package: str, program: str) -> str:
    """A folder for PYTHONPATH in which importing ``package`` does what the machine's own could do."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(program)
    return str(folder)


# -- fetch -------------------------------------------------------------------------------------------------
def test_fetch_prints_where_the_weights_are_and_how_large(site: Site, hub: Hub) -> None:
    hub.add("studio/loras", {"style.safetensors": safetensors(500)})
    lora = '[[engines.wan.loras]]\nsource = "studio/loras"\npath = "style.safetensors"\n'
    site.manifest(MANIFEST.format(weights=REPOSITORY) + lora)
    status, out, errors = rushes(site, "models", "fetch", MODEL)
    commit = hub.repositories[REPOSITORY].branches["main"]
    folder = site.home / "hub" / "models--studio--Wan-Diffusers" / "snapshots" / commit
    first, second = out.splitlines()
    size = shown_size(
        sum(
            path.stat().st_size for place in (REPOSITORY, "studio/loras") for path in site.files(place).values()
        )
    )
    assert (0, f"{MODEL}: {size} in {folder}") == (status, first)
    assert str(site.files("studio/loras")["style.safetensors"]) == second.removeprefix("  with ")
    assert f"fetching {REPOSITORY}" in errors
    before = len(hub.asked)
    assert (0, out, "") == rushes(site, "models", "fetch", MODEL)
    assert before == len(hub.asked)


def test_fetch_draws_a_bar_on_a_terminal(site: Site) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "rushes.cli.main", "models", "fetch", MODEL],
        env=site.environ(TERM="xterm", COLUMNS="200"),
        cwd=site.models,
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    drawn = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        drawn += part
    os.close(ours)
    assert 0 == process.wait(60)
    assert process.stdout is not None
    process.stdout.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())
    assert f"{MODEL}: fetching {REPOSITORY}" in shown
    assert "━" in shown


def test_every_model_is_tried_and_the_first_failure_is_the_exit_status(site: Site, hub: Hub) -> None:
    hub.add("studio/gated", pipeline(), gated=True)
    site.manifest(MANIFEST.format(weights="studio/gated"), "me/gated")
    site.manifest(MANIFEST.format(weights="studio/nothing"), "me/nothing")
    status, out, errors = rushes(site, "models", "fetch", "me/gated", "me/nothing", MODEL)
    assert 4 == status
    assert [MODEL] == [line.partition(":")[0] for line in out.splitlines()]
    assert "accept its terms" in errors
    assert "there is no repository" in errors


@pytest.mark.parametrize(
    ("arguments", "more", "status", "words"),
    [
        (["me/nothing"], {}, 6, "there is no repository"),
        (["me/unknown"], {}, 6, "There is no model 'me/unknown'"),
        (["me/plain"], {}, 1, "no table [engines.wan]"),
        (["me/broken"], {}, 1, "did you mean weights?"),
        ([MODEL], {"HF_HUB_OFFLINE": "1"}, 3, "HF_HUB_OFFLINE"),
        ([MODEL], {"HF_ENDPOINT": "http://127.0.0.1:9"}, 3, "http://127.0.0.1:9"),
        ([MODEL], {"RUSHES_WAN_WEIGHTS": f"{MODEL}=/nowhere"}, 1, "/nowhere is not there"),
        ([], {}, 2, "Missing argument"),
    ],
)
def test_what_cannot_be_fetched(
    site: Site, arguments: list[str], more: dict[str, str], status: int, words: str
) -> None:
    site.manifest(MANIFEST.format(weights="studio/nothing"), "me/nothing")
    site.manifest(MANIFEST.partition("[engines.wan]")[0], "me/plain")
    site.manifest(MANIFEST.format(weights=REPOSITORY).replace("weights =", "weight ="), "me/broken")
    got, out, errors = rushes(site, "models", "fetch", *arguments, **more)
    assert (status, "") == (got, out)
    assert words in errors
    assert "Traceback" not in errors


def test_without_the_extra_fetch_says_how_to_get_it(site: Site, tmp_path: Path) -> None:
    absent = "raise ModuleNotFoundError(\"No module named 'huggingface_hub'\", name='huggingface_hub')"
    path = stand_in(tmp_path / "absent", "huggingface_hub", absent)
    status, _, errors = rushes(site, "models", "fetch", MODEL, PYTHONPATH=path)
    assert 2 == status
    assert "pip install 'rushes[wan]'" in errors


def test_ctrl_c_ends_a_download_at_once_and_it_goes_on_later(site: Site, hub: Hub) -> None:
    event = hub.faults.hold[VAE] = threading.Event()
    process = site.python("-m", "rushes.cli.main", "models", "fetch", MODEL)
    _until(lambda: len(site.files()) == len(USED) - 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)  # the file is still held
    assert 130 == process.returncode
    assert "Interrupted" in errors
    event.set()
    hub.faults.hold.clear()
    hub.asked.clear()
    assert 0 == rushes(site, "models", "fetch", MODEL)[0]
    assert [VAE] == [name for name in USED if name.endswith(".safetensors") and hub.downloads(name)]


# -- doctor ------------------------------------------------------------------------------------------------
ABSENT = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
"""A machine without torch: what doctor says of the rest does not wait for its import."""
WAN = {"RUSHES_ENGINE": "wan", "RUSHES_MODELS": "me/*"}


def findings(site: Site, **more: str) -> tuple[int, dict[str, list[str]]]:
    """Exit status, and the lines by what they are of."""
    status, out, errors = rushes(site, "doctor", **(WAN | more))
    assert "" == errors
    found: dict[str, list[str]] = {}
    for line in out.splitlines():
        state, _, rest = line.partition("  ")
        what, _, text = rest.strip().partition(": ")
        found.setdefault(what, []).append(f"{state.strip()} {text}")
    return status, found


def test_doctor_tells_what_is_missing_and_later_that_it_is_there(site: Site) -> None:
    pytest.importorskip("torch", reason="needs the extra: pip install 'rushes[wan]'")
    site.manifest(MANIFEST.format(weights=REPOSITORY) + "bytes = 126_000_000\n")
    status, found = findings(site, RUSHES_WAN_DEVICE="cpu")
    assert 0 == status, found
    (weights,) = found[f"weights of {MODEL}"]
    assert weights.startswith(f"note {REPOSITORY} is not downloaded (126.0 MB)")
    assert f"rushes models fetch {MODEL}" in weights
    assert found["disk for weights"][0].startswith("ok 126.0 MB are missing; ")
    assert found["hub"][0].startswith("note no HF_TOKEN")
    assert ["ok exact"] == found["profile"]
    assert re.fullmatch(r"ok \d+\.\d+.*", found["torch"][0])
    assert {"ok 1 slot(s)"} == set(found["engine wan"])
    assert 0 == rushes(site, "models", "fetch", MODEL)[0]
    _, found = findings(site, RUSHES_WAN_DEVICE="cpu")
    (weights,) = found[f"weights of {MODEL}"]
    assert weights.startswith(f"ok {TOTAL} in {site.home}")
    assert "disk for weights" not in found
    assert not (site.data / "rushes.db").exists()


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "bad importing it crashes (SIGSEGV)"),
        (
            "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')",
            "bad missing: choose the build",
        ),
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "bad cannot be imported (OSError"),
    ],
)
def test_doctor_bears_a_torch_that_cannot_be_imported(
    site: Site, tmp_path: Path, program: str, words: str
) -> None:
    path = stand_in(tmp_path / "torch-here", "torch", program)
    status, found = findings(site, PYTHONPATH=path)
    assert 1 == status
    assert found["torch"][0].startswith(words)
    assert "https://pytorch.org" in found["torch"][0]


def test_doctor_tells_what_stands_in_the_way(site: Site, hub: Hub, tmp_path: Path) -> None:
    more = {
        "PYTHONPATH": stand_in(tmp_path / "absent", "torch", ABSENT),
        "HF_HUB_OFFLINE": "1",
        "HF_TOKEN": "hf_mine",
        "RUSHES_WAN_PROFILE": "turbo",
        "RUSHES_WAN_LORAS_DIR": str(tmp_path / "nowhere"),
        "RUSHES_WAN_WEIGHTS": f"me/mein={REPOSITORY}, me/own={tmp_path / 'own'}",
    }
    site.manifest(MANIFEST.format(weights=REPOSITORY) + "bytes = 999_000_000_000_000_000\n")
    site.manifest(MANIFEST.format(weights=REPOSITORY) + 'stand_in = "An open model"\n', "me/own")
    site.manifest(MANIFEST.format(weights=REPOSITORY) + "steps = 0\n", "me/wrong")
    status, found = findings(site, **more)
    assert 1 == status
    assert found["LoRAs"][0].startswith("bad")
    assert "did you mean me/mine?" in found["RUSHES_WAN_WEIGHTS"][0]
    (turbo,) = found[MODEL]
    assert turbo.startswith("bad its manifest has no turbo")
    assert "set another RUSHES_WAN_PROFILE" in turbo
    assert "note An open model stands in for it" in found["me/own"]
    assert found["weights of me/own"][0].startswith(f"bad {tmp_path / 'own'} is not there")
    assert "engines.wan.steps" in found["model"][0]
    assert found["disk for weights"][0].startswith("bad 999000000.0 GB are missing")
    assert found["hub"][0].startswith("bad HF_HUB_OFFLINE")


def test_doctor_says_what_the_engine_says_where_there_is_no_card(site: Site, tmp_path: Path) -> None:
    more = {"PYTHONPATH": stand_in(tmp_path / "absent", "torch", ABSENT), "PATH": str(tmp_path / "no-programs")}
    status, found = findings(site, RUSHES_WAN_DEVICE="cuda", **more)
    assert 1 == status
    with pytest.raises(SettingsError) as refused:
        choose("cuda", 0, {"PATH": more["PATH"]})
    assert [f"bad {refused.value.message}"] == found["card"]
    _, found = findings(site, RUSHES_WAN_DEVICE="auto", **more)
    assert found["card"][0].startswith("note nvidia-smi tells of none: the CPU computes")


def test_doctor_tells_of_a_pipeline_that_is_no_wan(site: Site, tmp_path: Path) -> None:
    for name, content in pipeline().items():
        file = tmp_path / "flux" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.replace(b"WanPipeline", b"FluxPipeline"))
    path = stand_in(tmp_path / "absent", "torch", ABSENT)
    status, found = findings(site, PYTHONPATH=path, RUSHES_WAN_WEIGHTS=f"{MODEL}={tmp_path / 'flux'}")
    assert 1 == status
    (weights,) = found[f"weights of {MODEL}"]
    assert weights.startswith(f"bad {tmp_path / 'flux'}/model_index.json names the pipeline 'FluxPipeline'")
    assert "known are WanPipeline, WanImageToVideoPipeline, WanVACEPipeline" in weights


def test_doctor_tells_of_a_download_that_was_broken_off(site: Site, hub: Hub, tmp_path: Path) -> None:
    hub.faults.refuse[VAE] = 503
    assert 3 == rushes(site, "models", "fetch", MODEL)[0]
    part = site.blobs() / "0123.89abcdef.incomplete"
    part.write_bytes(b"x" * 5000)
    os.utime(part, (time.time() - 7200, time.time() - 7200))
    path = stand_in(tmp_path / "absent", "torch", ABSENT)
    _, found = findings(site, PYTHONPATH=path, HF_TOKEN="hf_mine")
    half, parts = found[f"weights of {MODEL}"]
    assert half.startswith(f"note half-downloaded: {REPOSITORY}/{VAE} is missing")
    assert "1 part(s) of broken-off downloads, 5.0 kB, can be removed" in parts
    assert found["hub"][0].startswith("ok a token is set")


def test_doctor_tells_that_nothing_is_served(site: Site, tmp_path: Path) -> None:
    path = stand_in(tmp_path / "absent", "torch", ABSENT)
    _, found = findings(site, PYTHONPATH=path, RUSHES_MODELS="you/*")
    assert any("has a table [engines.wan]" in text for text in found["engine wan"])


def _until(ready: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)
