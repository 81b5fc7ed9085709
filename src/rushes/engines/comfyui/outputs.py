"""Which files a prompt made, and what is in them.

What a file is, its content says: ComfyUI's nodes put videos under ``images`` and stills under ``gifs``. Sizes,
frames and rates are measured, not taken from the graph.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import av
import av.error
from PIL import Image

from rushes import log
from rushes.catalog.workflow import Graph
from rushes.engines.base import Produced
from rushes.errors import EngineError, MediaError
from rushes.media.inspect import check_image, is_whole
from rushes.media.png import plain_png
from rushes.media.sniff import SNIFF_BYTES, Sniffed, sniff
from rushes.media.strip import strip

_MOST_PIXELS: Final = 1 << 30
"""What the operator's own workflow makes is not refused for its size."""
_MOVING: Final = frozenset({"webp", "gif", "png", "avif"})
"""Formats of pictures that may hold more than one frame."""
_MATROSKA: Final = b"\x1a\x45\xdf\xa3"
_MATROSKA_VIDEO: Final = Sniffed("video", "webm", "video/matroska", ".mkv")
"""RFC 9559, 27.3. Its container is WebM's."""
_SUFFIXES: Final = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".gif", ".avif", ".mp4", ".webm", ".mov", ".mkv"}
)
_ONE_AT_A_TIME: Final = threading.Lock()
"""check_image changes limits that all of Pillow shares."""


# -- which ----------------------------------------------------------------------------------------------
def named_files(entry: Mapping[str, Any], graph: Graph, wanted: Sequence[str]) -> list[dict[str, str]]:
    """The files that a history entry names as ``{filename, subfolder, type}``, each once: nodes in the graph's
    order, files in the order in which each node saved them.

    Files are found under any key (``images``, ``gifs``, ``audio``, …). ``wanted`` are the ids of the nodes
    that count; empty means all. Previews (type ``temp``) count only where nothing was saved: of all nodes, or
    of the one node where it is wanted by id. Inputs that a node shows are never results.
    """
    outputs = entry.get("outputs")
    meta = entry.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    found: list[tuple[int, list[dict[str, str]]]] = []
    places = {node_id: place for place, node_id in enumerate(graph)}
    for node_id, output in outputs.items() if isinstance(outputs, Mapping) else ():
        names = _names(str(node_id), meta.get(node_id))
        if wanted and not any(name in wanted for name in names):
            continue
        place = next((places[name] for name in names if name in places), len(places))
        found.append((place, list(_files(output))))
    found.sort(key=lambda one: one[0])
    if wanted:
        chosen = [file for _, files in found for file in _saved_first(files)]
    else:
        chosen = _saved_first([file for _, files in found for file in files])
    return list({tuple(file.values()): file for file in chosen}.values())


def _names(node_id: str, meta: Any) -> list[str]:
    """A node's id, and those of the graph's node that made it at run time."""
    meta = meta if isinstance(meta, Mapping) else {}
    shown = (meta.get("display_node"), meta.get("real_node_id"), node_id.partition(".")[0])
    return [node_id, *(name for name in shown if isinstance(name, str))]


def _files(output: Any) -> Iterator[dict[str, str]]:
    for files in output.values() if isinstance(output, Mapping) else ():
        for file in files if isinstance(files, list | tuple) else ():
            if isinstance(file, Mapping) and isinstance(file.get("filename"), str) and file["filename"]:
                yield {
                    "filename": file["filename"],
                    "subfolder": str(file.get("subfolder") or ""),
                    "type": str(file.get("type") or "output"),  # as /view takes it
                }


