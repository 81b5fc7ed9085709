"""Where files are kept: a local folder, or S3, Google Cloud Storage or Azure, behind one class, on obstore.

What a ``put`` promises when it returns: the file is there whole, under its key, and stays there through a
power loss as far as the store can promise that; before, nothing is to be seen of it. Object stores promise
so themselves. obstore's local store renames into place but never calls fsync (version 0.12 has no option for
it), so local files are written here: a hidden file, fsync, rename, fsync of the folders. Reading, listing
and deleting are obstore's everywhere.

Keys are ``/``-separated segments of letters, digits, ``.``, ``_`` and ``-``: the same on every store, and
no key can leave the folder. Storage knows nothing of requests, accounts and links.
"""

import asyncio
import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final

import msgspec
import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import LocalStore, ObjectStore, from_url

from rushes.errors import BodyTooLarge, NotFound, RangeUnsatisfiable, SettingsError, StoreUnavailable
from rushes.settings import Settings

CHUNK_BYTES: Final = 1 << 20
"""Size of what ``stream`` yields, roughly, and of local writes."""
PART_BYTES: Final = 8 << 20
"""Size of a part of a multipart upload; S3 wants 5 MiB or more."""
UNKNOWN_TYPE: Final = "application/octet-stream"
_STALE_SECONDS: Final = 24 * 3600
_STAGING: Final = ".incoming"
_SEGMENT: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_TYPES: Final = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".avif": "image/avif",
    ".gif": "image/gif",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".mkv": "video/matroska",
    ".mov": "video/quicktime",
    ".json": "application/json",
}
"""The local store keeps no content type beside a file; its keys say it."""


class Meta(msgspec.Struct, frozen=True):
    """``size`` in bytes, ``last_modified`` in seconds since the epoch, ``etag`` in quotes as in HTTP."""

    key: str
    size: int
    etag: str
    content_type: str
    last_modified: float


def check_key(key: str) -> str:
    """The key, if it can be one. Raises ValueError: keys are made by this program, not by users."""
    if len(key) > 512 or not all(_SEGMENT.fullmatch(part) for part in key.split("/")):
        raise ValueError(f"{key!r} is not a storage key")
    return key


def content_type_of(key: str) -> str:
    """The content type that a key's extension stands for."""
    return _TYPES.get(PurePosixPath(key).suffix.lower(), UNKNOWN_TYPE)


def open_storage(settings: Settings) -> "Storage":
    """The storage that the settings name; a local folder is made. Raises SettingsError, StoreUnavailable."""
    url = settings.storage_url
    if not url:
        return _open_folder(settings.data_dir / "files")
    scheme, _, place = url.partition("://")
    if scheme not in ("s3", "gs", "az") or not place.strip("/"):
        raise SettingsError(
            f"storage_url: {url!r} is none of s3://bucket/prefix, gs://bucket/prefix, az://container/prefix"
        )
    # An operator who writes http:// into a vendor's endpoint variable means it; obstore wants to hear it too.
    endpoints = [value for name, value in os.environ.items() if name.startswith(("AWS_ENDPOINT", "AZURE_"))]
    try:
        store = from_url(
            url,
            client_options={
                "allow_http": any(value.startswith("http://") for value in endpoints),
                "connect_timeout": timedelta(seconds=5),
                "read_timeout": timedelta(seconds=30),
                "timeout": timedelta(minutes=10),
            },
            retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=30)},
        )
    except (BaseError, ValueError) as error:
        raise SettingsError(f"storage_url: {url!r} cannot be used: {_first_line(error)}") from None
    return Storage(store)


def _open_folder(folder: Path) -> "Storage":
    staging = folder / _STAGING
    try:
        staging.mkdir(parents=True, exist_ok=True)
        for left in staging.iterdir():
            # What a process left that died while it wrote. Younger files may be another process's work.
            if left.stat().st_mtime < time.time() - _STALE_SECONDS:
                left.unlink(missing_ok=True)
    except OSError as error:
        raise StoreUnavailable(f"The folder {folder} cannot be used for files: {error.strerror}.") from error
    return Storage(LocalStore(folder, automatic_cleanup=True), folder.resolve())


