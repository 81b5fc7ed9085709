"""Run :mod:`rushes.media.inspect` in a disposable child process.

Why a process: the files are untrusted, and the decoders are large C libraries that such files crash or make
eat memory. The child has a memory limit and no secrets in its environment, a job has a time limit, and a
child that dies costs one file and is replaced. The process that asks imports neither Pillow nor PyAV.

The child reads one job a line from standard input (JSON) and writes one answer a line. It ends when its
standard input does, and on Linux with the process that started it. The child is this module, run by -m.
"""

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from rushes.errors import MediaError, StoreUnavailable
from rushes.guard import die_with_parent
from rushes.media.inspect import ImageInfo, VideoInfo
from rushes.media.sniff import Kind

MEMORY_BYTES: Final = 3 * 1024**3
"""Address space of the child: 100 megapixels of RGBA with the copies that a conversion makes, and no more."""
JOB_SECONDS: Final = 120.0
_ENVIRONMENT: Final = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LANG", "LC_ALL")
"""What of the environment the child gets: what Python needs to start. Keys and passwords are not in it."""
_UNAVAILABLE: Final = "unavailable"
"""The reason of an answer that is about this machine and not about the file: a full disk, a missing folder."""


class Job(msgspec.Struct, frozen=True):
    """One line to the child. ``dest`` None: check only. ``size``: of the image in ``dest``; None leaves its own."""

    src: str
    media: Kind
    max_pixels: int
    dest: str | None = None
    size: tuple[int, int] | None = None


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line from the child: what the file is, or why it is refused."""

    info: dict[str, Any] | None = None
    reason: str = ""
    message: str = ""


class Inspector:
    """Checks files, one at a time, in a child that starts with the first file.

    Belongs to one event loop. Raises MediaError for a file that cannot be used; a child that died or overran
    its time over a file counts as that, with the reason ``input_unreadable``. Raises StoreUnavailable where the
    files cannot be read or written for reasons of this machine, such as a full disk.
    """

    def __init__(
        self, *, max_pixels: int = 100_000_000, seconds: float = JOB_SECONDS, memory: int = MEMORY_BYTES
    ) -> None:
        self._max_pixels, self._seconds, self._memory = max_pixels, seconds, memory
        self._child: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """The child's process id, or None while there is none."""
        return self._child.pid if self._child is not None and self._child.returncode is None else None

    async def check(self, src: Path, media: Kind) -> ImageInfo | VideoInfo:
        """What ``src`` is, once it decoded in full."""
        return await self._ask(Job(str(src), media, self._max_pixels))

    async def normalise(
        self, src: Path, dest: Path, media: Kind, size: tuple[int, int] | None = None
    ) -> ImageInfo | VideoInfo:
        """Check ``src`` and write what an engine takes to ``dest``: an image as RGB PNG, a video as it is.

        An image is brought to exactly ``size``, width and height in pixels, where one is given. ``dest`` exists
        afterwards only if all went well.
        """
        try:
            return await self._ask(Job(str(src), media, self._max_pixels, str(dest), size))
        except BaseException:
            dest.unlink(missing_ok=True)
            raise

    async def close(self) -> None:
        """End the child, if there is one. The inspector can be used again."""
        async with self._lock:
            child, self._child = self._child, None
            if child is None:
                return
            assert child.stdin is not None
            child.stdin.close()
            try:
                await asyncio.wait_for(child.wait(), 2)
            except TimeoutError:
                await _end(child)

    async def _ask(self, job: Job) -> ImageInfo | VideoInfo:
        async with self._lock:
            child = await self._running()
            try:
                async with asyncio.timeout(self._seconds):
                    answer = await _exchange(child, job)
            except BaseException as error:
                # Also when the caller is cancelled: the answer to this job must not be read as the next one's.
                self._child = None
                await asyncio.shield(_end(child))
                if isinstance(error, TimeoutError):
                    raise MediaError(
                        "input_unreadable",
                        f"The file took more than {self._seconds:g} seconds to decode. Use a smaller one.",
                    ) from None
                if isinstance(error, OSError | EOFError | msgspec.DecodeError):
                    raise MediaError(
                        "input_unreadable",
                        "The file could not be decoded: the decoder ended over it. Save or export it again.",
                    ) from None
                raise
        if answer.reason == _UNAVAILABLE:
            raise StoreUnavailable(answer.message)
        if answer.info is None:
            raise MediaError(answer.reason, answer.message)
        type_: type[ImageInfo | VideoInfo] = ImageInfo if job.media == "image" else VideoInfo
        return msgspec.convert(answer.info, type_)

    async def _running(self) -> asyncio.subprocess.Process:
        if self._child is None or self._child.returncode is not None:
            self._child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "rushes.media.inspector",
                str(self._memory),
                str(os.getpid()),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
                # One arena and no thread pools: each would take address space from the limit.
                | {"MALLOC_ARENA_MAX": "2", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        return self._child


async def _exchange(child: asyncio.subprocess.Process, job: Job) -> Answer:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(msgspec.json.encode(job) + b"\n")
    await child.stdin.drain()
    line = await child.stdout.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return msgspec.json.decode(line, type=Answer)


async def _end(child: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.kill()
    await child.wait()


# -- the child ------------------------------------------------------------------------------------------------
def _perform(job: Job) -> Answer:
    import shutil

    from rushes.media.inspect import check_image, check_video, normalise_image

    src = Path(job.src)
    info: ImageInfo | VideoInfo
    try:
        if job.media == "video":
            info = check_video(src, job.max_pixels)
            if job.dest is not None:
                shutil.copyfile(src, job.dest)
        elif job.dest is not None:
            info = normalise_image(src, Path(job.dest), job.max_pixels, job.size)
        else:
            info = check_image(src, job.max_pixels)
    except MediaError as error:
        return Answer(reason=error.reason, message=error.message)
    except MemoryError:
        return Answer(
            reason="input_unreadable", message="The file takes more memory to decode than is allowed."
        )
    except OSError as error:
        return Answer(
            reason=_UNAVAILABLE, message=f"The folder for work in hand cannot be used: {error.strerror}."
        )
    return Answer(info=msgspec.to_builtins(info))


def _confine(memory: int, parent: int) -> None:
    """Limit memory, leave no core files, and die with the parent."""
    import resource

    limits: list[tuple[int, int]] = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, memory)]
    for limit, value in limits:
        with contextlib.suppress(ValueError, OSError):  # macOS takes no limit on address space
            resource.setrlimit(limit, (value, value))
    die_with_parent(parent)


def main() -> Literal[0]:
    """Answer jobs until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the pipe
    _confine(int(sys.argv[1]), int(sys.argv[2]))
    # What a library prints must not stand among the answers.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        answer = _perform(msgspec.json.decode(line, type=Job))
        answers.write(msgspec.json.encode(answer) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
