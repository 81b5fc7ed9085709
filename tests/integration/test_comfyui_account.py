"""What a socket told of a prompt against what the history says of it, and where ComfyUI's files are."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from rushes.engines.comfyui.events import Events, ImageType
from rushes.engines.comfyui.files import output_dir_of
from rushes.engines.comfyui.outputs import named_files
from rushes.engines.comfyui.prompt import Account
from rushes.engines.comfyui.server import Server
from support.comfyui import Comfy, Graph, kinds


def empty(color: int) -> dict[str, Any]:
    return {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 8, "batch_size": 2, "color": color}}


def graph(color: int) -> Graph:
    saved = {"images": ["1", 0], "filename_prefix": "account/a"}
    return {
        "1": empty(color),
        "2": {"class_type": "SaveImage", "inputs": saved},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }


def failing() -> Graph:
    fails = {"class_type": "RushesTestFail", "inputs": {"image": ["1", 0], "reason": "no luck"}}
    return {**graph(77), "4": fails, "5": {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}}}


class Listener:
    def __init__(self) -> None:
        self.account = Account()
        self.ended = asyncio.Event()

    def message(self, type_: str, data: dict[str, Any]) -> None:
        self.account.message(type_, data)
        if type_ == "executing" and data.get("node") is None:
            self.ended.set()

    def preview(self, type_: ImageType, image: bytes) -> None: ...

    def missed(self) -> None: ...


@pytest.fixture(scope="module", params=kinds())
def comfy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    made = Comfy(request.param, tmp_path_factory.mktemp("comfyui"))
    try:
        yield made.start()
    finally:
        made.close()


@pytest.fixture
async def connection(comfy: Comfy) -> AsyncIterator[tuple[Server, Events]]:
    server = Server(comfy.url, client_id="account")
    await server.open()
    events = Events(server)
    events.start()
    await events.open.wait()
    try:
        yield server, events
    finally:
        await events.close()
        await server.close()


async def told(
    connection: tuple[Server, Events], prompt: Graph, prompt_id: str
) -> tuple[Account, dict[str, Any]]:
    """The socket's account of a prompt, and its entry in the history."""
    server, events = connection
    listener = Listener()
    events.follow(prompt_id, listener)
    assert prompt_id == await server.submit(prompt, prompt_id, {})
    await listener.ended.wait()
    entry = await server.history(prompt_id)
    assert entry is not None
    return listener.account, entry


async def test_the_socket_s_account_is_the_history_s(connection: tuple[Server, Events]) -> None:
    # The second one comes out of ComfyUI's cache, whole.
    for prompt_id in ("first", "again"):
        account, entry = await told(connection, graph(5), prompt_id)
        accounted = account.entry(["2"])
        assert accounted is not None
        for wanted in ((), ("2",), ("3",)):
            found = named_files(entry, graph(5), wanted)
            assert 2 == len(found)
            assert found == named_files(accounted, graph(5), wanted)


async def test_a_node_that_showed_nothing_is_a_doubt(connection: tuple[Server, Events]) -> None:
    account, _ = await told(connection, graph(6), "shown")
    assert None is not account.entry(["2", "3"])
    assert None is account.entry(["1"])
    assert None is account.entry(["2", "99"])


async def test_a_failure_is_a_doubt(connection: tuple[Server, Events]) -> None:
    account, entry = await told(connection, failing(), "failing")
    assert "error" == entry["status"]["status_str"]
    assert None is account.entry(["2"])


async def test_the_output_folder_is_found_by_what_the_server_tells(
    comfy: Comfy, connection: tuple[Server, Events]
) -> None:
    stats = await connection[0].system_stats()
    assert comfy.output_dir == output_dir_of(comfy.url, stats, None)
    assert None is output_dir_of("http://gpu-1.example:8188", stats, None)


@pytest.mark.parametrize(
    "arguments",
    [
        ["{}/main.py"],
        ["main.py", "--output-directory", "{}/output"],
        ["main.py", "--cpu", "--output-directory={}/output", "--base-directory", "/nowhere"],
        ["/nowhere/main.py", "--base-directory", "{}"],
    ],
)
def test_the_output_folder_follows_the_arguments(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "output").mkdir()
    stats = {"system": {"argv": [one.format(tmp_path) for one in arguments]}}
    assert tmp_path / "output" == output_dir_of("http://localhost:8188", stats, None)


@pytest.mark.parametrize(
    "stats",
    [
        {},
        {"system": None},
        {"system": {"argv": []}},
        {"system": {"argv": ["main.py"]}},
        {"system": {"argv": ["main.py", "--output-directory"]}},
        {"system": {"argv": ["main.py", "--output-directory", "out"]}},
        {"system": {"argv": ["main.py", "--output-directory", "/no/such/folder"]}},
    ],
)
def test_where_it_is_not_told_there_is_none(stats: dict[str, Any]) -> None:
    assert None is output_dir_of("http://127.0.0.1:8188", stats, None)
