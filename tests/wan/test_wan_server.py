"""The Wan engine through the whole server: real processes, real HTTP, the real loaders, and tiny random weights.

Three servers, started once for all tests: one whose engine has faults on order, one with the four built-in models,
and one of the profile `turbo` that fetches its weights from a hub. A process that holds a model takes seconds to
start, so the tests of the first stand in an order that needs few of them, and what only needs to be asked of the
others is asked first of all: they work on it meanwhile. Each test works alone all the same.
"""

import io
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("diffusers", reason="needs the extra: pip install 'rushes[wan]'")

import numpy as np
import psutil
from PIL import Image

from rushes.worker.lease import worker_lost
from support.hub import Hub, serve_hub
from support.server import eventually
from support.tiny_diffusers import Kind
from support.wan_serving import (
    BROKEN,
    FIRST_LAST,
    FUSIONX,
    KINDS,
    PLAIN,
    TEXT,
    VACE,
    Video,
    WanServer,
    builtin_server,
    builtin_table,
    decoded_image,
    decoded_video,
    faulty_server,
    turbo_server,
)

Tiny = Callable[[Kind], Path]
ENDLESS: dict[str, Any] = {"steps": 1000, "size": "160x160", "frames": 141}
"""Takes minutes."""
TALL, WIDE, ODD, SMALL = "54x96 (9:16)", "96x54 (16:9)", "102x57 (16:9)", "48x48 (1:1)"
"""A tenth of 540x960, 960x540, 1024x576, 480x480."""


class Servers(NamedTuple):
    faulty: WanServer
    builtin: WanServer
    turbo: WanServer
    hub: Hub
    holds: Path
    """Where files let go of held requests."""
    broken: Path
    """Where the weights of :data:`BROKEN` are to be."""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Iterator[Servers]:
    root = tmp_path_factory.mktemp("servers")
    holds, broken = root / "holds", root / "broken"
    with serve_hub() as hub:
        faulty = faulty_server(root, tiny("text"), broken, holds)
        builtin = builtin_server(root, hub, {id_: tiny(kind) for id_, kind in KINDS.items()})
        turbo = turbo_server(root, hub, FIRST_LAST, tiny(KINDS[FIRST_LAST]))
        made = (faulty, builtin, turbo)
        try:
            for server in made:
                server.spawn()
            for server in made:
                server.wait()
            yield Servers(*made, hub, holds, broken)
        finally:
            for server in made:
                server.end()


# -- what is asked of the built-in models ---------------------------------------------------------------------
Case = tuple[str, str, int, int]
"""Model, size, frames and frames per second."""
IMAGES: list[Case] = [(TEXT, "1440:810 (16:9)", 1, 0), (TEXT, "1024:1365 (3:4)", 1, 0)]
VIDEOS: list[Case] = [
    (model, *asked)
    for model in (FUSIONX, FIRST_LAST, VACE)
    for asked in ((TALL, 81, 16), (ODD, 81, 12), (WIDE, 141, 24))
]
NAMES = {
    FUSIONX: ("602_widthx602_height", "602_num_frames", "609_frame_rate"),
    FIRST_LAST: ("71_widthx71_height", "67_length", "73_frame_rate"),
    VACE: ("4_valuex3_value", "25_value", "38_value"),
}
"""Of the inputs for size, frames and frames per second."""
GIVEN: dict[str, dict[str, Any]] = {
    FUSIONX: {"600_prompt": "the dog walks", "608_image": "RunComfy_examples_1235_1.png", "598_steps": 6},
    FIRST_LAST: {
        "6_text": "Puppy, playing",
        "68_image": "Runcomfy_Example_1259_1.png",
        "62_image": "Runcomfy_Example_1259_2.png",
        "57_steps": 6,
    },
    VACE: {"56_text": "the man walks", "118_image": "Runcomfy_Example_1290_1.png", "47_value": 2},
}


