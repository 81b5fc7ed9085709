"""What a remote made, brought here: fetched within bounds, looked at, and nothing of another kind than was wanted."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Final

from rushes import log
from rushes.catalog.model import Model
from rushes.engines.base import Produced
from rushes.engines.remote.base import (
    Finished,
    RemoteEngine,
    RemoteFile,
    RemoteJob,
    RemoteRefused,
    RemoteUnavailable,
)
from rushes.engines.remote.outputs import OutputNotFetched, conform, fetch_output
from rushes.errors import MediaError
from rushes.media.fetch import FetchPolicy
from rushes.media.inspect import VideoInfo
from rushes.media.inspector import Inspector

MOST_FILES: Final = 16
MOST_BYTES: Final = 4_000_000_000
"""Of all outputs of one request together."""
SECONDS: Final = 1800.0
"""For all of them, with every new address that is asked for."""
_ROUNDS: Final = 5
"""How often a finished job is asked for other addresses of its outputs."""
_PAUSE: Final = 1.0
_WRONG_KIND: Final = "input_wrong_kind"


class Collector:
    """Of one request. ``handle`` is what the remote is asked by for fresh addresses; "" where it cannot be asked."""

    def __init__(
        self,
        engine: RemoteEngine,
        model: Model,
        job: RemoteJob,
        handle: str,
        *,
        inspector: Inspector,
        policy: FetchPolicy,
    ) -> None:
        self._engine = engine
        self._model = model
        self._job = job
        self._handle = handle
        self._inspector = inspector
        self._policy = policy
        self._done: dict[int, Produced | None] = {}
        """By place among the outputs: what is here already. None: it is of another kind, and not wanted."""
        self._bytes = 0

    async def collect(self, finished: Finished) -> tuple[list[Produced], Finished]:
        """The files, and the answer that they are of: the last one counts. Raises RemoteRefused, StoreUnavailable."""
        until, pause = time.monotonic() + SECONDS, _PAUSE
        for left in reversed(range(_ROUNDS)):
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    return await self._all(finished.files), finished
            except OutputNotFetched as error:
                name = self._engine.name
                log.event("output not fetched", request=self._job.request_id, remote=name, error=error.message)
                if not left or not (error.retryable or error.expired):
                    # It was made, and paid for: to have it made again is for the user to say.
                    raise RemoteRefused(error.reason, error.message, billed=True) from None
            except TimeoutError:
                text = f"The outputs could not be fetched from {self._engine.name} within {SECONDS:g} seconds."
                raise RemoteRefused("output_not_fetched", text, billed=True) from None
            await asyncio.sleep(pause)
            pause *= 2
            finished = await self._again(finished)
        raise AssertionError

    async def _again(self, finished: Finished) -> Finished:
        if not self._handle:
            return finished
        with contextlib.suppress(RemoteUnavailable):
            again = await self._engine.poll(self._handle, self._job)
            if isinstance(again, Finished):
                if len(again.files) != len(finished.files):
                    self._done.clear()
                return again
        return finished

    async def _all(self, files: Sequence[RemoteFile]) -> list[Produced]:
        if len(files) > MOST_FILES:
            request, remote = self._job.request_id, self._engine.name
            log.event("outputs left out", request=request, remote=remote, given=len(files), taken=MOST_FILES)
        for place, file in enumerate(files[:MOST_FILES]):
            if place not in self._done:
                self._done[place] = await self._one(place, file)
        made = [one for _, one in sorted(self._done.items()) if one is not None]
        if not made:
            text = f"{self._engine.name} finished without {self._model.output}."
            raise RemoteRefused("remote_failed", text, billed=True)
        return made

    async def _one(self, place: int, file: RemoteFile) -> Produced | None:
        name, wanted = self._engine.name, self._model.output
        try:
            fetched = await fetch_output(
                file,
                self._job.folder / "out" / f"{place + 1}.file",
                engine_origin=self._engine.origin,
                headers=self._engine.headers(),
                policy=self._policy,
                media=wanted,
            )
        except OutputNotFetched as error:
            if error.cause != _WRONG_KIND:
                raise
            log.event("output of another kind", request=self._job.request_id, remote=name, wanted=wanted)
            return None
        self._bytes += fetched.size
        if self._bytes > MOST_BYTES:
            text = f"{name} gave more than {MOST_BYTES / 1e9:g} GB."
            raise RemoteRefused("output_not_fetched", text, billed=True)
        path = fetched.path
        try:
            info = await self._inspector.check(path, fetched.kind)
            if file.size not in (None, (info.width, info.height)) and info.kind == "image":
                assert file.size is not None
                path = await conform(self._inspector, path, file.size)
                return Produced(path, "image", "image/png", *file.size)
        except MediaError as error:
            log.event("output not usable", request=self._job.request_id, remote=name, error=error.message)
            text = f"{name} gave a file that cannot be read."
            raise OutputNotFetched(text, cause=error.reason, expired=False, retryable=False) from None
        if isinstance(info, VideoInfo):
            return Produced(
                path, "video", info.content_type, info.width, info.height, frames=info.frames, fps=info.fps
            )
        return Produced(path, "image", info.content_type, info.width, info.height)
