"""One suite over every store that can run here: a local folder, and S3 by a real server."""

import asyncio
import errno
import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from rushes.errors import BodyTooLarge, NotFound, RangeUnsatisfiable, SettingsError, StoreUnavailable
from rushes.media.storage import Storage, _mapped, check_key, content_type_of, open_storage
from rushes.settings import Settings
from support.s3_server import S3Server, serve_s3

DATA = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    if request.param == "local":
        return open_storage(Settings(data_dir=tmp_path / "data"))
    server: S3Server = request.getfixturevalue("s3")
    for name, value in server.environ().items():
        monkeypatch.setenv(name, value)
    return open_storage(Settings(storage_url=f"s3://{server.bucket}/test/{secrets.token_hex(4)}"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "files"


@pytest.fixture
def local(tmp_path: Path, folder: Path) -> Storage:
    return open_storage(Settings(data_dir=tmp_path / "data"))


async def read(storage: Storage, key: str, start: int = 0, end: int | None = None) -> bytes:
    return b"".join([chunk async for chunk in storage.stream(key, start, end)])


async def keys(storage: Storage, prefix: str = "") -> set[str]:
    return {meta.key async for meta in storage.list(prefix)}


async def pieces(*parts: bytes, then: Exception | None = None) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
    if then is not None:
        raise then


# -- every store ----------------------------------------------------------------------------------------------
async def test_file_comes_back_as_it_was(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "src").write_bytes(DATA)

    assert len(DATA) == await storage.put_file("outputs/r1/1/0.mp4", tmp_path / "src", "video/mp4")
    assert await read(storage, "outputs/r1/1/0.mp4") == DATA
    assert len(DATA) == await storage.download("outputs/r1/1/0.mp4", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == DATA


async def test_head_tells_size_type_time_and_etag(storage: Storage) -> None:
    before = time.time()
    await storage.put_bytes("outputs/r1/1/0.png", DATA, "image/png")
    meta = await storage.head("outputs/r1/1/0.png")

    assert ("outputs/r1/1/0.png", len(DATA), "image/png") == (meta.key, meta.size, meta.content_type)
    assert before - 2 < meta.last_modified < time.time() + 2
    assert len(meta.etag) > 2
    assert meta.etag[0] == meta.etag[-1] == '"'
    assert meta.etag == (await storage.head("outputs/r1/1/0.png")).etag
    assert [meta.etag] == [found.etag async for found in storage.list("outputs/r1")]


async def test_overwriting_replaces_the_whole_file(storage: Storage) -> None:
    await storage.put_bytes("inputs/r1/image.png", DATA, "image/png")
    before = await storage.head("inputs/r1/image.png")
    await storage.put_bytes("inputs/r1/image.png", b"short", "image/png")

    assert await read(storage, "inputs/r1/image.png") == b"short"
    assert before.etag != (await storage.head("inputs/r1/image.png")).etag


async def test_empty_file(storage: Storage, tmp_path: Path) -> None:
    assert await storage.put_stream("files/empty", pieces(), "image/png", 10) == 0
    assert (await storage.head("files/empty")).size == 0
    assert await read(storage, "files/empty") == b""
    assert await storage.download("files/empty", tmp_path / "empty") == 0
    assert (tmp_path / "empty").read_bytes() == b""


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, 1), (0, None), (5, 300), (1000, None), (len(DATA) - 1, None), (10, len(DATA) + 99), (0, len(DATA))],
)
async def test_ranges(storage: Storage, start: int, end: int | None) -> None:
    await storage.put_bytes("outputs/r1/1/0.mp4", DATA, "video/mp4")

    assert await read(storage, "outputs/r1/1/0.mp4", start, end) == DATA[start:end]


@pytest.mark.parametrize(
    ("start", "end"), [(len(DATA), None), (len(DATA) + 5, len(DATA) + 9), (7, 7), (-1, None)]
)
async def test_ranges_outside_the_file(storage: Storage, start: int, end: int | None) -> None:
    await storage.put_bytes("outputs/r1/1/0.mp4", DATA, "video/mp4")
    with pytest.raises(RangeUnsatisfiable):
        await read(storage, "outputs/r1/1/0.mp4", start, end)


