"""Which of ComfyUI's files are read from the disk, which are removed, and which ones an account leaves out."""

import os
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from PIL import Image

from rushes.catalog.model import Model
from rushes.engines.comfyui import files as files_module
from rushes.engines.comfyui.engine import ComfyUIEngine
from rushes.engines.comfyui.events import Events
from rushes.engines.comfyui.files import JobFiles
from rushes.engines.comfyui.line import Line
from rushes.engines.comfyui.process import ComfyProcess
from rushes.engines.comfyui.prompt import Account
from rushes.engines.comfyui.server import Server
from rushes.errors import EngineError
from support.comfyui import TESTS, Comfy
from support.comfyui_models import Models, Work, field, make_job
from support.comfyui_transcripts import empty, node, save
from support.server import eventually

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="process groups")


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    made = Comfy("stub", tmp_path_factory.mktemp("comfyui"))
    try:
        yield made.start()
    finally:
        made.close()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[ComfyProcess]:
    """A ComfyUI that is our own."""
    folder = tmp_path / "ComfyUI"
    (folder / "input").mkdir(parents=True)
    (folder / "input" / "operators.png").write_bytes(b"the operator's own")
    lines = ["import sys", f"sys.path.insert(0, {str(TESTS)!r})"]
    lines += ["from support.comfyui_stub import main", "main()"]
    (folder / "main.py").write_text("\n".join(lines))
    made = ComfyProcess.start(
        folder, python=sys.executable, arguments="--cpu", work=tmp_path / "work", number=0, seconds=60
    )
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def own(process: ComfyProcess) -> Iterator[ComfyUIEngine]:
    made = ComfyUIEngine(process.url, identity="mended:0", process=process, start_seconds=30.0)
    yield made
    made.close()


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path / "models")


def previewing(models: Models) -> Model:
    """A model whose only node with a picture chooses the file's name itself."""
    graph = {"1": empty(), "2": node("PreviewImage", images=["1", 0])}
    return models.add(graph, field("1_color", 0, minimum=0, maximum=1 << 24))


def color(path: Path) -> int:
    with Image.open(path) as image:
        red, green, blue = image.convert("RGB").getpixel((5, 5))
    return int(red << 16 | green << 8 | blue)


# -- what is read from the disk -------------------------------------------------------------------------
class Elsewhere:
    """A ComfyUI that says of its output folder what is another folder on this machine."""

    def __init__(self, comfy: Comfy, root: Path, files: JobFiles) -> None:
        self.files, self._theirs, self.root = files, comfy.output_dir, root
        self.root.mkdir(exist_ok=True)

    def there(self, subfolder: str, name: str = "x.png") -> dict[str, str]:
        """Make a file in the ComfyUI's real folder."""
        (self._theirs / subfolder).mkdir(parents=True, exist_ok=True)
        (self._theirs / subfolder / name).write_bytes(b"theirs")
        return {"filename": name, "subfolder": subfolder, "type": "output"}

    def here(self, subfolder: str, name: str = "x.png") -> Path:
        path = self.root / subfolder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"of this machine")
        return path

    async def fetched(self, file: dict[str, str]) -> bytes:
        await self.files.fetch([file])
        return self.files.copied()[-1].read_bytes()


@asynccontextmanager
async def elsewhere(comfy: Comfy, models: Models, tmp_path: Path) -> AsyncIterator[Elsewhere]:
    server = Server(comfy.url, client_id="elsewhere")
    await server.open()
    line = Line(server, Events(server), identity="mended:1")
    line.output_dir = tmp_path / "root"
    try:
        job = make_job(models.add({"1": empty(), "2": save("1")}), tmp_path)
        yield Elsewhere(comfy, line.output_dir, JobFiles(line, job))
    finally:
        await server.close()


