"""Outputs of remotes through the guarded fetcher: the operator's origin is trusted, whoever it points to is not."""

import base64
import io
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from PIL import Image

from rushes.engines.remote.base import RemoteFile, RemoteInput
from rushes.engines.remote.inputs import data_uri, picture_uri
from rushes.engines.remote.outputs import MAX_BYTES, OutputNotFetched, conform, fetch_output
from rushes.errors import MediaError, StoreUnavailable
from rushes.media.fetch import FetchPolicy, check_url, fetch, origin_of
from rushes.media.inspect import check_image
from rushes.media.inspector import Inspector
from support.fetching import HERE, PNG, refusal, resolves_to
from support.https_server import Asked, Handler, Host, Write, answer, serve, write_authority
from support.remote_stub import movie, picture

NINE, _ = resolves_to(["127.0.0.9"])
KEY = {"Authorization": "Bearer a-key-of-a-remote"}
LOOPBACK = ("127.0.0.0/8",)


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    return tmp_path / "fetched"


def trusting(host: Host, **more: object) -> FetchPolicy:
    return FetchPolicy(origins=(f"http://127.0.0.1:{host.port}",), seconds=30, **more)  # type: ignore[arg-type]


def redirect(target: str, *, then: bytes = PNG) -> Handler:
    """To ``target``, but for the path /file."""

    async def handle(asked: Asked, write: Write) -> None:
        if asked.path == "/file":
            await answer(then)(asked, write)
        else:
            await write(b"HTTP/1.1 302 Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % target.encode())

    return handle


def keys(host: Host) -> list[str | None]:
    """The key that came with each call."""
    return [asked.headers.get("authorization") for asked in host.asked]


# -- the operator's origin ------------------------------------------------------------------------------------
async def test_a_named_origin_is_fetched_from_though_it_is_private(dest: Path) -> None:
    async with serve(answer(PNG), tls=False) as host:
        await fetch(f"http://127.0.0.1:{host.port}/a.png", dest, policy=trusting(host), headers=KEY)

    assert dest.read_bytes() == PNG
    assert [KEY["Authorization"]] == keys(host)


async def test_a_named_origin_by_name_and_tls(tmp_path: Path, dest: Path) -> None:
    async with serve(answer(PNG)) as host:
        policy = FetchPolicy(origins=(f"https://media.test:{host.port}",), ca_file=write_authority(tmp_path))
        await fetch(f"https://MEDIA.test:{host.port}/", dest, policy=policy, resolver=HERE, headers=KEY)

    assert [KEY["Authorization"]] == keys(host)


@pytest.mark.parametrize("named", ["http://127.0.0.1:1", "https://127.0.0.1:{port}", "http://127.0.0.2:{port}"])
async def test_another_origin_is_judged_like_any(dest: Path, named: str) -> None:
    async with serve(answer(PNG), tls=False) as host:
        policy = FetchPolicy(origins=(named.format(port=host.port),), seconds=30)
        error = await refusal(f"http://127.0.0.1:{host.port}/", dest, policy, headers=KEY)

    assert error.reason == "input_address_refused"
    assert [] == host.asked


async def test_a_name_that_leads_here_is_judged_unless_it_is_named(dest: Path) -> None:
    async with serve(answer(PNG), tls=False) as host:
        error = await refusal(f"http://media.test:{host.port}/", dest, trusting(host), HERE, headers=KEY)

    assert error.reason == "input_address_refused"
    assert [] == host.asked


async def test_plain_http_is_for_the_named_origin_alone() -> None:
    policy = FetchPolicy(origins=("http://10.0.0.5:8000",))

    assert check_url("http://10.0.0.5:8000/a.png", policy).url == "http://10.0.0.5:8000/a.png"
    with pytest.raises(MediaError) as caught:
        await fetch("http://1.1.1.1/a.png", Path("never"), policy=policy)
    assert caught.value.reason == "input_not_https"


async def test_the_key_goes_to_no_other_origin(dest: Path) -> None:
    async with serve(answer(PNG), tls=False) as host:
        policy = FetchPolicy(origins=("http://10.0.0.5:8000",), allow=LOOPBACK, seconds=30)
        await fetch(f"http://127.0.0.1:{host.port}/", dest, policy=policy, headers=KEY)

    assert [None] == keys(host)


async def test_headers_do_not_replace_the_fetchers_own(dest: Path) -> None:
    async with serve(answer(PNG), tls=False) as host:
        extra = KEY | {"Host": "elsewhere.example", "Accept-Encoding": "gzip"}
        await fetch(f"http://127.0.0.1:{host.port}/", dest, policy=trusting(host), headers=extra)

    assert [(f"127.0.0.1:{host.port}", "identity")] == [
        (asked.headers["host"], asked.headers["accept-encoding"]) for asked in host.asked
    ]


# -- redirects ------------------------------------------------------------------------------------------------
async def test_a_redirect_within_the_origin_keeps_the_key(dest: Path) -> None:
    async with serve(redirect("/file"), tls=False) as host:
        await fetch(f"http://127.0.0.1:{host.port}/", dest, policy=trusting(host), headers=KEY)

    assert [KEY["Authorization"]] * 2 == keys(host)


async def test_a_redirect_away_is_judged(dest: Path) -> None:
    async with (
        serve(answer(PNG), tls=False) as inside,
        serve(redirect(f"http://127.0.0.1:{inside.port}/"), tls=False) as host,
    ):
        error = await refusal(f"http://127.0.0.1:{host.port}/", dest, trusting(host), headers=KEY)

    assert error.reason == "input_address_refused"
    assert [] == inside.asked


async def test_a_redirect_to_another_named_origin_is_judged(dest: Path) -> None:
    async with (
        serve(answer(PNG), tls=False) as inside,
        serve(redirect(f"http://127.0.0.1:{inside.port}/"), tls=False) as host,
    ):
        both = (f"http://127.0.0.1:{host.port}", f"http://127.0.0.1:{inside.port}")
        policy = FetchPolicy(origins=both, seconds=30)
        error = await refusal(f"http://127.0.0.1:{host.port}/", dest, policy, headers=KEY)

    assert error.reason == "input_address_refused"
    assert [] == inside.asked


async def test_a_redirect_away_takes_no_key_along(dest: Path) -> None:
    async with (
        serve(answer(PNG), tls=False) as bucket,
        serve(redirect(f"http://127.0.0.1:{bucket.port}/"), tls=False) as host,
    ):
        policy = trusting(host, allow=LOOPBACK)
        await fetch(f"http://127.0.0.1:{host.port}/", dest, policy=policy, headers=KEY)

    assert dest.read_bytes() == PNG
    assert ([KEY["Authorization"]], [None]) == (keys(host), keys(bucket))


async def test_a_stranger_cannot_send_us_back_with_the_key(dest: Path) -> None:
    places: dict[str, str] = {}

    async def leave(asked: Asked, write: Write) -> None:
        await redirect(places["away"])(asked, write)

    async def back(asked: Asked, write: Write) -> None:
        await redirect(places["home"])(asked, write)

    async with serve(leave, tls=False) as host, serve(back, tls=False) as stranger:
        places["away"] = f"http://127.0.0.1:{stranger.port}/"
        places["home"] = f"http://127.0.0.1:{host.port}/file"
        url = f"http://127.0.0.1:{host.port}/"
        await fetch(url, dest, policy=trusting(host, allow=LOOPBACK), headers=KEY)

    assert dest.read_bytes() == PNG
    assert ([KEY["Authorization"], None], [None]) == (keys(host), keys(stranger))


async def test_a_strangers_redirect_to_the_named_origin_is_judged(dest: Path) -> None:
    async with (
        serve(answer(PNG), tls=False) as host,
        serve(redirect(f"http://127.0.0.1:{host.port}/"), tls=False, address="127.0.0.9") as stranger,
    ):
        policy = trusting(host, allow=("127.0.0.9/32",))
        url = f"http://media.test:{stranger.port}/"
        error = await refusal(url, dest, policy, NINE, headers=KEY)

    assert error.reason == "input_address_refused"
    assert ([], [None]) == (host.asked, keys(stranger))


def test_origins_are_written_one_way() -> None:
    assert origin_of("HTTPS://Queue.Example:443/a?b") == "https://queue.example"
    assert origin_of("http://[::1]:8000/v1") == "http://[::1]:8000"
    assert origin_of("http://box.") == "http://box"
    for none in ("", "ftp://x", "https://", "http://a b/", "http://x:99999/"):
        with pytest.raises(MediaError):
            origin_of(none)


# -- outputs --------------------------------------------------------------------------------------------------
async def output(host: Host, dest: Path, *, keyed: bool = False, **more: object) -> object:
    file = RemoteFile(f"http://127.0.0.1:{host.port}/o?Signature=s1gn", keyed=keyed)
    origin = f"http://127.0.0.1:{host.port}"
    return await fetch_output(
        file,
        dest,
        engine_origin=origin,
        headers=KEY,
        policy=FetchPolicy(),
        **more,  # type: ignore[arg-type]
    )


async def test_an_output_comes_with_the_key_only_where_it_wants_one(dest: Path) -> None:
    async with serve(answer(PNG), tls=False) as host:
        await output(host, dest)
        await output(host, dest, keyed=True, media="image")

    assert dest.read_bytes() == PNG
    assert [None, KEY["Authorization"]] == keys(host)


@pytest.mark.parametrize(
    ("status", "expired"), [(401, True), (403, True), (404, True), (410, True), (429, False), (500, False)]
)
async def test_an_output_that_is_not_there(dest: Path, status: int, *, expired: bool) -> None:
    async def handle(_: Asked, write: Write) -> None:
        await write(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % status)

    async with serve(handle, tls=False) as host:
        with pytest.raises(OutputNotFetched) as caught:
            await output(host, dest)

    assert ("output_not_fetched", expired, True) == (
        caught.value.reason,
        caught.value.expired,
        caught.value.retryable,
    )
    assert "s1gn" not in caught.value.message


async def test_an_output_of_another_kind(dest: Path) -> None:
    async with serve(answer(PNG), tls=False) as host:
        with pytest.raises(OutputNotFetched) as caught:
            await output(host, dest, media="video")

    assert ("input_wrong_kind", False, False) == (
        caught.value.cause,
        caught.value.expired,
        caught.value.retryable,
    )


async def test_an_output_may_be_larger_than_an_input(dest: Path) -> None:
    policy = FetchPolicy(max_bytes={"image": 10, "video": 10})
    async with serve(answer(PNG), tls=False) as host:
        found = await fetch_output(
            RemoteFile(f"http://127.0.0.1:{host.port}/"),
            dest,
            engine_origin=f"http://127.0.0.1:{host.port}",
            headers={},
            policy=policy,
        )

    assert found.size == len(PNG)


@pytest.mark.parametrize(
    ("media", "most"), [("image", 200_000_000), ("video", 2_000_000_000), (None, 2_000_000_000)]
)
async def test_an_output_has_a_largest_size_by_its_kind(dest: Path, media: str | None, most: int) -> None:
    sizes = [most, most + 1]

    async def declare(_: Asked, write: Write) -> None:
        await write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % sizes.pop(0))

    causes = []
    async with serve(declare, tls=False) as host:
        for _ in range(2):
            with pytest.raises(OutputNotFetched) as caught:
                await output(host, dest, media=media)
            causes.append(caught.value.cause)

    assert ["input_incomplete", "input_too_large"] == causes
    assert {"image": 200_000_000, "video": 2_000_000_000} == MAX_BYTES