def video(model: str, size: str = SMALL, frames: int = 9, fps: int = 16, **more: Any) -> dict[str, Any]:
    """An input."""
    return GIVEN[model] | dict(zip(NAMES[model], (size, frames, fps), strict=True)) | more


PROMPTS = ["a cat", "Ein Bär läuft", "猫が歩く", "犬が歩く", "кіт 🐈 їсть", "قطة تمشي"]
CHANGES: list[dict[str, Any]] = [
    {},
    {},
    {"57_noise_seed": 1},
    {"57_steps": 7},
    {"57_cfg": 0.6},
    {"54_shift": 3},
    {"68_image": "Runcomfy_Example_1290_1.png"},
    {"62_image": "Runcomfy_Example_1290_1.png"},
]
"""Of one request for :data:`FIRST_LAST`."""


class Asked(NamedTuple):
    """Ids of requests."""

    turbo: str
    images: dict[Case, str]
    videos: dict[Case, str]
    pictures: list[str]
    prompts: list[str]
    changes: list[str]


@pytest.fixture(scope="module", autouse=True)
def asked(servers: Servers) -> Asked:
    """All at once, those of one model after those of another."""
    server = servers.builtin

    def videos(model: str) -> dict[Case, str]:
        return {case: server.ask(model, **video(*case)) for case in VIDEOS if case[0] == model}

    def first_last(changes: list[dict[str, Any]]) -> list[str]:
        return [server.ask(FIRST_LAST, **video(FIRST_LAST, **change)) for change in changes]

    turbo = servers.turbo.ask(FIRST_LAST, **video(FIRST_LAST, TALL, 81))
    images = {case: server.ask(TEXT, prompt="a red lamp", aspect_ratio=case[1]) for case in IMAGES}
    fusionx = videos(FUSIONX)
    pictures = first_last([{"68_image": url} for url in uploaded_pictures(server)])
    prompts = first_last([{"6_text": words} for words in PROMPTS])
    changes = first_last(CHANGES)
    return Asked(turbo, images, fusionx | videos(FIRST_LAST) | videos(VACE), pictures, prompts, changes)


def uploaded_pictures(server: WanServer) -> list[str]:
    """The addresses of one grey picture in a JPEG on its side, as phones make them, and in PNGs of four modes; and of
    what lies in the JPEG as nobody sees it.
    """
    coarse = np.random.default_rng(5).integers(0, 256, (6, 4), dtype=np.uint8)
    lying = np.asarray(Image.fromarray(coarse).resize((64, 96), Image.Resampling.BICUBIC)).copy()
    lying[:24, :40] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    stored = io.BytesIO()
    Image.fromarray(lying).save(stored, "JPEG", quality=100, exif=exif)
    grey = decoded_image(stored.getvalue()).transpose(Image.Transpose.ROTATE_270)
    palette = grey.convert("P")
    assert ("L", "P") == (grey.mode, palette.mode)
    cut_out = np.asarray(grey.convert("RGBA")).copy()
    white = np.asarray(grey) == 255
    assert white.sum() > 500
    cut_out[white] = (200, 10, 90, 0)  # what nobody sees, where the paper shows through
    others = (grey, grey.convert("RGB"), palette, Image.fromarray(cut_out), Image.fromarray(lying))
    return [server.upload(stored.getvalue()), *map(server.upload_png, others)]


# -- the processes ----------------------------------------------------------------------------------------------
def slot(server: WanServer) -> psutil.Process:
    """The one process that holds a model."""
    return server.one("slot")


def denoising(server: WanServer, id_: str) -> dict[str, Any]:
    """Wait until a step of it is done; what the status says then."""

    def begun() -> dict[str, Any] | None:
        status = server.status(id_)
        assert status["status"] in ("in_queue", "in_progress"), server.result(id_)
        if status.get("stage") == "denoising":
            return status
        time.sleep(0.05)
        return None

    return dict(eventually(begun, 90, f"{id_} is denoised"))


# -- faults -----------------------------------------------------------------------------------------------------
def plain(server: WanServer, model: str = PLAIN, **changed: Any) -> str:
    return server.ask(model, **{"prompt": "a cat", **changed})


