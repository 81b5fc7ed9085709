"""The files of one job on their way into ComfyUI and back. They are copied, never moved: what ComfyUI keeps of a
prompt may be named by the next one, too.
"""

import asyncio
import contextlib
import os
import re
import shutil
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import urlsplit

from rushes import log
from rushes.engines.base import Job
from rushes.engines.comfyui.line import Folders, Line
from rushes.engines.comfyui.patch import FOLDER
from rushes.engines.comfyui.server import Rejected
from rushes.errors import EngineError

_TRANSFERS: Final = 5
"""Tries at bringing one file up or back, to a server that does answer otherwise."""
_FREE_SECONDS: Final = 0.25
"""ComfyUI drops its cache between two prompts, at once where none waits."""
_TEMP_SECONDS: Final = 3600.0
_OUTPUT_SECONDS: Final = 86400.0
_SMALL_BYTES: Final = 1 << 20
"""So long, at least, files stay in the folders of a ComfyUI of our own whose names it chose itself."""
_NUMBERS: Final = re.compile("[0-9]+")
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})


class JobFiles:
    """``names`` are the input files' names as ComfyUI knows them, by field: what they should be, before
    :meth:`upload` what they are.
    """

    def __init__(self, line: Line, job: Job) -> None:
        self._line, self._job = line, job
        self._folder = f"{FOLDER}/{job.request_id}-{job.attempt}"
        self.names = {field: f"{self._folder}/{_name(field, path)}" for field, path in job.files.items()}
        self.prompt_ids: set[str] = set()
        """The ids that we made up for this job's prompts, and so the names of their folders. Never an id that the
        server chose.
        """
        self._found: list[tuple[Path | None, Path]] = []
        self._fetching: float | None = None
        """When the outputs began to be fetched, in seconds since the epoch."""

    # -- in the worker's thread -------------------------------------------------------------------------
    def place(self) -> None:
        """Copy the inputs, where ComfyUI's folders are ours."""
        if self._line.folders is not None and self._job.files:
            (self._line.folders.input_dir / self._folder).mkdir(parents=True, exist_ok=True)
            for field, path in self._job.files.items():
                shutil.copyfile(path, self._line.folders.input_dir / self.names[field])

    def copied(self) -> list[Path]:
        """The outputs, of which those on this machine are still to be copied."""
        for source, path in self._found:
            if source is not None:
                try:
                    _copy(source, path)
                except FileNotFoundError as error:
                    raise self._gone(source.name) from error
        return [path for _, path in self._found]

    def clear(self, prompt_ids: Sequence[str]) -> None:
        """Remove what is this job's alone, and what has been left long ago, where ComfyUI's folders are ours. Its
        prompts have ended.
        """
        folders = self._line.folders
        if folders is not None:
            if self._job.files:
                shutil.rmtree(folders.input_dir / self._folder, ignore_errors=True)
            for prompt_id in prompt_ids:
                shutil.rmtree(folders.output_dir / FOLDER / prompt_id, ignore_errors=True)
            # Prompts run one after another: those that run or wait now have made nothing that is older than this.
            if self._fetching is not None:
                _sweep(folders.temp_dir, self._fetching - _TEMP_SECONDS)
                _sweep(folders.output_dir, self._fetching - _OUTPUT_SECONDS, spare=FOLDER)

    # -- in the event loop ------------------------------------------------------------------------------
    async def upload(self) -> bool:
        """Bring the inputs up; whether ComfyUI gave one of them another name."""
        if self._line.folders is not None:
            return False
        wished = self.names
        self.names = {field: await self._upload(field, path) for field, path in self._job.files.items()}
        return self.names != wished

    async def fetch(self, named: Sequence[Mapping[str, str]]) -> None:
        """Bring the outputs back; of those on this machine find the place."""
        self._fetching = time.time()
        for number, file in enumerate(named, 1):
            path = self._job.output_dir / f"{number:03d}{_suffix(file.get('filename', ''))}"
            source = self._near(file)
            if source is None:
                await self._download(file, path)
            elif self._line.folders is not None:
                if _is_swept(source):
                    raise await self._missing(source.name)
                with contextlib.suppress(OSError):
                    os.utime(source, (time.time(), time.time()))  # ComfyUI still names it: it stays
            self._found.append((source, path))

    async def _upload(self, field: str, path: Path) -> str:
        server, name = self._line.server, _name(field, path)
        try:
            return await self._line.insist(lambda: server.upload(path, name, self._folder), tries=_TRANSFERS)
        except Rejected as error:
            log.event("comfyui_upload_refused", request=self._job.request_id, field=field, answer=str(error))
            if error.status == 413:
                text = f"The file of {field} is larger than ComfyUI takes."
                raise EngineError("input_too_large", text, field=field) from error
            text = f"ComfyUI did not take the file of {field}."
            raise EngineError("comfyui_upload_refused", text) from error

    async def _download(self, file: Mapping[str, str], path: Path) -> None:
        server = self._line.server
        try:
            await self._line.insist(lambda: server.view(file, path), tries=_TRANSFERS)
        except Rejected as error:
            if error.status == 404:
                raise await self._missing(str(error)) from error
            raise self._gone(str(error)) from error

    async def _missing(self, why: str) -> EngineError:
        """A prompt out of ComfyUI's cache may name a file that somebody has removed meanwhile. As long as the
        cache has that, every attempt ends so: have it dropped.
        """
        with contextlib.suppress(EngineError):
            await self._line.insist(self._line.server.free, tries=_TRANSFERS)
        await asyncio.sleep(_FREE_SECONDS)
        return self._gone(why)

    def _near(self, file: Mapping[str, str]) -> Path | None:
        """The file in ComfyUI's folder, where that is within reach. Copied, it costs ComfyUI no time."""
        folders = self._line.folders
        subfolder, name = PurePosixPath(file.get("subfolder", "")), file.get("filename", "")
        if subfolder.is_absolute() or ".." in subfolder.parts or "/" in name or "\\" in name:
            return None
        root = self._line.output_dir
        if file.get("type") == "temp" and folders is not None:
            root = folders.temp_dir
        elif file.get("type") != "output":
            return None
        if root is None or (folders is None and not self._is_ours(subfolder)):
            return None
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            source = root / subfolder / name
            if not _is_straight(root, (*subfolder.parts, name)):
                root = root.resolve()
                source = (root / subfolder / name).resolve()
                home = root if folders is not None else root.joinpath(*subfolder.parts[:2])
                if not (source.is_relative_to(home) and source.is_file()):
                    return None
            if os.access(source, os.R_OK):
                return source
        return None

    def _is_ours(self, subfolder: PurePosixPath) -> bool:
        """Whether only a prompt of this job can have made this folder.

        Where its folders are, a ComfyUI says itself, and a loopback address may be the end of a tunnel: its paths
        may mean other files on this machine. But a folder that has the name which we have just made up, and told
        that ComfyUI alone, is the one that it made.
        """
        parts = subfolder.parts
        return len(parts) > 1 and parts[0] == FOLDER and parts[1] in self.prompt_ids

    def _gone(self, why: str) -> EngineError:
        log.event("comfyui_output_gone", request=self._job.request_id, error=why)
        return EngineError("output_gone", "An output could not be fetched from ComfyUI.", retryable=True)


