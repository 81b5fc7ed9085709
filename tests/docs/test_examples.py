"""The pages' examples do what the pages say: each is taken from its page and run against a real server."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rushes.catalog.samples import sample_path
from rushes.errors import RushesError
from support.server import T2I, Server, environment

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def rows(page: str, section: str) -> list[list[str]]:
    """The cells of the first table under a heading."""
    text = (DOCS / page).read_text().split(f"# {section}\n", 1)[1]
    table = re.search(r"^(\|.*\n)+", text, re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:]]


# -- engines.md -------------------------------------------------------------------------------------------


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    """A folder with the modules of the engines' page, each under the name in its first line."""
    folder = tmp_path / "engines"
    folder.mkdir()
    for text in blocks("engines.md", "python"):
        name = re.match(r"# (\w+\.py)\n", text)
        assert name is not None, text
        (folder / name[1]).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("engine", "colours"),
    [("colour_engine:ColourEngine", 1), ("stripes_engine:StripesEngine", 2), ("lanes_engine:LanesEngine", 1)],
)
def test_an_engine_of_the_page_makes_a_file(
    engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, colours: int
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(engines))
    server = Server(tmp_path / "data", engine=engine)
    try:
        server.start()
        result = server.finished(server.submit("two words of a prompt"))
        assert "succeeded" == result["status"], result
        assert engine.partition("_")[0] == result["engine"]
        answer = server.call("GET", result["output"]["image"])
        with Image.open(io.BytesIO(answer.content)) as picture:
            assert (1440, 810) == picture.size
            found = picture.getcolors()
            assert found is not None
            assert len(found) >= colours
    finally:
        server.stop()


def test_the_engine_of_the_page_refuses_in_its_own_words(
    engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(engines))
    server = Server(tmp_path / "data", engine="stripes_engine:StripesEngine")
    try:
        server.start()
        assert "no_words" == server.finished(server.submit(" "))["error"]["code"]
        body = {"56_text": "x", "118_image": "Runcomfy_Example_1290_1.png"}
        submitted = server.call("POST", "/v1/models/community/wan-2-2/vace-fun", json=body).json()
        assert "model_not_supported" == server.finished(submitted["request_id"])["error"]["code"]
        assert "succeeded" == server.finished(server.submit("goes on"))["status"]
    finally:
        server.stop()


def test_the_test_of_the_page_passes(engines: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(engines),
            str(engines),
        ],
        env=environment() | {"PYTHONPATH": str(engines)},
        cwd=engines,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


# -- api.md -----------------------------------------------------------------------------------------------


def answers(text: str) -> list[dict[str, Any]]:
    """The JSON objects that stand one after the other in ``text``."""
    found, decoder = [], json.JSONDecoder()
    while text := text.strip():
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:]
    return found


