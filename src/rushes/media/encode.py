"""Pictures and videos onto the disk: PNG, and H.264 in MP4, one frame at a time.

The encoder runs in a thread of its own, behind a short queue, so that the next frame is drawn while the last
one is encoded. PyAV and OpenCV let go of the interpreter lock, so two cores are kept busy. Memory is bounded
by the queue and by the encoder's look-ahead, whatever the number of frames.

The same frames give the same bytes: the number of encoder threads is fixed (the bit stream depends on it),
the container carries no date, and the bit-exact flags keep library versions out of it.
"""

import queue
import threading
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import av
import cv2
import numpy as np
import numpy.typing as npt
from av.container import OutputContainer
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from av.video.stream import VideoStream
from PIL import Image, PngImagePlugin

from rushes.errors import MediaError

Frame = npt.NDArray[np.uint8]
"""Height x width x 3, RGB, 8 bits."""

MAX_SIDE: Final = 8192
"""Pixels. Level 6.2, the highest of H.264, ends at 8192 x 4320."""
_WAITING: Final = 3
_THREADS: Final = 2
_BT709: Final = 1
"""ITU-T H.273: the code point 1 means BT.709 for primaries, transfer and matrix alike."""
_LIMITED: Final = 1
"""AVColorRange AVCOL_RANGE_MPEG: luma from 16 to 235."""


def exact_fps(fps: float) -> Fraction:
    """``fps`` in frames per second as a fraction; the NTSC rates become multiples of 1000/1001.

    Raises :class:`MediaError` for a rate that no container can carry.
    """
    if not 0 < fps <= 1000:
        raise MediaError("fps_unusable", f"{fps} frames per second cannot be encoded: use up to 1000.")
    ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
    if abs(float(ntsc) - fps) < 0.002 and fps != round(fps):
        return ntsc
    return Fraction(fps).limit_denominator(1000) or Fraction(1, 1000)


class VideoWriter:
    """Writes H.264 in MP4 with the index in front (faststart), 8 bits, BT.709, limited range.

    Even sizes are 4:2:0 (``yuv420p``), which every player takes. 4:2:0 has no odd sizes, so an odd width or
    height is written as 4:4:4 (High 4:4:4 Predictive): exact, though some browsers do not play it.

    Use it as a context manager: an exception inside removes the unfinished file.
    """

    def __init__(self, path: Path, width: int, height: int, fps: float, *, comment: str | None = None) -> None:
        if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
            raise MediaError(
                "size_unusable", f"{width}x{height} pixels is no size from 1 to {MAX_SIDE} a side."
            )
        self.path, self.width, self.height = path, width, height
        self.fps = exact_fps(fps)
        self.frames = 0
        """Frames given so far."""
        self._comment = comment
        self._queue: queue.Queue[Frame | None] = queue.Queue(_WAITING)
        self._failure: BaseException | None = None
        self._aborted = self._ended = False
        self._thread = threading.Thread(target=self._encode_all, name="encode", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def write(self, frame: Frame) -> None:
        """Append ``frame``, which belongs to the writer from now on. Blocks while the encoder is behind.

        Raises what the encoder met with, for example OSError for a full disk, at the latest when the context
        ends.
        """
        if frame.shape != (self.height, self.width, 3) or frame.dtype != np.uint8:
            raise ValueError(f"expected {self.height}x{self.width}x3 uint8, got {frame.shape} {frame.dtype}")
        if self._failure is not None:
            raise self._failure
        self._queue.put(frame)
        self.frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._aborted = kind is not None
        self._queue.put(None)
        self._thread.join()
        if kind is not None or self._failure is not None:
            self.path.unlink(missing_ok=True)
        if kind is None and self._failure is not None:
            raise self._failure

    def _encode_all(self) -> None:
        try:
            # The container flag keeps the muxer's version out of the file.
            options = {"movflags": "+faststart", "fflags": "+bitexact"}
            with av.open(self.path, "w", format="mp4", options=options) as container:
                if self._comment:
                    container.metadata["comment"] = self._comment
                self._encode_into(container, self._add_stream(container))
            _check_complete(self.path)
        except BaseException as error:  # raised again in the thread that writes
            self._failure = error
            while not self._ended:  # take what comes, so that the writing thread never blocks for ever
                self._take()

    def _take(self) -> Frame | None:
        """The next frame, or None after the last one."""
        frame = self._queue.get()
        self._ended = frame is None
        return frame

    def _add_stream(self, container: OutputContainer) -> VideoStream:
        odd = self.width % 2 or self.height % 2
        stream = container.add_stream("libx264", rate=self.fps)
        stream.width, stream.height = self.width, self.height
        stream.pix_fmt = "yuv444p" if odd else "yuv420p"
        stream.time_base = 1 / self.fps
        stream.options = {
            "preset": "veryfast",
            "crf": "17",
            "g": str(max(1, round(2 * self.fps))),  # a key frame every two seconds, for scrubbing
            "flags": "+bitexact",
            # Measured: with the macroblock tree, libx264 gives other bytes for the same frames once in some
            # hundred runs, also with one thread. Without it, never.
            "x264-params": "mbtree=0",
        }
        context = stream.codec_context
        context.thread_count = _THREADS
        context.thread_type = "FRAME"
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = _LIMITED
        return stream

    def _encode_into(self, container: OutputContainer, stream: VideoStream) -> None:
        step = 1 / self.fps
        number = 0
        while (pixels := self._take()) is not None:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format=stream.pix_fmt,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=Interpolation.BICUBIC,
            )
            frame.pts, frame.time_base = number, step
            number += 1
            container.mux(stream.encode(frame))
        if not self._aborted:
            container.mux(stream.encode(None))


def _check_complete(path: Path) -> None:
    """Raise OSError where ``path`` ends early: the muxer does not report every write that failed on closing."""
    size = path.stat().st_size
    place, names = 0, []
    with path.open("rb") as file:
        while place < size:
            file.seek(place)
            head = file.read(16)
            length, name = int.from_bytes(head[:4]), head[4:8]
            if length == 1:  # ISO/IEC 14496-12: a 64-bit length follows
                length = int.from_bytes(head[8:16])
            if length < 8:
                break
            names.append(name)
            place += length
    if place != size or b"moov" not in names or b"mdat" not in names:
        raise OSError("The video could not be written to its end. Is the disk full?")


def write_png(path: Path, picture: Frame, *, comment: str | None = None) -> None:
    """Write RGB pixels as PNG; ``comment`` goes into a text chunk."""
    info = PngImagePlugin.PngInfo()
    if comment:
        info.add_itxt("Comment", comment)
    Image.fromarray(picture).save(path, format="PNG", compress_level=4, pnginfo=info)


def read_picture(path: Path) -> Frame:
    """The pixels of an image file, RGB. Raises :class:`MediaError` where it cannot be decoded."""
    try:
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR_RGB)
    except (OSError, cv2.error):
        pixels = None
    if pixels is None:
        raise MediaError("input_not_media", "The picture cannot be decoded.")
    return np.asarray(pixels, np.uint8)