def output_dir_of(url: str, stats: Mapping[str, Any], ours: Folders | None) -> Path | None:
    """The output folder of a ComfyUI on this machine, as far as its ``/system_stats`` tell; it may be wrong."""
    if ours is not None:
        return ours.output_dir
    with contextlib.suppress(KeyError, TypeError, ValueError, IndexError):
        if urlsplit(url).hostname not in _LOOPBACK:
            return None
        arguments = [part for one in stats["system"]["argv"] for part in str(one).split("=", 1)]
        if "--output-directory" in arguments:
            found = Path(arguments[arguments.index("--output-directory") + 1])
        elif "--base-directory" in arguments:
            found = Path(arguments[arguments.index("--base-directory") + 1]) / "output"
        else:
            found = Path(arguments[0]).parent / "output"
        return found if found.is_absolute() and found.is_dir() else None
    return None


def _sweep(folder: Path, before: float, *, spare: str = "") -> None:
    """Remove the files that are older than ``before`` (seconds since the epoch); not those in the folder ``spare``.
    Links are neither followed nor removed.

    Of each series of numbered files the last one stays, empty. ComfyUI gives a new file the number after the last
    there is; began it anew, a new file would have a name by which its cache, for another request, knows an old one.
    """
    for place, inner, names in os.walk(folder):
        if spare in inner and Path(place) == folder:
            inner.remove(spare)
        last: dict[str, tuple[list[int], str]] = {}
        for name in names:
            series = _NUMBERS.sub("#", name)
            here = ([int(number) for number in _NUMBERS.findall(name)], name)
            last[series] = max(last.get(series, here), here)
        kept = {name for _, name in last.values()}
        for name in names:
            path = Path(place, name)
            with contextlib.suppress(OSError):
                found = path.lstat()
                # The second one too, as a file that was copied may bring the first from long ago.
                if max(found.st_mtime, found.st_ctime) >= before or not stat.S_ISREG(found.st_mode):
                    continue
                if name not in kept:
                    path.unlink()
                elif not _is_swept(path):
                    empty = path.with_name(f"{name}.swept")
                    empty.touch()
                    os.utime(empty, (0, 0))
                    empty.replace(path)  # not truncated: somebody may be reading it


def _is_straight(root: Path, parts: Sequence[str]) -> bool:
    """Whether there is a file below ``root`` by this way, without a link on it; cheaper than to resolve the way."""
    place = root
    for part in parts[:-1]:
        place /= part
        if not stat.S_ISDIR(place.lstat().st_mode):
            return False
    return stat.S_ISREG((place / parts[-1]).lstat().st_mode)


def _is_swept(path: Path) -> bool:
    """Whether this is what :func:`_sweep` left of a file."""
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_size == 0 and found.st_mtime == 0


def _copy(source: Path, path: Path) -> None:
    """As shutil.copyfile, with less ado over a small file. ``path`` is new."""
    with source.open("rb", buffering=0) as file:
        data = file.read(_SMALL_BYTES)
        if len(data) < _SMALL_BYTES:
            path.write_bytes(data)
            return
    shutil.copyfile(source, path)


def _name(field: str, path: Path) -> str:
    """A name that ComfyUI, its nodes and every file system leave as it is."""
    return (re.sub(r"[^\w.-]", "_", field, flags=re.ASCII) + path.suffix.lower()).lstrip(".-")


def _suffix(name: str) -> str:
    suffix = PurePosixPath(name).suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z0-9]{1,8}", suffix) else ""