def _saved_first(files: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    saved = [file for file in files if file["type"] == "output"]
    return saved or [file for file in files if file["type"] == "temp"]


# -- what -----------------------------------------------------------------------------------------------
def produced(path: Path) -> Produced | None:
    """The file, measured; None where it is no picture and no video (text, sound, latents, meshes).

    A picture that moves (WebP, GIF, APNG, AVIF of more than one frame) is a ``video``: it has frames, a rate
    and a duration, and a client of a model that makes videos looks for it there; ``content_type`` tells how to
    show it. The workflow that ComfyUI wrote into it is taken out: it is the operator's. Raises EngineError where the
    file is truncated or corrupt.
    """
    with path.open("rb") as file:
        head = file.read(SNIFF_BYTES)
    found = sniff(head)
    try:
        if found is not None and found.format == "png" and (plain := plain_png(path)) is not None:
            if plain.bare is not None:
                path.write_bytes(plain.bare)  # it is our copy, and nobody else has it yet
            return Produced(path, "image", "image/png", plain.width, plain.height)
        if found is None and head.startswith(_MATROSKA):
            found = _MATROSKA_VIDEO
        if found is None:
            if path.suffix.lower() in _SUFFIXES:
                raise _Corrupt
            return None
        made = _video(path, found) if found.kind == "video" else _image(path, found.format)
    except (_Corrupt, MediaError, av.error.FFmpegError, OSError, ValueError, EOFError, SyntaxError) as error:
        raise EngineError(
            "output_unreadable", f"ComfyUI's file {path.name} is truncated or corrupt."
        ) from error
    try:
        strip(path)
    except MediaError as error:  # it plays, so it is not worth losing; the operator should know
        log.event("comfyui_metadata_stays", file=path.name, error=error.message)
    return made


class _Corrupt(Exception):
    """The file does not hold what it promises."""


def _image(path: Path, format_: str) -> Produced:
    with _ONE_AT_A_TIME:
        info = check_image(path, _MOST_PIXELS)
        frames, fps = _animation(path) if format_ in _MOVING else (1, None)
    return Produced(
        path, "video" if frames > 1 else "image", info.content_type, info.width, info.height, frames, fps
    )


def _animation(path: Path) -> tuple[int, float | None]:
    """The number of frames, and the frames per second by the time that they are shown."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, _MOST_PIXELS
    try:
        with Image.open(path) as image:
            return _shown(image)
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _shown(image: Image.Image) -> tuple[int, float | None]:
    frames = int(getattr(image, "n_frames", 1))
    if frames == 1:
        return 1, None
    shown = 0.0
    for number in range(frames):
        image.seek(number)
        image.load()
        shown += float(image.info.get("duration") or 0)  # milliseconds
    return frames, round(1000 * frames / shown, 3) if shown else None


def _video(path: Path, found: Sniffed) -> Produced | None:
    """Counts packets, each of which is a frame that is shown: ten times as fast as decoding all of them. Only
    key frames are decoded.
    """
    if not is_whole(path, found):
        raise _Corrupt
    demuxer = "matroska" if found.format == "webm" else "mov"
    with av.open(str(path), format=demuxer, options={"protocol_whitelist": "file"}) as container:
        if not container.streams.video:
            return None  # sound
        stream = container.streams.video[0]
        stream.codec_context.skip_frame = "NONKEY"
        width, height = stream.codec_context.width, stream.codec_context.height
        moments: list[int] = []
        packets = frames = decoded = 0
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise _Corrupt
            packets += bool(packet.size)
            if packet.size and not packet.is_discard:
                frames += 1
                if packet.pts is not None:
                    moments.append(packet.pts)
            decoded += len(packet.decode())
        if not decoded or width <= 0 or height <= 0 or packets < stream.frames:
            raise _Corrupt
        fps = _rate(sorted(moments), stream.time_base or Fraction(1, 1000), stream.average_rate)
    return Produced(path, "video", found.content_type, width, height, frames, float(fps) if fps else None)


def _rate(moments: Sequence[int], tick: Fraction, declared: Fraction | None) -> Fraction | None:
    """Frames per second: what the file declares where its times, rounded to ticks, agree; else by the times."""
    if len(moments) < 2 or moments[-1] <= moments[0]:
        return declared or None
    intervals, span = len(moments) - 1, (moments[-1] - moments[0]) * tick
    if declared and abs(intervals / declared - span) <= tick:
        return declared
    return (intervals / span).limit_denominator(1001)
