"""What is measured of Rushes in front of ComfyUI; each part takes turns with the bare ComfyUI in the same run."""

import asyncio
import base64
import io
import itertools
import random
import shutil
import time
from collections.abc import Iterator, Sequence

import aiohttp
import numpy as np
from PIL import Image

from comfyui_servers import (
    Bare,
    Graph,
    Ours,
    Run,
    Server,
    bare,
    clip,
    empty_image,
    large,
    noise_video,
    waiting,
    write_models,
)
from report import Bench, Row, median, p95, ratio
from rushes.client.sync import Client

ADDED_MS = 20.0
EMPTY_RATIO = 0.8
CLIP_RATIO = 0.97
TWO_RATIO = 1.8
CLIP_MS = 150.0
WORK_SECONDS = 0.3
LARGE_MB = 20
HOLD_SECONDS = 11.0
"""ComfyUI collects garbage, for half a second, when a prompt ends more than 10 s after the last time: both sides
begin with a prompt of this length, and the clock starts when the one behind it has ended."""
Wanted = tuple[str, dict[str, object]]
"""A model's id and an input."""
_colours = itertools.count(1)
_seeds = itertools.count(1)


def _data(content: bytes, content_type: str) -> str:
    return f"data:{content_type};base64,{base64.b64encode(content).decode()}"


def _photo() -> bytes:
    """A PNG of 512x512, smooth as a photograph."""
    ramp = np.linspace(0, 255, 512)
    pixels = np.stack(
        [np.add.outer(ramp, ramp) / 2, np.tile(ramp, (512, 1)), np.tile(ramp[::-1, None], 512)], -1
    )
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


# -- added latency ---------------------------------------------------------------------------------------
def latency(bench: Bench, servers: Sequence[Server]) -> None:
    """EmptyImage -> SaveImage, one at a time: bare and behind Rushes in turn, on the same ComfyUI."""
    ours = Ours(bench.root / "latency", [servers[0].url], write_models(bench.root / "latency-models", 64))
    try:
        asyncio.run(_latency(bench, servers[0], ours))
    finally:
        ours.stop()