@pytest.mark.skipif(shutil.which("curl") is None, reason="the page's calls are made with curl")
def test_the_calls_of_the_page(tmp_path: Path) -> None:
    """In their order, by the shell, as a reader would: what comes back has the keys that the page shows."""
    source = sample_path("Runcomfy_Example_1259_1.png")
    assert source is not None
    here = tmp_path / "here"
    here.mkdir()
    shutil.copyfile(source, here / "puppy.png")
    server = Server(tmp_path / "data", engine="draft")
    shown = {key for text in blocks("api.md", "json") for one in answers(text) for key in one}
    try:
        server.start()
        known = {"RUSHES_BASE_URL": server.url, "RUSHES_API_KEY": server.key}
        seen: set[str] = set()
        for script in blocks("api.md", "sh"):
            if "curl" not in script:
                continue
            done = subprocess.run(
                ["bash", "-euc", script],
                env={"PATH": os.environ["PATH"], "no_proxy": "*"} | known,
                cwd=here,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert 0 == done.returncode, (script, done.stderr)
            for answer in answers(done.stdout):
                assert "error_code" not in answer, (script, answer)
                seen |= set(answer)
                if "cancel_url" in answer:
                    known["ID"] = answer["request_id"]
                    result = server.finished(known["ID"])
                    assert "succeeded" == result["status"], result
                    known["OUTPUT_URL"] = result["output"]["video"]
        assert (here / "output.mp4").read_bytes()[4:8] == b"ftyp"
        assert 100 == (here / "first-bytes").stat().st_size
        # The rest stands in answers to what these calls do not do: waiting, running, failing, refusing.
        elsewhere = {
            "queue_position",
            "progress",
            "stage",
            "eta",
            "error",
            "error_code",
            "error_message",
            "detail",
        }
        assert set() == shown - seen - elsewhere
    finally:
        server.stop()


def test_every_error_of_the_wire_is_in_the_table() -> None:
    from rushes.api import protocol  # one of them is defined there

    assert issubclass(protocol.HeadTooLarge, RushesError)

    def tree(root: type[RushesError]) -> set[type[RushesError]]:
        return {root}.union(*(tree(one) for one in root.__subclasses__()))

    expected = {(str(one.code), str(one.status)) for one in tree(RushesError)}
    assert expected == {(row[0], row[1]) for row in rows("api.md", "Errors")}


def test_every_reason_to_refuse_a_file_is_in_the_table() -> None:
    lines = re.findall(r"^\| (`input_[a-z].*?) \|", (DOCS / "api.md").read_text(), re.MULTILINE)
    named = {word for line in lines for word in re.findall(r"input_\w+", line)}
    assert in_source(r'(?:MediaError|Failure|__init__)\(\s*"(input_\w+)"') == named


def test_every_way_to_fail_is_in_the_table() -> None:
    named = {word for row in rows("api.md", "When it failed") for word in re.findall(r"`(\w+)`", row[0])}
    kind = r'(?:"engine", |"unexpected", )?'
    raised = rf'(?:Failure|ChildLost|EngineError|Failed)\(\s*{kind}"(?!engine"|unexpected")(\w+)"'
    # An input file that could not be kept sends its request back to the queue and is never an outcome; what
    # remotes do has a table of its own.
    elsewhere = {
        word for row in rows("api.md", "At a remote engine") for word in re.findall(r"`(\w+)`", row[0])
    }
    assert named == in_source(raised, "worker") - {"inputs_lost", "input_gone"} - elsewhere


def test_every_way_to_fail_at_a_remote_is_in_the_table() -> None:
    section = rows("api.md", "At a remote engine")
    named = {word for row in section for word in re.findall(r"`(\w+)`", row[0])}
    raised = r'(?:(?:RemoteRefused|_refusal|EngineError|Failure|__init__)\(\s*|\breason = )"(\w+)"'
    worker = ROOT / "src" / "rushes" / "worker"
    errand = "".join((worker / name).read_text() for name in ("errand.py", "collecting.py"))
    found = in_source(raised, "engines/remote") | set(re.findall(raised, errand))
    # These stand in the tables before.
    before = {"time_limit", "input_gone", "internal_error", "binding_failed", "output_not_stored"}
    assert found - before == named


def test_every_way_for_a_workflow_to_fail_is_in_the_table() -> None:
    from rushes.engines.comfyui.failures import _CODES

    named = {
        word for row in rows("api.md", "Of a workflow on ComfyUI") for word in re.findall(r"`(\w+)`", row[0])
    }
    raised = r'EngineError\(\s*"(\w+)"'
    expected = in_source(raised, "engines/comfyui") | in_source(raised, "catalog") | set(_CODES)
    # While an engine starts, requests wait and are not told; the others stand in the tables before.
    starting = {
        "comfyui_start_failed",
        "comfyui_unreachable",
        "comfyui_busy",
        "comfyui_dir",
        "engine_start_failed",
    }
    assert expected - starting - {"out_of_memory", "aborted", "input_too_large"} == named


def test_every_way_for_wan_to_fail_is_in_the_table() -> None:
    named = {word for row in rows("api.md", "Of the Wan engine") for word in re.findall(r"`(\w+)`", row[0])}
    expected = in_source(r'EngineError\(\s*"(\w+)"', "engines/wan")
    # The engine's own affairs, and what stands in the tables before.
    expected -= {"aborted", "other_model", "out_of_memory", "engine_error", "input_not_media"}
    assert expected == {word for word in named if word in expected or not word.endswith("_unusable")}


def in_source(pattern: str, folder: str = "") -> set[str]:
    """What a pattern finds in the server's code."""
    paths = (ROOT / "src" / "rushes" / folder).rglob("*.py")
    return {word for path in paths for word in re.findall(pattern, path.read_text())}


def test_the_model_of_the_examples_is_there(tmp_path: Path) -> None:
    from rushes.catalog.load import Catalog

    catalog = Catalog.load(None)
    text = "".join(path.read_text() for path in (*DOCS.glob("*.md"), ROOT / "README.md"))
    named = set(re.findall(r"(?:/v1/models/|rushes run )((?:community|wan-ai)/[a-z0-9./-]+)", text))
    assert T2I in named
    assert set() == {one for one in named if catalog.get(one.removesuffix("/openapi.json")) is None}


def test_the_manifest_of_the_page_is_a_model(tmp_path: Path) -> None:
    from rushes.catalog.load import Catalog

    folder = tmp_path / "studio" / "portrait"
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text(blocks("models.md", "toml")[0])
    (folder / "sample.json").write_text(blocks("models.md", "json")[0])
    catalog = Catalog.load(tmp_path)
    assert [] == list(catalog.broken)
    entry = catalog.get("studio/portrait")
    assert entry is not None
    entry.validator.validate(blocks("models.md", "json")[0].encode())


# -- remotes.md -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", blocks("remotes.md", "toml"), ids=lambda text: text.split("\n", 1)[0])
def test_what_the_page_of_remotes_writes_is_read(text: str, tmp_path: Path) -> None:
    """Keys by those who read keys, tables and routes as part of a model's manifest."""
    from rushes.catalog.load import Catalog
    from rushes.catalog.remotes import remote_table
    from rushes.engines.remote.configured import configured
    from rushes.settings import Settings

    if "KEY" in text:
        secrets = tmp_path / "secrets.toml"
        secrets.write_text(text)
        remotes = ("fal", "box=openai-video@http://10.0.0.5:8000/v1")
        found = configured(Settings(remotes=remotes, secrets_file=secrets), {})
        assert ["..."] * 2 == [remote.key.value for remote in found if remote.key is not None]
        return
    source = Catalog.load(None).get("community/wan-2-2/first-last-frame")
    assert source is not None
    assert source.model.folder is not None
    manifest = (
        (source.model.folder / "model.toml")
        .read_text()
        .partition("[engines.")[0]
        .replace("graph =", "# graph =")
    )
    folder = tmp_path / "studio" / "clip"
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text(f"{manifest}\n{text}")
    shutil.copyfile(source.model.folder / "sample.json", folder / "sample.json")
    catalog = Catalog.load(tmp_path)
    assert [] == list(catalog.broken)
    entry = catalog.get("studio/clip")
    assert entry is not None
    kinds = re.findall(r"^\[engines\.([\w-]+)\]", text, re.MULTILINE)
    assert all(remote_table(entry.model, kind) is not None for kind in kinds)
    assert text.count("[[routes]]") == len(entry.model.routes)
    assert kinds or entry.model.routes
