"""One ComfyUI of each kind for the whole session; each test gets it as new, restarted where it must be."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rushes.engines.comfyui.engine import ComfyUIEngine
from support.comfyui import Comfy, kinds
from support.comfyui_models import Models
from support.comfyui_wire import Wire

Pool = Callable[[str, int], Comfy]
MakeEngine = Callable[..., ComfyUIEngine]


@pytest.fixture(scope="session")
def comfy_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    made: dict[tuple[str, int], Comfy] = {}

    def get(kind: str, number: int) -> Comfy:
        if (kind, number) not in made:
            made[kind, number] = Comfy(kind, tmp_path_factory.mktemp(f"{kind}{number}"))
        made[kind, number].reset()
        return made[kind, number]

    yield get
    for comfy in made.values():
        comfy.close()


@pytest.fixture(params=kinds())
def comfy(request: pytest.FixtureRequest, comfy_pool: Pool) -> Comfy:
    """A ComfyUI that runs, with nothing queued, cached or remembered."""
    return comfy_pool(request.param, 0)


@pytest.fixture
def second_comfy(comfy: Comfy, comfy_pool: Pool) -> Comfy:
    """Another one of the same kind."""
    return comfy_pool(comfy.kind, 1)


@pytest.fixture
def png(tmp_path: Path) -> Path:
    """A small picture with something in it."""
    from PIL import Image

    path = tmp_path / "picture.png"
    picture = Image.new("RGB", (80, 48), (10, 60, 200))
    picture.paste((250, 200, 20), (0, 0, 40, 24))
    picture.save(path)
    return path


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path / "models")


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """Engines, each closed when the test ends."""
    made: list[ComfyUIEngine] = []

    def make(url: str, *, identity: str = "test:0", **more: Any) -> ComfyUIEngine:
        engine = ComfyUIEngine(url, identity=identity, **{"start_seconds": 60.0, **more})
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def engine(comfy: Comfy, make_engine: MakeEngine) -> ComfyUIEngine:
    return make_engine(comfy.url)


@pytest.fixture
def wire(comfy: Comfy) -> Iterator[Wire]:
    """A network in front of the ComfyUI that can be disturbed."""
    made = Wire(comfy.port)
    yield made
    made.close()