async def test_only_folders_of_the_job_s_own_prompts_are_read(
    comfy: Comfy, models: Models, tmp_path: Path
) -> None:
    ours, others = str(uuid.uuid4()), str(uuid.uuid4())
    async with elsewhere(comfy, models, tmp_path) as far:
        far.files.prompt_ids.add(ours)
        for subfolder in ("rushes", "rushes/data", f"rushes/{others}", f"x/{ours}", f"rushes/x/{ours}", ""):
            far.here(subfolder)
            assert b"theirs" == await far.fetched(far.there(subfolder))
        far.here(f"rushes/{ours}/part")
        assert b"of this machine" == await far.fetched(far.there(f"rushes/{ours}/part"))


async def test_links_lead_nowhere_else(comfy: Comfy, models: Models, tmp_path: Path) -> None:
    ours = str(uuid.uuid4())
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "x.png").write_bytes(b"of this machine")
    async with elsewhere(comfy, models, tmp_path) as far:
        far.files.prompt_ids.add(ours)
        folder = far.root / "rushes" / ours
        folder.mkdir(parents=True)
        (folder / "x.png").symlink_to(secret / "x.png")
        (folder / "sub").symlink_to(secret)
        (folder / "loop").symlink_to(folder / "loop")
        os.mkfifo(folder / "pipe.png")
        far.here("rushes/beside")
        (folder / "up.png").symlink_to(far.root / "rushes" / "beside" / "x.png")
        subfolder = f"rushes/{ours}"
        for place, name in (
            (subfolder, "x.png"),
            (f"{subfolder}/sub", "x.png"),
            (f"{subfolder}/loop", "x.png"),
            (subfolder, "pipe.png"),
            (subfolder, "up.png"),
        ):
            assert b"theirs" == await far.fetched(far.there(place, name)), (place, name)


async def test_a_folder_of_ours_that_leads_elsewhere_is_not_read(
    comfy: Comfy, models: Models, tmp_path: Path
) -> None:
    ours = str(uuid.uuid4())
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "x.png").write_bytes(b"of this machine")
    async with elsewhere(comfy, models, tmp_path) as far:
        far.files.prompt_ids.add(ours)
        (far.root / "rushes").mkdir()
        (far.root / "rushes" / ours).symlink_to(secret)
        assert b"theirs" == await far.fetched(far.there(f"rushes/{ours}"))


async def test_the_output_folder_itself_may_be_a_link(comfy: Comfy, models: Models, tmp_path: Path) -> None:
    ours = str(uuid.uuid4())
    (tmp_path / "other disk").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "other disk")
    async with elsewhere(comfy, models, tmp_path) as far:
        far.files.prompt_ids.add(ours)
        far.here(f"rushes/{ours}")
        assert b"of this machine" == await far.fetched(far.there(f"rushes/{ours}"))


# -- what is removed ------------------------------------------------------------------------------------
def test_what_is_old_goes_and_what_a_job_still_names_stays(
    process: ComfyProcess,
    own: ComfyUIEngine,
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = previewing(models)
    for number in (1, 2, 3):
        assert number == color(Work(own, make_job(model, tmp_path, **{"1_color": number})).made()[0].path)
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"somebody else's")
    (process.temp_dir / "link.png").symlink_to(outside)
    (process.temp_dir / "folder").symlink_to(tmp_path)
    (process.output_dir / "own").mkdir()
    for path in ("kept_01.png", "own/kept_2.png", "own/kept_10.png"):
        (process.output_dir / path).write_bytes(b"left by a node")
    another = process.output_dir / "rushes" / str(uuid.uuid4()) / "x_1_.png"
    another.parent.mkdir(parents=True)
    another.write_bytes(b"of a prompt that runs")
    another.with_name("x_2_.png").write_bytes(b"of a prompt that runs")

    def pictures() -> list[int]:
        return [
            color(path)
            for path in sorted(process.temp_dir.glob("*.png"))
            if path.stat().st_size and not path.is_symlink()
        ]

    assert [1, 2, 3] == pictures()
    left = {path: path.read_bytes() for path in process.output_dir.rglob("*.png")}
    monkeypatch.setattr(files_module, "_TEMP_SECONDS", 0.0)
    # Out of the cache: its file is as old as the others.
    assert 3 == color(Work(own, make_job(model, tmp_path, **{"1_color": 3})).made()[0].path)
    eventually(lambda: [3] == pictures(), 10)
    assert left == {path: path.read_bytes() for path in process.output_dir.rglob("*.png")}
    assert b"somebody else's" == outside.read_bytes()
    assert (process.temp_dir / "link.png").is_symlink()
    assert b"the operator's own" == (process.input_dir / "operators.png").read_bytes()

    monkeypatch.setattr(files_module, "_OUTPUT_SECONDS", 0.0)
    assert 4 == color(Work(own, make_job(model, tmp_path, **{"1_color": 4})).made()[0].path)
    expected = {"kept_01.png": b"", "own/kept_10.png": b""}  # the last of each series, empty
    expected |= {
        str(path.relative_to(process.output_dir)): left[path] for path in left if path.parts[-3] == "rushes"
    }

    def contents() -> dict[str, bytes]:
        return {
            str(path.relative_to(process.output_dir)): path.read_bytes()
            for path in process.output_dir.rglob("*.png")
        }

    eventually(lambda: expected == contents(), 10)
    assert b"the operator's own" == (process.input_dir / "operators.png").read_bytes()