@pytest.fixture(scope="module")
def reference(servers: Servers) -> bytes:
    """What :func:`plain` makes."""
    return servers.faulty.made(plain(servers.faulty))


def put_weights(tiny: Path, folder: Path, how: str) -> None:
    """A copy of a pipeline: whole, missing, cut off, overwritten, or with a part of another model."""
    shutil.rmtree(folder, ignore_errors=True)
    if how == "missing":
        return
    shutil.copytree(tiny, folder)
    shard = min((folder / "transformer").glob("*.safetensors"))
    content, config = shard.read_bytes(), folder / "vae" / "config.json"
    if how == "cut off":
        shard.write_bytes(content[:-1000])
    elif how == "overwritten":
        shard.write_bytes(bytes(reversed(content)))
    elif how == "mixed":
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_dim": 8}))


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("missing", "weights_incomplete"),
        ("cut off", "weights_incomplete"),
        ("overwritten", "weights_incomplete"),
        ("mixed", "weights_unusable"),
    ],
)
def test_weights_that_cannot_be_used_fail_their_requests(
    servers: Servers, tiny: Tiny, how: str, code: str
) -> None:
    put_weights(tiny("text"), servers.broken, how)

    error = servers.faulty.failed(plain(servers.faulty, BROKEN))

    assert code == error["code"]
    assert str(servers.broken.parent) not in error["message"]  # nor any path of the machine
    assert str(tiny("text").parent) not in error["message"]
    assert len(error["message"]) > 20


def test_another_model_has_a_process_of_its_own_and_the_old_one_is_gone(servers: Servers, tiny: Tiny) -> None:
    server = servers.faulty
    put_weights(tiny("text"), servers.broken, "whole")
    server.succeeded(plain(server, BROKEN))  # weights that are mended need no new start
    held = plain(server, BROKEN, prompt="a cat [hold swap]")
    denoising(server, held)
    old = slot(server)

    other = plain(server, PLAIN)
    eventually(lambda: server.status(other)["status"] == "in_progress", 30, "it has a lane beside the held one")
    (servers.holds / "swap").touch()

    assert server.made(held) == server.made(other)  # the same weights in two folders
    (new,) = server.processes("slot")
    assert old.pid != new.pid
    assert not old.is_running()  # and with it all of its memory is gone
    assert [1, 1] == [server.record(id_).attempt for id_ in (held, other)]
    server.succeeded(plain(server, PLAIN))
    assert new.pid == slot(server).pid


def test_cancel_ends_what_waits_and_not_what_runs(servers: Servers, reference: bytes) -> None:
    server = servers.faulty
    held = plain(server, prompt="a cat [hold cancel]")
    assert 0 < denoising(server, held)["progress"] < 1
    behind = plain(server)  # may be in the engine's process already, where it waits for its turn
    waiting = [plain(server), plain(server)]

    def cancel(id_: str) -> str:
        answer = server.call("POST", f"/v1/requests/{id_}/cancel")
        assert 202 == answer.status_code
        return str(answer.json()["outcome"])

    assert ["cancelled", "cancelled"] == [cancel(id_) for id_ in waiting]
    assert "not_cancellable" == cancel(held)
    (servers.holds / "cancel").touch()
    assert [reference, reference] == [server.made(id_) for id_ in (held, behind)]
    assert ["cancelled", "cancelled"] == [server.result(id_)["status"] for id_ in waiting]
    assert [0, 0] == [server.record(id_).attempt for id_ in waiting]
    assert "not_cancellable" == cancel(held)


def test_out_of_memory_once_is_tried_again_with_less(servers: Servers, reference: bytes) -> None:
    server = servers.faulty
    process = slot(server)

    id_ = plain(server, prompt="a cat [oom-once]")

    assert reference == server.made(id_)
    assert Video(48, 32, 9, Fraction(12)) == decoded_video(reference)
    (event,) = server.events("wan out of memory", request=id_)
    assert (False, "saving") == (event["denoised"], event["rung"])
    assert 1 == server.record(id_).attempt
    assert reference == server.made(plain(server))
    assert process.pid == slot(server).pid


