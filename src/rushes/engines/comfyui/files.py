"""The files of one job on their way into ComfyUI and back. They are copied, never moved: what ComfyUI keeps of a
prompt may be named by the next one, too.
"""

import contextlib
import os
import re
import shutil
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
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})


class JobFiles:
    """``names`` are the input files' names as ComfyUI knows them, by field: what they should be, before
    :meth:`upload` what they are.
    """

    def __init__(self, line: Line, job: Job) -> None:
        self._line, self._job = line, job
        self._folder = f"{FOLDER}/{job.request_id}-{job.attempt}"
        self.names = {field: f"{self._folder}/{_name(field, path)}" for field, path in job.files.items()}
        self._found: list[tuple[Path | None, Path]] = []

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
                    shutil.copyfile(source, path)
                except FileNotFoundError as error:
                    raise self._gone(str(source)) from error
        return [path for _, path in self._found]

    def clear(self, prompt_ids: Sequence[str]) -> None:
        """Remove what is this job's alone, where ComfyUI's folders are ours. Its prompts have ended."""
        folders = self._line.folders
        if folders is not None:
            if self._job.files:
                shutil.rmtree(folders.input_dir / self._folder, ignore_errors=True)
            for prompt_id in prompt_ids:
                shutil.rmtree(folders.output_dir / FOLDER / prompt_id, ignore_errors=True)

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
        for number, file in enumerate(named, 1):
            path = self._job.output_dir / f"{number:03d}{_suffix(file.get('filename', ''))}"
            source = self._near(file)
            if source is None:
                await self._download(file, path)
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
            raise EngineError("comfyui_upload_refused", text, retryable=error.status >= 500) from error

    async def _download(self, file: Mapping[str, str], path: Path) -> None:
        server = self._line.server
        try:
            await self._line.insist(lambda: server.view(file, path), tries=_TRANSFERS)
        except Rejected as error:
            raise self._gone(str(error)) from error

    def _near(self, file: Mapping[str, str]) -> Path | None:
        """The file in ComfyUI's folder, where that is within reach. Copied, it costs ComfyUI no time."""
        subfolder, name = PurePosixPath(file.get("subfolder", "")), file.get("filename", "")
        if subfolder.is_absolute() or ".." in subfolder.parts or "/" in name or "\\" in name:
            return None
        root = self._line.output_dir
        if file.get("type") == "temp" and self._line.folders is not None:
            root = self._line.folders.temp_dir
        elif file.get("type") != "output":
            return None
        if root is None or (self._line.folders is None and subfolder.parts[:1] != (FOLDER,)):
            return None  # only a folder that has our prompt's id in its name is the one that we think it is
        source = root / subfolder / name
        return source if os.access(source, os.R_OK) else None

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


def _name(field: str, path: Path) -> str:
    """A name that ComfyUI, its nodes and every file system leave as it is."""
    return (re.sub(r"[^\w.-]", "_", field, flags=re.ASCII) + path.suffix.lower()).lstrip(".-")


def _suffix(name: str) -> str:
    suffix = PurePosixPath(name).suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z0-9]{1,8}", suffix) else ""