class Storage:
    """Files by key. Methods raise NotFound for a missing file and StoreUnavailable where the store fails."""

    def __init__(self, store: ObjectStore, folder: Path | None = None) -> None:
        self._store, self._folder = store, folder
        self._tops = _Tops()

    # -- writing ------------------------------------------------------------------------------------------
    async def put_file(self, key: str, path: Path, content_type: str) -> int:
        """Store the local file ``path``; answers its size in bytes. Its bytes must not change any more: on the same
        file system what is stored is the file itself. Its name may go afterwards.
        """
        check_key(key)
        size = path.stat().st_size
        with _mapped(writing=True):
            if self._folder is not None:
                await asyncio.to_thread(self._place_file, key, path)
            else:
                await self._upload(key, path, content_type)
        return size

    async def put_bytes(self, key: str, data: bytes, content_type: str) -> None:
        """Store ``data``."""
        check_key(key)
        with _mapped(writing=True):
            if self._folder is not None:
                await asyncio.to_thread(self._place, key, lambda file: file.write(data))
            else:
                await self._upload(key, data, content_type)

    async def put_stream(
        self, key: str, chunks: AsyncIterable[bytes], content_type: str, max_bytes: int
    ) -> int:
        """Store what ``chunks`` yields, without holding it in memory; answers its size in bytes.

        Raises BodyTooLarge past ``max_bytes``; that, and whatever ``chunks`` raises, leaves nothing behind.
        """
        source = _Counted(chunks, max_bytes)
        check_key(key)
        try:
            with _mapped(writing=True):
                if self._folder is not None:
                    await self._place_stream(key, source)
                else:
                    await self._upload_stream(key, source.batches(PART_BYTES), content_type)
        except StoreUnavailable:
            if source.failure is not None:
                raise source.failure from None
            raise
        return source.size

    async def _upload(self, key: str, data: Any, content_type: str) -> None:
        await obstore.put_async(
            self._store,
            key,
            data,
            attributes={"Content-Type": content_type},
            chunk_size=PART_BYTES,
            max_concurrency=4,
        )

    async def _upload_stream(self, key: str, batches: AsyncIterator[bytes], content_type: str) -> None:
        first = await anext(batches, b"")
        second = await anext(batches, None)
        if second is None:
            # One request instead of three; and S3 knows no multipart upload of nothing.
            await self._upload(key, first, content_type)
            return

        async def all_of_it() -> AsyncIterator[bytes]:
            yield first
            yield second
            async for batch in batches:
                yield batch

        await self._upload(key, all_of_it(), content_type)

    async def _place_stream(self, key: str, source: "_Counted") -> None:
        staged = self._staged()
        try:
            with staged.open("xb", buffering=0) as file:
                async for batch in source.batches(CHUNK_BYTES):
                    await asyncio.to_thread(_write_all, file, batch)
                await asyncio.to_thread(os.fsync, file.fileno())
            await asyncio.to_thread(self._publish, staged, key, os.replace)
        finally:
            staged.unlink(missing_ok=True)

    def _place_file(self, key: str, path: Path) -> None:
        if not self._link(key, path):
            self._place(key, lambda file: _copy(path, file))

    def _link(self, key: str, path: Path) -> bool:
        """Give the file a second name, which costs no copy. False where that cannot be, or is not safe: a file with
        further names may be written to by whoever knows them.
        """
        descriptor = -1
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
                return False
            os.fsync(descriptor)
            self._publish(path, key, os.link)
        except (FileExistsError, PermissionError):
            return False
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.ELOOP, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS):
                return False
            raise
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        return True

    def _place(self, key: str, write: Callable[[BinaryIO], object]) -> None:
        staged = self._staged()
        try:
            with staged.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            self._publish(staged, key, os.replace)
        finally:
            staged.unlink(missing_ok=True)

    def _staged(self) -> Path:
        """A new name on the same file system. obstore's listing leaves out names that end in ``#<digits>``."""
        assert self._folder is not None
        return self._folder / _STAGING / f"{secrets.token_hex(12)}#{os.getpid()}"

    def _publish(self, staged: Path, key: str, name: Callable[[Path, Path], None]) -> None:
        """Have the file seen under its key, by ``name``: os.replace or os.link."""
        assert self._folder is not None
        target = self._folder / key
        for attempt in range(20):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                name(staged, target)
                break
            except (FileNotFoundError, FileExistsError):
                # A delete of a folder's last file takes the folder with it, perhaps in the middle of mkdir.
                if attempt == 19 or target.exists() or not staged.exists():
                    raise
        self._sync_up(target.parent)

    def _sync_up(self, folder: Path) -> None:
        """Make the names last that lead from the root to what is new in ``folder``.

        That is every folder up to the root, also those that were there: another process may have made them and not
        come to its own fsync yet. But a folder directly below the root (there are few) needs to get into the root
        once only.
        """
        assert self._folder is not None
        while folder != self._folder:
            with contextlib.suppress(FileNotFoundError):  # deleted already, and the folder with it
                if folder.parent == self._folder:
                    self._tops.sync(folder)
                    return
                _sync_folder(folder)
            folder = folder.parent
        _sync_folder(folder)

    # -- reading ------------------------------------------------------------------------------------------
    async def head(self, key: str) -> Meta:
        """What is known of a file without reading it."""
        check_key(key)
        with _mapped():
            found = await obstore.get_async(self._store, key, options={"head": True})
            return self._meta(key, found.meta, dict(found.attributes))

    async def stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """The bytes from ``start`` up to, not including, ``end`` (None: to the end of the file).

        An async generator: errors come with the first step. Raises RangeUnsatisfiable where ``start`` lies
        behind the last byte; an ``end`` behind it is cut.
        """
        check_key(key)
        if start < 0 or (end is not None and end <= start):
            raise RangeUnsatisfiable
        options: dict[str, Any] = {}
        if end is not None:
            options["range"] = (start, end)
        elif start:
            options["range"] = {"offset": start}
        with _mapped():
            try:
                found = await obstore.get_async(self._store, key, options=options)  # type: ignore[arg-type]
            except BaseError:
                # No store's error says of itself that the range was at fault.
                if options and start >= (await self.head(key)).size:
                    raise RangeUnsatisfiable from None
                raise
        chunks = found.stream(min_chunk_size=CHUNK_BYTES)
        while True:
            with _mapped():
                try:
                    chunk = bytes(await anext(chunks))
                except StopAsyncIteration:
                    return
            yield chunk

    async def download(self, key: str, path: Path) -> int:
        """Write the file to the local ``path``, which exists afterwards only if all went well; answers its
        size in bytes.
        """
        check_key(key)
        size = 0
        try:
            if self._folder is not None:
                with _mapped():
                    await asyncio.to_thread(shutil.copyfile, self._folder / key, path)
                return path.stat().st_size
            with contextlib.ExitStack() as stack:
                file = None
                async for chunk in self.stream(key):
                    file = file or stack.enter_context(path.open("wb", buffering=0))
                    with _mapped():
                        await asyncio.to_thread(_write_all, file, chunk)
                    size += len(chunk)
                if file is None:
                    path.touch()
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return size

    def local_path(self, key: str) -> Path | None:
        """Where the file lies on this machine, whether or not it exists; None where the store is elsewhere.
        To be read only: writes go through ``put_file``.
        """
        check_key(key)
        return None if self._folder is None else self._folder / key

    async def list(self, prefix: str = "") -> AsyncIterator[Meta]:
        """Every file whose key has ``prefix`` as its leading segments, in no order."""
        if prefix:
            check_key(prefix)
        batches = obstore.list(self._store, prefix or None)
        while True:
            with _mapped():
                try:
                    batch = await anext(aiter(batches))
                except StopAsyncIteration:
                    return
            for entry in batch:
                yield self._meta(entry["path"], entry, {})

    # -- deleting -----------------------------------------------------------------------------------------
    async def delete(self, key: str) -> None:
        """Remove the file; a missing one is fine."""
        check_key(key)
        with contextlib.suppress(NotFound), _mapped():
            await obstore.delete_async(self._store, key)

    async def delete_prefix(self, prefix: str) -> int:
        """Remove every file below ``prefix``, which is whole segments; answers how many there were."""
        keys = [meta.key async for meta in self.list(check_key(prefix))]
        for key in keys:
            await self.delete(key)
        return len(keys)

    async def probe(self) -> None:
        """Return if the store can be written to and deleted from; else raise StoreUnavailable."""
        key = f"probe/{secrets.token_hex(8)}"
        await self.put_bytes(key, b"rushes", UNKNOWN_TYPE)
        await self.delete(key)

    def _meta(self, key: str, found: Any, attributes: dict[Any, Any]) -> Meta:
        etag = str(found["e_tag"] or "").removeprefix("W/").strip('"')
        return Meta(
            key,
            found["size"],
            f'"{etag}"',
            str(attributes.get("Content-Type") or content_type_of(key)),
            found["last_modified"].timestamp(),
        )