def test_a_lost_lease_ends_the_job_and_leaves_nothing_behind(servers: Servers, reference: bytes) -> None:
    server = servers.faulty
    process = slot(server)
    id_ = plain(server, **ENDLESS)
    denoising(server, id_)

    async def expire(store: Any) -> int:
        """What the reaper of another worker does; on the last attempt."""
        while True:
            marks = [mark for mark in await store.leases() if mark.id == id_]
            if await store.expire(marks, worker_lost(), 1):  # 0: a sign of life came in between
                return len(marks)

    assert 1 == server.with_store(expire)
    assert "worker_lost" == server.failed(id_)["code"]
    assert reference == server.made(plain(server))
    assert server.events("lease lost", request=id_)
    assert process.pid == slot(server).pid


def test_the_time_limit_ends_the_job_and_leaves_nothing_behind(servers: Servers, reference: bytes) -> None:
    server = servers.faulty
    process = slot(server)

    assert "time_limit" == server.failed(plain(server, **ENDLESS))["code"]

    assert reference == server.made(plain(server))
    assert process.pid == slot(server).pid


def test_kill_9_of_the_engines_process_in_mid_run(servers: Servers, reference: bytes) -> None:
    server = servers.faulty
    id_ = plain(server, prompt="a cat [hold-once kill]")
    denoising(server, id_)
    process = slot(server)

    process.send_signal(signal.SIGKILL)

    assert reference == server.made(id_)
    assert 2 == server.record(id_).attempt
    assert process.pid != slot(server).pid


def test_kill_9_of_the_worker_in_mid_run(servers: Servers, reference: bytes) -> None:
    server = servers.faulty
    id_ = plain(server, prompt="a cat [hold-once worker]")
    denoising(server, id_)
    process = slot(server)

    server.one("worker").send_signal(signal.SIGKILL)

    assert reference == server.made(id_)
    assert 2 == server.record(id_).attempt
    eventually(lambda: not process.is_running(), 10, "the old process is gone")


def test_out_of_memory_for_good_fails_one_request_and_no_other(servers: Servers, reference: bytes) -> None:
    server = servers.faulty
    process = slot(server)
    lost = plain(server, prompt="a cat [oom-always]")
    waiting = [plain(server) for _ in range(3)]  # one of them in the process, perhaps, and the others not

    error = server.failed(lost)

    assert "out_of_memory" == error["code"]
    assert "smaller" in error["message"]
    assert "CUDA" not in error["message"]
    assert [reference] * 3 == [server.made(id_) for id_ in waiting]
    assert [1] * 4 == [server.record(id_).attempt for id_ in (lost, *waiting)]
    rungs = [event["rung"] for event in server.events("wan out of memory", request=lost)]
    assert ["saving", "offload"] == rungs
    assert not process.is_running()
    assert process.pid != slot(server).pid


def test_sigterm_gives_back_what_does_not_end_in_time(servers: Servers, reference: bytes) -> None:
    """And a server that was just started makes the same of it as one that has been through all of the above."""
    server = servers.faulty
    id_ = plain(server, prompt="a cat [hold drain]")
    denoising(server, id_)

    assert 0 == server.stop()

    assert "queued" == server.record(id_).state
    (servers.holds / "drain").touch()
    server.start()
    assert reference == server.made(id_)
    assert 1 == server.record(id_).attempt