async def test_an_output_at_a_private_address_elsewhere_is_refused(dest: Path) -> None:
    async with serve(answer(PNG), tls=False) as host:
        with pytest.raises(OutputNotFetched) as caught:
            await fetch_output(
                RemoteFile(f"http://127.0.0.1:{host.port}/", keyed=True),
                dest,
                engine_origin="https://queue.example",
                headers=KEY,
                policy=FetchPolicy(),
            )

    assert (caught.value.cause, caught.value.retryable) == ("input_address_refused", False)
    assert [] == host.asked


async def test_a_file_that_came_with_the_answer(tmp_path: Path, dest: Path) -> None:
    clip = tmp_path / "clip"
    clip.write_bytes(movie())
    words = tmp_path / "words"
    words.write_text("no picture")

    async def given(path: Path, **more: object) -> object:
        file = RemoteFile(path=path)
        return await fetch_output(
            file,
            dest,
            engine_origin="https://x.example",
            headers={},
            policy=FetchPolicy(),
            **more,  # type: ignore[arg-type]
        )

    found = await given(clip, media="video")
    assert (clip, len(movie()), "video/mp4") == (found.path, found.size, found.content_type)  # type: ignore[attr-defined]
    for path, media, cause in ((clip, "image", "input_wrong_kind"), (words, None, "input_not_media")):
        with pytest.raises(OutputNotFetched) as caught:
            await given(path, media=media)
        assert cause == caught.value.cause
    with pytest.raises(StoreUnavailable):
        await given(tmp_path / "gone")
    for content, most in ((PNG, 200_000_000), (movie(), 2_000_000_000)):
        large = tmp_path / "large"
        large.write_bytes(content)
        os.truncate(large, most)  # a hole: it takes no room
        assert most == (await given(large)).size  # type: ignore[attr-defined]
        os.truncate(large, most + 1)
        with pytest.raises(OutputNotFetched) as caught:
            await given(large)
        assert "input_too_large" == caught.value.cause