async def _latency(bench: Bench, server: Server, ours: Ours) -> None:
    count, warm = bench.singles, 5
    bench.say(f"latency: {count} requests bare and as many behind Rushes, in turn")
    plain: list[float] = []
    posts: list[tuple[float, float]] = []
    ids: list[str] = []
    before = len(server.runs())
    async with bare(server.url) as client, aiohttp.ClientSession(trust_env=False) as session:
        for _ in range(count + warm):
            plain.append(await client.run(empty_image(next(_colours))))
            await asyncio.sleep(random.uniform(0.03, 0.13))  # not in step with any timer of the server
            began = time.time()
            ids.append(await ours.submit(session, "bench/empty", {"1_color": next(_colours)}))
            posts.append((began, time.time()))
            await ours.wait(session, ids[-1])
            await asyncio.sleep(random.uniform(0.03, 0.13))
        tight = [await _until_seen(ours, session) for _ in range(count)]
    records = await ours.records(ids)
    runs = server.runs(before)[1 : 2 * (count + warm) : 2]
    stored = [(r.finished_at or 0) - began for r, (began, _) in zip(records, posts, strict=True)][warm:]
    plain = plain[warm:]
    added = [1000 * (mine - other) for mine, other in zip(stored, plain, strict=True)]
    value = f"median {median(added):.1f} ms, p95 {p95(added):.1f} ms"
    what = "POST to result stored (the store's finished_at) over bare POST to execution_success"
    bench.add(Row("latency", what, value, f"<= {ADDED_MS:.0f} ms", median(added) <= ADDED_MS))
    for name, times in (
        ("bare: POST to execution_success", plain),
        ("Rushes: POST to result stored", stored),
        ("Rushes: POST to a status poll that says completed, polled without a pause", tight[warm:]),
        ("Rushes: `client.run` with its own pauses between polls", _by_client(ours, bench.singles // 5)),
    ):
        milliseconds = [1000 * one for one in times]
        bench.add(
            Row(
                "latency",
                name,
                f"median {median(milliseconds):.1f} ms, p95 {p95(milliseconds):.1f} ms",
                "reported",
            )
        )
    marks = [
        (began, answered, r.created_at, r.started_at or 0, run.began, run.ended, r.finished_at or 0)
        for r, (began, answered), run in zip(records, posts, runs, strict=True)
    ][warm:]
    bench.add(Row("latency", "where Rushes' time goes (medians)", _steps(marks), "reported"))


def _steps(marks: Sequence[Sequence[float]]) -> str:
    """The medians of the steps of a request, in milliseconds, by the clocks of those who do them."""
    names = (
        "POST to answer",
        "POST to accepted",
        "accepted to claimed",
        "claimed to begun in ComfyUI",
        "run in ComfyUI",
        "end in ComfyUI to stored",
    )
    pairs = ((0, 1), (0, 2), (2, 3), (3, 4), (4, 5), (5, 6))
    found = [median([1000 * (row[b] - row[a]) for row in marks]) for a, b in pairs]
    return "; ".join(f"{name} {one:.1f} ms" for name, one in zip(names, found, strict=True))


async def _until_seen(ours: Ours, session: aiohttp.ClientSession) -> float:
    await asyncio.sleep(random.uniform(0.03, 0.13))
    began = time.perf_counter()
    id_ = await ours.submit(session, "bench/empty", {"1_color": next(_colours)})
    await ours.wait(session, id_, pause=0)
    return time.perf_counter() - began


def _by_client(ours: Ours, count: int) -> list[float]:
    found = []
    with Client(ours.base, ours.server.key) as client:
        for _ in range(count):
            began = time.perf_counter()
            client.run("bench/empty", {"1_color": next(_colours)})
            found.append(time.perf_counter() - began)
    return found


# -- throughput ------------------------------------------------------------------------------------------
def throughput(bench: Bench, servers: Sequence[Server]) -> None:
    """N requests that wait in the queue, drained by one slot, against a bare client that does one after another."""
    asyncio.run(_throughput(bench, servers[0]))


async def _throughput(bench: Bench, server: Server) -> None:
    photo = _photo()
    async with bare(server.url) as client:
        side = await _side(bench, client, photo)
        ours = Ours(
            bench.root / "throughput", [server.url], write_models(bench.root / "throughput-models", side)
        )
        try:
            await _empties(bench, client, ours)
            await _clips(bench, client, ours, photo, side)
        finally:
            ours.stop()


async def _empties(bench: Bench, client: Bare, ours: Ours) -> None:
    count = 50 if bench.quick else 100
    mine, theirs, at_once = [], [], []
    used: list[dict[str, float]] = []
    for number in range(bench.rounds):
        bench.say(f"throughput: EmptyImage, round {number + 1} of {bench.rounds}, {count} each")
        theirs.append(await _sequential(client, [empty_image(next(_colours)) for _ in range(count + 1)]))
        before = ours.cpu_seconds()
        mine.append(
            await _drain(ours, [("bench/empty", {"1_color": next(_colours)}) for _ in range(count + 1)])
        )
        after = ours.cpu_seconds()
        used.append({role: seconds - before.get(role, 0.0) for role, seconds in after.items()})
        at_once.append(await _queued(client, [empty_image(next(_colours)) for _ in range(count + 1)]))
    middle, words = ratio(mine, theirs)
    what = f"EmptyImage -> SaveImage, {count} queued requests, one slot, against bare one after another"
    bench.add(Row("throughput", what, words, f">= {EMPTY_RATIO}x", middle >= EMPTY_RATIO))
    what = f"the same against bare with all {count} in ComfyUI's own queue at once"
    bench.add(Row("throughput", what, ratio(mine, at_once)[1], "reported"))
    each = {role: median([1000 * one.get(role, 0.0) / count for one in used]) for role in used[0]}
    words = ", ".join(f"{role} {one:.1f} ms" for role, one in each.items())
    what = "processor time of Rushes for each of them (gateway: the submits and polls)"
    bench.add(Row("throughput", what, words, "reported"))


async def _clips(bench: Bench, client: Bare, ours: Ours, photo: bytes, side: int) -> None:
    count = 15 if bench.quick else 30
    mine, theirs = [], []
    values = {"1_image": _data(photo, "image/png")}
    for number in range(bench.rounds):
        bench.say(f"throughput: video of {side}x{side}, round {number + 1} of {bench.rounds}, {count} each")
        names = [f"clip-{number}-{index}.png" for index in range(count + 1)]
        for name in names:
            await client.upload(photo, name)
        theirs.append(await _sequential(client, [clip(name, side) for name in names]))
        mine.append(await _drain(ours, [("bench/clip", values)] * (count + 1)))
    each = [a / b for a, b in zip(mine, theirs, strict=True)]
    words = (
        f"{median(each):.3f}x ({min(each):.3f}-{max(each):.3f}); "
        f"{median(mine):.2f} / {median(theirs):.2f} per s; bare {1000 / median(theirs):.0f} ms each"
    )
    what = (
        f"LoadImage -> ImageScale {side} -> 5 frames -> h264, {count} queued requests, one slot, against bare "
        "one after another, its inputs uploaded beforehand"
    )
    bench.add(Row("throughput", what, words, f">= {CLIP_RATIO}x", median(each) >= CLIP_RATIO))


async def _side(bench: Bench, client: Bare, photo: bytes) -> int:
    """The size of frames at which the video graph takes about 150 ms here."""
    names = (f"side-{number}.png" for number in itertools.count())
    found: dict[int, float] = {}
    low, high = 64, 2048
    while high - low > 32 and all(abs(one - CLIP_MS) > CLIP_MS / 20 for one in found.values()):
        side = (low + high) // 32 * 16
        times = []
        for name in itertools.islice(names, 11):
            await client.upload(photo, name)
            times.append(1000 * await client.run(clip(name, side)))
        found[side] = median(times[2:])
        low, high = (side, high) if found[side] < CLIP_MS else (low, side)
    side = min(found, key=lambda one: abs(found[one] - CLIP_MS))
    bench.say(f"throughput: frames of {side}x{side} take {found[side]:.0f} ms")
    return side


async def _sequential(client: Bare, graphs: Sequence[Graph]) -> float:
    """Prompts per second, each posted when the one before has ended; the first is not counted."""
    await client.run(waiting(HOLD_SECONDS, next(_seeds)))
    await client.run(graphs[0])
    began = time.perf_counter()
    for graph in graphs[1:]:
        await client.run(graph)
    return (len(graphs) - 1) / (time.perf_counter() - began)


async def _queued(client: Bare, graphs: Sequence[Graph]) -> float:
    """Prompts per second where all of them stand in ComfyUI's queue; the first is not counted."""
    await client.post(waiting(HOLD_SECONDS, next(_seeds)))
    ids = [await client.post(graph) for graph in graphs]
    await client.ended(ids[0])
    began = time.perf_counter()
    await client.ended(ids[-1])
    return (len(graphs) - 1) / (time.perf_counter() - began)


async def _drain(ours: Ours, requests: Sequence[Wanted], slots: int = 1, hold: float = HOLD_SECONDS) -> float:
    """Requests per second as they are stored; the first of each slot is not counted.

    All of them are accepted and their inputs ready before: one request that only waits holds each slot.
    """
    async with aiohttp.ClientSession(trust_env=False) as session:
        holds = []
        for _ in range(slots):
            values = {"2_seconds": hold, "2_seed": next(_seeds)}
            holds.append(await ours.submit(session, "bench/waiting", values))
        for id_ in holds:  # a slot may prefer what it ran last to what came first
            await ours.wait(session, id_, until=("in_progress",))
        ids = [await ours.submit(session, model, values) for model, values in requests]
        queued = time.time()
        for id_ in (*holds, *ids):
            await ours.wait(session, id_, pause=0.2)
    records = await ours.records([*holds, *ids])
    ends = sorted(r.finished_at or 0 for r in records[slots:])
    if ends[0] < queued:
        raise SystemExit("bench: the slots were free before all requests were accepted: hold them longer")
    return (len(ends) - slots) / (ends[-1] - ends[slots - 1])


# -- two ComfyUIs ----------------------------------------------------------------------------------------
def two(bench: Bench, servers: Sequence[Server]) -> None:
    """One queue in front of one ComfyUI and of two. The graph waits: two cores cannot compute for two GPUs."""
    models = write_models(bench.root / "two-models", 64)
    urls = [server.url for server in servers[:2]]
    count = 30 if bench.quick else 60
    rates: dict[int, list[float]] = {1: [], 2: []}
    requests: list[Wanted] = [("bench/waiting", {"2_seconds": WORK_SECONDS})] * count
    for number in range(3):
        for slots in (1, 2):
            bench.say(f"two: {slots} ComfyUI(s), round {number + 1} of 3, {count} requests for each")
            ours = Ours(bench.root / f"two-{number}-{slots}", urls[:slots], models)
            try:
                asyncio.run(_drain(ours, _fresh(requests[:4]), slots, hold=1.0))
                rates[slots].append(asyncio.run(_drain(ours, _fresh(requests * slots), slots)))
            finally:
                ours.stop()
    each = [a / b for a, b in zip(rates[2], rates[1], strict=True)]
    words = (
        f"{median(each):.2f}x ({min(each):.2f}-{max(each):.2f}); "
        f"{median(rates[2]):.2f} / {median(rates[1]):.2f} per s"
    )
    what = f"two ComfyUIs behind one queue against one, a graph that waits {WORK_SECONDS * 1000:.0f} ms"
    bench.add(Row("two", what, words, f">= {TWO_RATIO}x", median(each) >= TWO_RATIO))


def _fresh(requests: Sequence[Wanted]) -> list[Wanted]:
    return [(model, {**values, "2_seed": next(_seeds)}) for model, values in requests]


# -- overlap ---------------------------------------------------------------------------------------------
def overlap(bench: Bench, servers: Sequence[Server]) -> None:
    """How long ComfyUI stands idle between prompts whose inputs and outputs are large."""
    models = write_models(bench.root / "overlap-models", 64)
    ours = Ours(bench.root / "overlap", [servers[0].url], models)
    try:
        asyncio.run(_overlap(bench, servers[0], ours))
    finally:
        ours.stop()


async def _overlap(bench: Bench, server: Server, ours: Ours) -> None:
    video = noise_video(bench.root / "noise.mp4", LARGE_MB)
    copies = bench.root / "copies"
    copies.mkdir()
    count = 8 if bench.quick else 15
    bench.say(f"overlap: {count} requests of {len(video) / 1e6:.1f} MB, bare and behind Rushes")
    gaps: dict[str, list[float]] = {"bare": [], "Rushes": []}
    async with bare(server.url) as client:
        before = len(server.runs())
        for index in range(count):
            name = f"large-{index}.mp4"
            await client.upload(video, name)
            id_ = await client.post(large(name, WORK_SECONDS, next(_seeds)))
            await client.ended(id_)
            assert await client.download(id_, copies) >= len(video) * 0.9
            shutil.rmtree(copies)
            copies.mkdir()
        gaps["bare"] = list(_gaps(server.runs(before)))
    values = {"1_file": _data(video, "video/mp4"), "4_seconds": WORK_SECONDS}
    requests = [("bench/large", {**values, "4_seed": next(_seeds)}) for _ in range(count + 2)]
    await _drain(ours, requests[:2], hold=5.0)
    before = len(server.runs())
    await _drain(ours, requests[2:], hold=25.0)
    runs = server.runs(before)[1:]  # the first one held the slot up
    gaps["Rushes"] = list(_gaps(runs))
    length = median([1000 * (run.ended - run.began) for run in runs])
    for name, what in (
        ("bare", "bare, one after another: upload, run, download"),
        ("Rushes", "behind Rushes, from the queue"),
    ):
        value = f"median {median(gaps[name]):.1f} ms, worst {max(gaps[name]):.1f} ms"
        text = (
            f"ComfyUI idle between prompts of {length:.0f} ms with {len(video) / 1e6:.0f} MB in and out: {what}"
        )
        ok = None if name == "bare" else median(gaps["Rushes"]) < 0.5 * median(gaps["bare"])
        bench.add(Row("overlap", text, value, "reported" if ok is None else "less than half", ok))


def _gaps(runs: Sequence[Run]) -> Iterator[float]:
    """Milliseconds from the end of each prompt to the beginning of the next, by ComfyUI's clock."""
    for one, following in itertools.pairwise(runs):
        yield 1000 * (following.began - one.ended)