# -- the profile turbo, with weights from a hub ---------------------------------------------------------------
def test_turbo_fetches_its_weights_and_says_that_it_was_turbo(servers: Servers, asked: Asked) -> None:
    server, wan = servers.turbo, builtin_table(FIRST_LAST)

    result = server.succeeded(asked.turbo, 90)

    assert "wan-turbo" == result["engine"]
    assert Video(54, 96, 81, Fraction(16)) == decoded_video(server.made(asked.turbo))
    home = Path(server.environment["HF_HOME"]) / "hub"
    assert (home / f"models--{wan.weights.replace('/', '--')}" / "snapshots" / wan.revision).is_dir()
    assert wan.turbo is not None
    for lora in wan.turbo.loras:
        assert 1 == len(servers.hub.downloads(f"{lora.source}/{lora.revision}/{lora.path}"))
    (ready,) = server.events("wan model ready")
    assert ("turbo", FIRST_LAST) == (ready["profile"], ready["model"])
    assert 2 == sum("fusing" in step for step in ready["done"])


# -- the four models ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", IMAGES, ids=str)
def test_images_of_sizes_that_no_grid_fits(servers: Servers, asked: Asked, case: Case) -> None:
    server, id_ = servers.builtin, asked.images[case]
    width, height = (int(side) for side in case[1].split(" ")[0].split(":"))

    result, picture = server.succeeded(id_, 100), decoded_image(server.made(id_))

    assert ("wan", TEXT) == (result["engine"], result["model_id"])
    assert ((width, height), "PNG", "RGB") == (picture.size, picture.format, picture.mode)
    assert np.asarray(picture).std() > 1  # of something
    (file,) = result["files"]
    assert [width, height, "image/png"] == [file[name] for name in ("width", "height", "content_type")]
    assert {"image": file["url"], "images": [file["url"]]} == result["output"]


@pytest.mark.parametrize("case", VIDEOS, ids=str)
def test_videos_are_exactly_what_was_asked(servers: Servers, asked: Asked, case: Case) -> None:
    server, id_ = servers.builtin, asked.videos[case]
    model, size, frames, fps = case
    width, height = (int(side) for side in size.split(" ")[0].split("x"))

    result, made = server.succeeded(id_, 100), server.made(id_)

    assert Video(width, height, frames, Fraction(fps)) == decoded_video(made)
    (file,) = result["files"]
    told = [file[name] for name in ("width", "height", "frames", "fps", "content_type")]
    assert [width, height, frames, fps, "video/mp4"] == told
    assert pytest.approx(frames / fps) == file["duration"]
    assert ("wan", model) == (result["engine"], result["model_id"])


def test_pictures_of_every_kind_are_what_one_sees(servers: Servers, asked: Asked) -> None:
    *seen, unseen = [servers.builtin.made(id_, 100) for id_ in asked.pictures]
    assert [seen[0]] * 5 == seen
    assert unseen != seen[0]


def test_prompts_of_any_script_are_read(servers: Servers, asked: Asked) -> None:
    assert len(PROMPTS) == len({servers.builtin.made(id_, 100) for id_ in asked.prompts})


def test_the_same_request_gives_the_same_bytes_and_each_value_counts(servers: Servers, asked: Asked) -> None:
    first, second, *others = [servers.builtin.made(id_, 100) for id_ in asked.changes]
    assert first == second
    assert len(others) + 1 == len({first, *others})


def test_sigterm_lets_the_running_video_end_and_keeps_the_waiting_ones(servers: Servers, asked: Asked) -> None:
    server = servers.builtin
    for id_ in asked.videos.values():
        server.succeeded(id_, 100)
    # So many requests, and each of the four models was loaded once.
    loaded = [event["model"] for event in server.events("wan model ready")]
    assert [TEXT, FUSIONX, FIRST_LAST, VACE] == loaded
    running = server.ask(VACE, **video(VACE, "128x72 (16:9)", 141, **{"47_value": 20}))
    denoising(server, running)
    waiting = [server.ask(VACE, **video(VACE)) for _ in range(2)]  # at most one of them has a lane already

    assert 0 == server.stop()

    ended, kept = server.record(running), server.record(waiting[-1])
    assert ("succeeded", 1) == (ended.state, ended.attempt)
    assert ("queued", 0) == (kept.state, kept.attempt)
    stored = server.data_dir / "files" / ended.outputs[0].key
    assert Video(128, 72, 141, Fraction(16)) == decoded_video(stored.read_bytes())
