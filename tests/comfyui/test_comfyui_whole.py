"""The whole way when nothing goes wrong: requests over HTTP, one `rushes serve`, one ComfyUI."""

from collections.abc import Iterator
from io import BytesIO

import pytest
from PIL import Image

from rushes.catalog.model import Model
from support.comfyui import Comfy, kinds
from support.comfyui_models import Models, field, file_field, slow_graph, slow_model
from support.comfyui_serving import record, submit, succeeded
from support.comfyui_transcripts import empty, node, save
from support.server import Server, eventually


class House:
    """One server, one ComfyUI, and the models that the tests use."""

    def __init__(self, comfy: Comfy, models: Models) -> None:
        self.comfy, self.models = comfy, models
        self.server = Server(
            models.root.parent / "data", engine="comfyui", comfyui_urls=comfy.url, models_dir=models.root
        )

    def add(self) -> None:
        fail = {**node("RushesTestFail", image=["1", 0], reason="no luck"), "_meta": {"title": "High noise"}}
        scale = node("ImageScale", image=["1", 0], upscale_method="area", width=8, height=8, crop="disabled")
        size = field("2_widthx2_height", "60x36", role="resolution")
        scaling = {"1": node("LoadImage", image="a.png"), "2": scale, "3": save("2")}
        self.scaling = self.models.add(scaling, file_field("1_image"), size, id="test/scaling")
        self.wide = self.models.add({"1": empty(), "2": save("1")}, field("1_width", 64), id="test/wide")
        self.failing = self.models.add({"1": empty(), "2": fail, "3": save("2")}, id="test/failing")
        self.slow: Model = self.models.add(slow_graph(seconds=1.0, steps=20), id="test/slow")
        self.quick = slow_model(self.models, id="test/quick")


@pytest.fixture(scope="module", params=kinds())
def house(
    request: pytest.FixtureRequest, comfy_pool: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[House]:
    comfy = comfy_pool(request.param, 0)  # type: ignore[operator]
    made = House(comfy, Models(tmp_path_factory.mktemp("house") / "models"))
    made.add()
    made.server.start()
    yield made
    made.server.stop()


def test_a_request_goes_the_whole_way_and_back(house: House) -> None:
    server = house.server
    id_ = submit(server, house.scaling, **{"1_image": "Runcomfy_Example_1290_1.png"})
    result = succeeded(server, id_)
    with server.client() as client:
        content = client.get(result["output"]["image"], follow_redirects=True).content
    with Image.open(BytesIO(content)) as image:
        assert ("PNG", (60, 36)) == (image.format, image.size)
    assert "comfyui" == record(server, id_).engine
    eventually(lambda: {} == house.comfy.history(), 10, "ComfyUI has forgotten it")


def test_many_requests_each_get_their_own_picture(house: House) -> None:
    server = house.server
    ids = {submit(server, house.wide, **{"1_width": width}): width for width in range(16, 36)}
    for id_, width in ids.items():
        succeeded(server, id_)
        found = record(server, id_)
        assert ([width], 1) == ([output.width for output in found.outputs], found.attempt)


def test_a_failure_names_the_node_and_not_the_server(house: House) -> None:
    server = house.server
    result = server.finished(submit(server, house.failing))
    assert ("failed", "node_failed") == (result["status"], result["error"]["code"])
    assert "High noise" in str(result["error"])
    for secret in ("/support/", "Traceback", "127.0.0.1:" + str(house.comfy.port)):
        assert secret not in str(result["error"])
    assert "/support/" in server.log.read_text()
    succeeded(server, submit(server, house.quick))


def test_progress_and_the_nodes_title_are_seen_from_outside(house: House) -> None:
    server = house.server
    id_ = submit(server, house.slow)

    def shown() -> bool:
        progress = record(server, id_).progress
        return progress is not None and (progress.stage, progress.steps) == ("The slow part", 20)

    eventually(shown, 20, "the node's title and steps")
    succeeded(server, id_)