class _Tops:
    """The folders directly below the root whose names are on the disk for good. Each is held open, so that no other
    folder gets its inode: one that was removed and made anew is told from it.
    """

    def __init__(self) -> None:
        self._held: dict[Path, int] = {}
        self._lock = threading.Lock()

    def sync(self, folder: Path) -> None:
        """Make the names in it last, and its own. Raises FileNotFoundError."""
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened)
            with self._lock:
                held = self._held.get(folder)
                if held is not None and os.path.samestat(os.fstat(held), os.fstat(opened)):
                    return
            _sync_folder(folder.parent)
            with self._lock:
                self._held[folder], opened = opened, self._held.get(folder, -1)
        finally:
            if opened >= 0:
                os.close(opened)

    def __del__(self) -> None:
        for descriptor in self._held.values():
            os.close(descriptor)


class _Counted:
    """A source of bytes with a limit, that remembers its own failure apart from the store's."""

    def __init__(self, chunks: AsyncIterable[bytes], max_bytes: int) -> None:
        self._chunks, self._max_bytes = chunks, max_bytes
        self.size = 0
        self.failure: Exception | None = None

    async def batches(self, size: int) -> AsyncIterator[bytes]:
        """The bytes in pieces of at least ``size``, but for the last."""
        held = bytearray()
        try:
            async for chunk in self._chunks:
                self.size += len(chunk)
                if self.size > self._max_bytes:
                    raise BodyTooLarge(
                        f"The file is larger than {self._max_bytes / 1e6:g} MB. Use a smaller one."
                    )
                held += chunk
                if len(held) >= size:
                    yield bytes(held)
                    held.clear()
        except Exception as error:
            self.failure = error
            raise
        if held:
            yield bytes(held)


@contextlib.contextmanager
def _mapped(*, writing: bool = False) -> Iterator[None]:
    """Turn the store's errors into ours. The words name no server, as users may read them."""
    try:
        yield
    except (FileNotFoundError, NotFoundError) as error:
        if writing:
            raise StoreUnavailable("The bucket or folder of the file storage does not exist.") from error
        raise NotFound from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreUnavailable("The disk of the file storage is full. Free some space.") from error
        raise StoreUnavailable("The file storage cannot be read or written.") from error
    except BaseError as error:
        raise StoreUnavailable("The file storage does not answer as it should. Try again later.") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _copy(path: Path, file: BinaryIO) -> None:
    with path.open("rb") as source:
        shutil.copyfileobj(source, file, CHUNK_BYTES)


def _write_all(file: Any, data: bytes) -> None:
    """A raw file may take less than it is given."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