# -- sizes ----------------------------------------------------------------------------------------------------
@pytest.fixture
async def inspector() -> AsyncIterator[Inspector]:
    inspector = Inspector()
    yield inspector
    await inspector.close()


@pytest.mark.parametrize("size", [(48, 48), (64, 36), (36, 64), (128, 96), (65, 48), (64, 48)])
async def test_a_picture_is_brought_to_exactly_a_size(
    inspector: Inspector, tmp_path: Path, size: tuple[int, int]
) -> None:
    path = tmp_path / "p"
    path.write_bytes(picture(64, 48, kind="JPEG"))

    made = await conform(inspector, path, size)

    info = check_image(made, 1_000_000)
    assert (*size, "image/png") == (info.width, info.height, info.content_type)
    assert {path, made} == set(tmp_path.iterdir())
    assert path.read_bytes() == picture(64, 48, kind="JPEG")
    assert inspector.pid is not None  # it was decoded there and not here


async def test_a_broken_picture_is_an_error_and_leaves_nothing_behind(
    inspector: Inspector, tmp_path: Path
) -> None:
    path = tmp_path / "p"
    path.write_bytes(picture(64, 48)[:100])

    with pytest.raises(MediaError):
        await conform(inspector, path, (32, 32))

    assert [path] == list(tmp_path.iterdir())


# -- inputs ---------------------------------------------------------------------------------------------------
def read(text: str) -> tuple[str, Image.Image]:
    head, _, data = text.partition(",")
    with Image.open(io.BytesIO(base64.b64decode(data))) as opened:
        opened.load()
        return head, opened


async def test_pictures_go_as_they_are_or_smaller(tmp_path: Path) -> None:
    path = tmp_path / "noise.png"
    Image.effect_noise((400, 200), 90).convert("RGB").save(path)
    file = RemoteInput(path, "image/png")

    as_it_is = await picture_uri(file, longest=400, most_bytes=10_000_000)
    scaled = read(await picture_uri(file, longest=100, most_bytes=10_000_000))
    light = await picture_uri(file, longest=400, most_bytes=60_000)

    assert as_it_is == await data_uri(file)
    assert ("data:image/png;base64", (100, 50)) == (scaled[0], scaled[1].size)
    assert ("data:image/jpeg;base64", (400, 200)) == (read(light)[0], read(light)[1].size)
    assert len(light) < 60_000 * 4 / 3 + 100