async def test_missing_files(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await storage.head("outputs/none.png")
    with pytest.raises(NotFound):
        await read(storage, "outputs/none.png")
    with pytest.raises(NotFound):
        await read(storage, "outputs/none.png", 5, 9)
    with pytest.raises(NotFound):
        await storage.download("outputs/none.png", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    await storage.delete("outputs/none.png")
    assert await storage.delete_prefix("outputs/none") == 0
    assert await keys(storage, "outputs") == set()


async def test_large_stream_in_small_and_odd_pieces(storage: Storage) -> None:
    """Several parts of a multipart upload, none of them as the pieces came."""
    block = os.urandom(700_001)
    count = 30

    size = await storage.put_stream("uploads/r1/video", pieces(*[block] * count), "video/mp4", 10**9)
    assert size == len(block) * count
    assert await read(storage, "uploads/r1/video") == block * count
    assert (
        await read(storage, "uploads/r1/video", 20_000_000, 20_000_100)
        == (block * count)[20_000_000:20_000_100]
    )


async def test_large_file(storage: Storage, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 25
    (tmp_path / "src").write_bytes(data)
    await storage.put_file("outputs/r1/1/0.mp4", tmp_path / "src", "video/mp4")
    await storage.download("outputs/r1/1/0.mp4", tmp_path / "back")
    meta = await storage.head("outputs/r1/1/0.mp4")

    assert (tmp_path / "back").read_bytes() == data
    assert (len(data), "video/mp4") == (meta.size, meta.content_type)


@pytest.mark.parametrize("pieces_before", [1, 20])
async def test_too_large_a_stream_leaves_nothing(storage: Storage, pieces_before: int) -> None:
    block = bytes(1 << 20)
    with pytest.raises(BodyTooLarge):
        await storage.put_stream(
            "files/f1", pieces(*[block] * pieces_before, b"x"), "image/png", pieces_before << 20
        )

    with pytest.raises(NotFound):
        await storage.head("files/f1")
    assert await keys(storage) == set()


@pytest.mark.parametrize("failure", [RuntimeError("gone"), ConnectionResetError("gone")])
async def test_stream_that_breaks_leaves_what_was_there(storage: Storage, failure: Exception) -> None:
    await storage.put_bytes("files/f1", b"before", "image/png")
    with pytest.raises(type(failure), match="gone"):
        await storage.put_stream("files/f1", pieces(bytes(20 << 20), then=failure), "image/png", 10**9)

    assert await read(storage, "files/f1") == b"before"


async def test_file_is_not_seen_before_it_is_whole(storage: Storage) -> None:
    seen: list[set[str]] = []

    async def watching() -> AsyncIterator[bytes]:
        for _ in range(12):
            yield bytes(1 << 20)
        seen.append(await keys(storage))

    await storage.put_stream("files/f1", watching(), "image/png", 10**9)

    assert seen == [set()]
    assert await keys(storage) == {"files/f1"}


async def test_listing_and_deleting_by_whole_segments(storage: Storage) -> None:
    for key in ("inputs/r1/a.png", "inputs/r1/b.png", "inputs/r10/a.png", "outputs/r1/1/0.mp4"):
        await storage.put_bytes(key, DATA, "image/png")

    assert await keys(storage, "inputs/r1") == {"inputs/r1/a.png", "inputs/r1/b.png"}
    assert await keys(storage, "inputs") == {"inputs/r1/a.png", "inputs/r1/b.png", "inputs/r10/a.png"}
    assert await keys(storage, "inp") == set()
    assert len(await keys(storage)) == 4

    await storage.delete("inputs/r1/a.png")
    assert await keys(storage, "inputs/r1") == {"inputs/r1/b.png"}
    assert await storage.delete_prefix("inputs/r1") == 1
    assert await keys(storage) == {"inputs/r10/a.png", "outputs/r1/1/0.mp4"}


async def test_many_files_are_all_listed(storage: Storage) -> None:
    """More than one page, as S3 lists a thousand at a time."""
    for start in range(0, 1040, 80):
        names = [f"files/{n:04}" for n in range(start, start + 80)]
        await asyncio.gather(*[storage.put_bytes(name, b"", "image/png") for name in names])

    assert len(await keys(storage, "files")) == 1040


@pytest.mark.parametrize(
    "key",
    [
        *("", "/", "/etc/passwd", "a/", "a//b", "..", "a/../b", "a/./b", "a/.b", ".incoming/x", "a\\b"),
        *("a\x00b", "a\nb", "a b", "a#1", "a%2e%2e", "ä", "a/" + "b" * 300, "a/" * 300 + "b", "-rf"),
    ],
)
async def test_what_is_no_key(storage: Storage, key: str, tmp_path: Path) -> None:
    (tmp_path / "src").write_bytes(b"x")
    with pytest.raises(ValueError, match="storage key"):
        check_key(key)
    for call in (
        storage.put_bytes(key, b"", "image/png"),
        storage.put_file(key, tmp_path / "src", "image/png"),
        storage.put_stream(key, pieces(), "image/png", 1),
        storage.head(key),
        read(storage, key),
        storage.download(key, tmp_path / "back"),
        storage.delete(key),
        storage.delete_prefix(key),
    ):
        with pytest.raises(ValueError, match="storage key"):
            await call
    with pytest.raises(ValueError, match="storage key"):
        storage.local_path(key)


async def test_probe(storage: Storage) -> None:
    await storage.probe()

    assert await keys(storage) == set()


# -- the local folder -----------------------------------------------------------------------------------------
async def test_local_files_lie_under_their_keys(local: Storage, folder: Path) -> None:
    await local.put_bytes("inputs/r1/image.png", DATA, "image/png")

    assert local.local_path("inputs/r1/image.png") == folder / "inputs" / "r1" / "image.png"
    assert (folder / "inputs" / "r1" / "image.png").read_bytes() == DATA


async def test_a_file_of_one_name_is_stored_without_a_copy(
    local: Storage, folder: Path, tmp_path: Path
) -> None:
    made, stored = tmp_path / "made", folder / "outputs" / "r1" / "1" / "0.png"
    made.write_bytes(DATA)
    inode = made.stat().st_ino
    assert len(DATA) == await local.put_file("outputs/r1/1/0.png", made, "image/png")
    made.unlink()

    assert inode == stored.stat().st_ino
    assert DATA == stored.read_bytes()
    assert [] == list((folder / ".incoming").iterdir())


@pytest.mark.parametrize("way", ["hard link", "symbolic link", "taken key"])
async def test_what_others_may_write_to_is_copied(
    local: Storage, folder: Path, tmp_path: Path, way: str
) -> None:
    made, given, stored = tmp_path / "made", tmp_path / "given", folder / "outputs" / "0.png"
    made.write_bytes(DATA)
    if way == "hard link":
        given.hardlink_to(made)
    elif way == "symbolic link":
        given.symlink_to(made)
    else:
        given = made
        await local.put_bytes("outputs/0.png", b"before", "image/png")
    await local.put_file("outputs/0.png", given, "image/png")
    made.write_bytes(b"changed afterwards")

    assert DATA == stored.read_bytes()


async def test_every_new_name_is_flushed_to_the_disk_and_known_ones_are_not(
    local: Storage, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known: names directly in the root, as long as it is the same folder that has them."""
    synced: list[str] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append(str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)

    async def put(key: str) -> list[str]:
        synced.clear()
        (tmp_path / "made").write_bytes(DATA)
        await local.put_file(key, tmp_path / "made", "image/png")
        (tmp_path / "made").unlink()
        return list(synced)

    everything = ["made", "outputs/r1/1", "outputs/r1", "outputs", "."]
    assert everything == await put("outputs/r1/1/0.png")
    assert ["made", "outputs/r2/1", "outputs/r2", "outputs"] == await put("outputs/r2/1/0.png")
    await local.delete_prefix("outputs")
    assert not (folder / "outputs").exists()
    assert everything == await put("outputs/r1/1/0.png")


async def test_emptied_folders_go(local: Storage, folder: Path) -> None:
    await local.put_bytes("inputs/r1/image.png", DATA, "image/png")
    await local.delete_prefix("inputs/r1")

    assert not (folder / "inputs").exists()
    await local.put_bytes("inputs/r2/image.png", DATA, "image/png")


async def test_puts_and_deletes_in_one_folder_do_not_disturb_each_other(local: Storage) -> None:
    """A delete takes an emptied folder with it, perhaps between a put's mkdir and its rename."""

    async def turn(name: str) -> None:
        for _ in range(40):
            await local.put_bytes(f"inputs/r1/{name}.png", b"x", "image/png")
            await local.delete(f"inputs/r1/{name}.png")

    await asyncio.gather(*[turn(name) for name in "abcd"])

    assert await keys(local) == set()


async def test_leftovers_of_a_crash_are_removed_at_the_next_start(
    local: Storage, folder: Path, tmp_path: Path
) -> None:
    stale, fresh = folder / ".incoming" / "aa#1", folder / ".incoming" / "bb#2"
    stale.write_bytes(b"half")
    fresh.write_bytes(b"half")
    os.utime(stale, (time.time() - 100_000,) * 2)
    assert await keys(local) == set()
    open_storage(Settings(data_dir=tmp_path / "data"))

    assert not stale.exists()
    assert fresh.exists()


async def test_failed_writes_leave_no_leftovers(local: Storage, folder: Path) -> None:
    with pytest.raises(RuntimeError):
        await local.put_stream("files/f1", pieces(b"x", then=RuntimeError()), "image/png", 10)
    with pytest.raises(FileNotFoundError):
        await local.put_file("files/f1", folder / "missing", "image/png")

    assert list((folder / ".incoming").iterdir()) == []


_FULL = """
import asyncio, resource, signal, sys
from pathlib import Path
from rushes.errors import StoreUnavailable
from rushes.media.storage import open_storage
from rushes.settings import Settings

async def pieces():
    for _ in range(20):
        yield bytes(100_000)

async def main():
    storage = open_storage(Settings(data_dir=Path(sys.argv[1])))
    for put in (
        lambda: storage.put_bytes("outputs/r1/1/0.png", bytes(3_000_000), "image/png"),
        lambda: storage.put_stream("outputs/r1/1/0.png", pieces(), "image/png", 10**9),
    ):
        try:
            await put()
        except StoreUnavailable as error:
            print(error.message)
    assert not [meta async for meta in storage.list()]
    await storage.put_bytes("outputs/r1/1/0.png", b"small", "image/png")

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
asyncio.run(main())
"""


def test_write_that_the_system_refuses_is_unavailable_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file sizes stands in for the full disk; the kernel refuses the write in the same place."""
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )

    assert len(done.stdout.splitlines()) == 2
    assert list((tmp_path / "files" / ".incoming").iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_named(number: int) -> None:
    with pytest.raises(StoreUnavailable, match="full"), _mapped(writing=True):
        raise OSError(number, os.strerror(number))


async def test_content_types_of_the_local_store_follow_the_extension(local: Storage) -> None:
    for name, expected in (("a.mp4", "video/mp4"), ("a.webp", "image/webp"), ("a", "application/octet-stream")):
        await local.put_bytes(f"files/{name}", b"x", "text/html")
        assert (await local.head(f"files/{name}")).content_type == expected

    assert content_type_of("a.b/c.PNG") == "image/png"
    assert content_type_of("a.html") == "application/octet-stream"


# -- settings and faults --------------------------------------------------------------------------------------
@pytest.mark.parametrize("url", ["ftp://bucket", "s3:", "s3://", "bucket/prefix", "file:///etc"])
def test_urls_that_name_no_store(url: str) -> None:
    with pytest.raises(SettingsError, match="storage_url"):
        open_storage(Settings(storage_url=url))


def test_every_vendor_opens_by_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0")
    for url in ("s3://bucket/prefix", "gs://bucket/prefix", "az://container/prefix"):
        assert open_storage(Settings(storage_url=url)).local_path("a/b.png") is None


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable):
        open_storage(Settings(data_dir=tmp_path / "file"))


async def test_bucket_that_does_not_exist(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environ().items():
        monkeypatch.setenv(name, value)
    storage = open_storage(Settings(storage_url="s3://missing-bucket/x"))
    with pytest.raises(StoreUnavailable):
        await storage.probe()


async def test_wrong_credentials(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (s3.environ() | {"AWS_SECRET_ACCESS_KEY": "wrong"}).items():
        monkeypatch.setenv(name, value)
    storage = open_storage(Settings(storage_url=f"s3://{s3.bucket}/x"))
    with pytest.raises(StoreUnavailable) as caught:
        await storage.put_bytes("a", b"", "image/png")

    assert s3.url not in caught.value.message
