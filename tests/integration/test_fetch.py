"""The guarded fetch against real hosts on the loopback interface, which the policy permits where it must."""

import asyncio
import errno
import gzip
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from rushes.errors import SettingsError, StoreUnavailable
from rushes.media.fetch import FetchPolicy, _disk, fetch, policy_from
from rushes.settings import Settings
from support.fetching import HERE, PNG, refusal, resolves_to
from support.https_server import Asked, Handler, Write, answer, serve, write_authority

LOOPBACK = ("127.0.0.0/8",)


@pytest.fixture
def policy(tmp_path: Path) -> FetchPolicy:
    return FetchPolicy(allow=LOOPBACK, seconds=30, ca_file=write_authority(tmp_path))


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    return tmp_path / "fetched"


def changed(policy: FetchPolicy, **changes: object) -> FetchPolicy:
    fields = {name: getattr(policy, name) for name in policy.__struct_fields__}
    return FetchPolicy(**(fields | changes))


# -- what works -----------------------------------------------------------------------------------------------
async def test_file_arrives_as_it_is(policy: FetchPolicy, dest: Path) -> None:
    async with serve(answer(PNG, Content_Type="text/plain")) as host:
        found = await fetch(
            f"https://media.test:{host.port}/a%20b/ü.png?x=1&y=[2]",
            dest,
            policy=policy,
            media="image",
            resolver=HERE,
        )

    assert dest.read_bytes() == PNG
    assert (found.size, found.kind, found.content_type, found.extension) == (
        len(PNG),
        "image",
        "image/png",
        ".png",
    )
    [asked] = host.asked
    assert asked.path == "/a%20b/%C3%BC.png?x=1&y=[2]"
    assert asked.headers["host"] == f"media.test:{host.port}"
    assert asked.headers["accept-encoding"] == "identity"
    assert "cookie" not in asked.headers
    assert asked.server_name == "media.test"


async def test_large_file_without_a_length_arrives_whole(policy: FetchPolicy, dest: Path) -> None:
    tail = bytes(range(256)) * 4096 * 3

    async def handle(_: Asked, write: Write) -> None:
        await write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for part in (PNG, tail):
            await write(b"%x\r\n%s\r\n" % (len(part), part))
        await write(b"0\r\n\r\n")

    async with serve(handle) as host:
        found = await fetch(f"https://media.test:{host.port}/", dest, policy=policy, resolver=HERE)

    assert found.size == len(PNG) + len(tail)
    assert dest.read_bytes() == PNG + tail


async def test_address_literal_is_fetched_with_its_certificate(policy: FetchPolicy, dest: Path) -> None:
    async with serve(answer(PNG)) as host:
        await fetch(f"https://127.0.0.1:{host.port}/", dest, policy=policy)

    assert dest.read_bytes() == PNG


async def test_plain_http_inside_the_allowed_networks(policy: FetchPolicy, dest: Path) -> None:
    async with serve(answer(PNG), tls=False) as host:
        await fetch(f"http://media.test:{host.port}/", dest, policy=policy, resolver=HERE)

    assert dest.read_bytes() == PNG


async def test_next_address_is_tried_where_one_does_not_answer(policy: FetchPolicy, dest: Path) -> None:
    resolver, _ = resolves_to(["127.0.0.9", "127.0.0.1"])
    async with serve(answer(PNG)) as host:  # on 127.0.0.1 alone
        await fetch(f"https://media.test:{host.port}/", dest, policy=policy, resolver=resolver)

    assert dest.read_bytes() == PNG


async def test_proxies_of_the_environment_are_not_used(
    policy: FetchPolicy, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with serve(answer(PNG)) as host:
        await fetch(f"https://media.test:{host.port}/", dest, policy=policy, resolver=HERE)

    assert dest.read_bytes() == PNG


# -- sizes ----------------------------------------------------------------------------------------------------
def raw(*parts: bytes, endless: bytes = b"") -> Handler:
    async def handle(_: Asked, write: Write) -> None:
        for part in parts:
            await write(part)
        while endless:
            await write(endless)

    return handle


async def test_length_that_is_too_large_is_refused_at_once(policy: FetchPolicy, dest: Path) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 50000001\r\n\r\n"
    async with serve(raw(head, PNG)) as host:
        error = await refusal(f"https://media.test:{host.port}/", dest, policy, media="image")

    assert error.reason == "input_too_large"
    assert "50 MB" in error.message


@pytest.mark.parametrize(
    ("head", "endless"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + bytes(65536) + b"\r\n"),
        (b"HTTP/1.1 200 OK\r\n\r\n", bytes(65536)),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0999999\r\n\r\n", bytes(65536)),
    ],
)
async def test_endless_files_end_at_the_limit(
    policy: FetchPolicy, dest: Path, head: bytes, endless: bytes
) -> None:
    small = changed(policy, max_bytes={"image": 500_000, "video": 900_000})
    first = b"%x\r\n%s\r\n" % (len(PNG), PNG) if b"chunked" in head else PNG
    async with serve(raw(head, first, endless=endless)) as host:
        error = await refusal(f"https://media.test:{host.port}/", dest, small)

    assert error.reason == "input_too_large"