def test_young_files_stay(process: ComfyProcess, own: ComfyUIEngine, models: Models, tmp_path: Path) -> None:
    model = previewing(models)
    for number in (1, 2):
        Work(own, make_job(model, tmp_path, **{"1_color": number})).made()
    assert [1, 2] == [color(path) for path in sorted(process.temp_dir.glob("*.png"))]


def test_no_new_file_takes_the_name_of_one_that_was_removed(
    process: ComfyProcess,
    own: ComfyUIEngine,
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cache that remembers many prompts would show it to whoever asked for the old one."""
    model, other = previewing(models), models.add({"1": empty(9), "2": save("1")}, id="test/saving")
    for number in (1, 2):
        Work(own, make_job(model, tmp_path, **{"1_color": number})).made()
    names = {path.name for path in process.temp_dir.glob("*.png")}
    monkeypatch.setattr(files_module, "_TEMP_SECONDS", 0.0)
    Work(own, make_job(other, tmp_path)).made()
    (last,) = process.temp_dir.glob("*.png")
    assert (max(names), 0) == (last.name, last.stat().st_size)
    assert 3 == color(Work(own, make_job(model, tmp_path, **{"1_color": 3})).made()[0].path)
    (new,) = (path for path in process.temp_dir.glob("*.png") if path.stat().st_size)
    assert new.name not in names
    assert new.name > max(names)


@pytest.mark.parametrize("removed", ["file", "swept"])
def test_a_cached_prompt_whose_file_is_gone_is_made_anew(
    process: ComfyProcess, own: ComfyUIEngine, models: Models, tmp_path: Path, removed: str
) -> None:
    model = previewing(models)
    Work(own, make_job(model, tmp_path)).made()
    (file,) = process.temp_dir.glob("*.png")
    if removed == "file":
        file.unlink()
    else:
        files_module._sweep(process.temp_dir, file.stat().st_ctime + 1)
        assert b"" == file.read_bytes()
    error = Work(own, make_job(model, tmp_path)).error()
    assert isinstance(error, EngineError)
    assert ("output_gone", True) == (error.reason, error.retryable)
    (made,) = Work(own, make_job(model, tmp_path, attempt=2)).made()
    assert ("image", 64, 64) == (made.kind, made.width, made.height)


# -- what an account leaves out -------------------------------------------------------------------------
def picture(name: str) -> dict[str, object]:
    return {"images": [{"filename": name, "subfolder": "", "type": "output"}]}


def test_nodes_made_at_run_time_are_a_doubt() -> None:
    """The history names what they made as the graph's node's."""
    for grown in (False, True):
        account = Account()
        if grown:
            made = {"node": "61.0.1", "display_node": "61", "output": picture("child.png")}
            account.message("executed", made)
        account.message("executed", {"node": "61", "display_node": "61", "output": picture("own.png")})
        account.message("execution_success", {})
        assert grown == (account.entry(["61"]) is None)