async def test_length_that_is_too_small_cuts_the_file(policy: FetchPolicy, dest: Path) -> None:
    """What HTTP says of such an answer; the inspection finds the file truncated."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"
    async with serve(raw(head, PNG)) as host:
        found = await fetch(f"https://media.test:{host.port}/", dest, policy=policy, resolver=HERE)

    assert found.size == 100


async def test_length_that_is_larger_than_the_file(policy: FetchPolicy, dest: Path) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(PNG) + 1)
    async with serve(raw(head, PNG)) as host:
        error = await refusal(f"https://media.test:{host.port}/", dest, policy)

    assert error.reason == "input_incomplete"


async def test_limits_are_by_kind(policy: FetchPolicy, dest: Path) -> None:
    """A picture as large as a video may be is still too large."""
    small = changed(policy, max_bytes={"image": 10_000, "video": 1_000_000})
    async with serve(answer(PNG + bytes(20_000))) as host:
        error = await refusal(f"https://media.test:{host.port}/", dest, small)

    assert error.reason == "input_too_large"


async def test_compressed_answers_are_refused(policy: FetchPolicy, dest: Path) -> None:
    """A megabyte that unpacks to a gigabyte must not be unpacked."""
    bomb = gzip.compress(PNG + bytes(1 << 20))
    async with serve(answer(bomb, Content_Encoding="gzip")) as host:
        error = await refusal(f"https://media.test:{host.port}/", dest, policy)

    assert error.reason == "input_encoded"


# -- time -----------------------------------------------------------------------------------------------------
async def test_slow_drip_ends_at_the_total_time(policy: FetchPolicy, dest: Path) -> None:
    async def drip(_: Asked, write: Write) -> None:
        await write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + PNG)
        while True:
            await write(b"x")
            await asyncio.sleep(0.02)

    async with serve(drip) as host:
        error = await refusal(f"https://media.test:{host.port}/", dest, changed(policy, seconds=0.5))

    assert error.reason == "input_too_slow"


async def test_silent_hosts_and_resolvers_end_at_the_total_time(policy: FetchPolicy, dest: Path) -> None:
    async def silent(_: Asked, __: Write) -> None:
        await asyncio.Event().wait()

    async def never(_: str, __: int) -> Sequence[str]:
        await asyncio.Event().wait()
        return []

    short = changed(policy, seconds=0.3)
    async with serve(silent) as host:
        error = await refusal(f"https://media.test:{host.port}/", dest, short)
    unresolved = await refusal("https://media.test/", dest, short, never)

    assert error.reason == unresolved.reason == "input_too_slow"


async def test_cancelled_fetch_leaves_no_file(policy: FetchPolicy, dest: Path) -> None:
    started = asyncio.Event()

    async def stall(_: Asked, write: Write) -> None:
        await write(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n" + PNG * 500)
        started.set()
        await asyncio.Event().wait()

    async with serve(stall) as host:
        url = f"https://media.test:{host.port}/"
        task = asyncio.create_task(fetch(url, dest, policy=policy, resolver=HERE))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert not dest.exists()


# -- what comes back ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<!DOCTYPE html><html><title>Sign in</title></html>", "web page"),
        (b"", "empty"),
        (b'{"error": "expired"}', "is not a PNG"),
        (b"II*\x00" + bytes(5000), "is not a PNG"),
    ],
)
async def test_what_is_not_media_is_refused(policy: FetchPolicy, dest: Path, body: bytes, words: str) -> None:
    async with serve(answer(body, Content_Type="image/png")) as host:
        error = await refusal(f"https://media.test:{host.port}/", dest, policy, media="image")

    assert error.reason == "input_not_media"
    assert words in error.message


async def test_other_kind_is_refused(policy: FetchPolicy, dest: Path) -> None:
    async with serve(answer(PNG)) as host:
        error = await refusal(f"https://media.test:{host.port}/", dest, policy, media="video")

    assert error.reason == "input_wrong_kind"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("401 Unauthorized", "login"),
        ("403 Forbidden", "refuses access"),
        ("404 Not Found", "no such file"),
        ("410 Gone", "no longer"),
        ("429 Too Many Requests", "for now"),
        ("500 Internal Server Error", "fault"),
        ("503 Service Unavailable", "fault"),
        ("204 No Content", "status 204"),
        ("206 Partial Content", "status 206"),
        ("300 Multiple Choices", "status 300"),
    ],
)
async def test_other_statuses_are_explained(policy: FetchPolicy, dest: Path, status: str, words: str) -> None:
    body = b"" if status.startswith("204") else PNG
    async with serve(answer(body, status)) as host:
        error = await refusal(f"https://media.test:{host.port}/", dest, policy)

    assert error.reason == "input_http_status"
    assert words in error.message


@pytest.mark.parametrize(
    "garbage", [b"SSH-2.0-OpenSSH_9\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n"]
)
async def test_hosts_that_speak_no_http(policy: FetchPolicy, dest: Path, garbage: bytes) -> None:
    async with serve(raw(garbage)) as host:
        error = await refusal(f"https://media.test:{host.port}/", dest, policy)

    assert error.reason == "input_incomplete"


async def test_folder_that_is_missing_is_our_fault(policy: FetchPolicy, tmp_path: Path) -> None:
    async with serve(answer(PNG)) as host:
        with pytest.raises(StoreUnavailable):
            await fetch(f"https://media.test:{host.port}/", tmp_path / "no" / "f", policy=policy, resolver=HERE)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_named(number: int) -> None:
    with pytest.raises(StoreUnavailable, match="full"), _disk():
        raise OSError(number, os.strerror(number))


# -- settings -------------------------------------------------------------------------------------------------
def test_policy_follows_the_settings() -> None:
    settings = Settings(
        fetch_allow=("10.0.0.0/8",), fetch_seconds=5, max_image_bytes=1000, max_video_bytes=2000
    )
    expected = FetchPolicy(allow=("10.0.0.0/8",), seconds=5, max_bytes={"image": 1000, "video": 2000})

    assert expected == policy_from(settings)
    assert FetchPolicy() == policy_from(Settings())


def test_network_that_is_none_is_named() -> None:
    with pytest.raises(SettingsError, match=r"fetch_allow.*office"):
        policy_from(Settings(fetch_allow=("office",)))
