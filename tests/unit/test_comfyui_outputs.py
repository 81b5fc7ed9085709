"""Which files a history entry names, and what is in them: counts are held against a full decode."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from rushes.engines.base import Produced
from rushes.engines.comfyui.outputs import named_files, produced
from rushes.errors import EngineError

# As captured from ComfyUI 0.3.64, in the order in which the nodes ran.
ENTRY = {
    "outputs": {
        "5": {
            "images": [{"filename": "vid_00001_.mp4", "subfolder": "cap", "type": "output"}],
            "animated": [True],
        },
        "8": {
            "images": [{"filename": "webp_00001_.webp", "subfolder": "cap", "type": "output"}],
            "animated": [False],
        },
        "6": {"images": [{"filename": "ComfyUI_temp_ixzfv_00001_.png", "subfolder": "", "type": "temp"}]},
        "3": {
            "images": [
                {"filename": "img_00001_.png", "subfolder": "cap", "type": "output"},
                {"filename": "img_00002_.png", "subfolder": "cap", "type": "output"},
            ]
        },
    },
    "meta": {"5": {"node_id": "5", "display_node": "5", "parent_node": None, "real_node_id": "5"}},
}
GRAPH = {str(number): {"class_type": "Any", "inputs": {}} for number in range(1, 10)}


def names(entry: dict, graph: dict = GRAPH, wanted: tuple[str, ...] = ()) -> list[str]:
    return [file["filename"] for file in named_files(entry, graph, wanted)]


# -- which ----------------------------------------------------------------------------------------------
def test_saved_files_come_in_the_graphs_order_and_previews_not_at_all() -> None:
    expected = ["img_00001_.png", "img_00002_.png", "vid_00001_.mp4", "webp_00001_.webp"]
    assert expected == names(ENTRY)
    assert {"filename": "vid_00001_.mp4", "subfolder": "cap", "type": "output"} == named_files(
        ENTRY, GRAPH, ()
    )[2]
    backwards = dict(reversed(GRAPH.items()))
    assert ["webp_00001_.webp", "vid_00001_.mp4", *expected[:2]] == names(ENTRY, backwards)


def test_wanted_nodes_alone_count_and_bring_their_previews_where_they_save_nothing() -> None:
    assert ["vid_00001_.mp4"] == names(ENTRY, wanted=("5",))
    assert ["vid_00001_.mp4", "ComfyUI_temp_ixzfv_00001_.png"] == names(ENTRY, wanted=("6", "5"))
    assert [] == names(ENTRY, wanted=("1",))


def test_previews_count_where_nothing_is_saved() -> None:
    assert ["ComfyUI_temp_ixzfv_00001_.png"] == names({"outputs": {"6": ENTRY["outputs"]["6"]}})


def test_files_are_found_under_any_key_and_each_once() -> None:
    file = {"filename": "a.mp4", "subfolder": "x", "type": "output"}
    entry = {
        "outputs": {
            "2": {
                "gifs": [file | {"format": "video/h264-mp4", "fullpath": "/srv/out/a.mp4", "frame_rate": 16.0}],
                "text": ["hello"],
                "animated": (True,),
            },
            "1": {"audio": [{"filename": "a.flac", "subfolder": "", "type": "output"}], "3d": None},
            "4": {
                "video": [file],
                "result": ["mesh.glb", None],
                "images": [{"filename": ""}, {"filename": 5}, {}],
            },
            "7": {"images": [{"filename": "in.png", "subfolder": "", "type": "input"}]},
            "8": {"images": [{"filename": "old.png"}]},
            "9": None,
        }
    }
    assert [
        {"filename": "a.flac", "subfolder": "", "type": "output"},
        file,
        {"filename": "old.png", "subfolder": "", "type": "output"},
    ] == named_files(entry, GRAPH, ())


def test_a_node_made_at_run_time_stands_for_its_maker() -> None:
    file = {"filename": "a.png", "subfolder": "", "type": "output"}
    first = {"filename": "b.png", "subfolder": "", "type": "output"}
    outputs = {"9": {"images": [file]}, "4.0.2": {"images": [first]}}
    assert ["b.png", "a.png"] == names({"outputs": outputs})
    assert ["b.png"] == names({"outputs": outputs}, wanted=("4",))
    shown = {"outputs": {"made": {"images": [first]}}, "meta": {"made": {"display_node": "4"}}}
    assert ["b.png"] == names(shown, wanted=("4",))
    assert ["b.png"] == names({"outputs": {"made": {"images": [first]}}})


@pytest.mark.parametrize("entry", [{}, {"outputs": None}, {"outputs": []}, {"outputs": {"1": []}, "meta": 3}])
def test_an_entry_without_files_names_none(entry: dict) -> None:
    assert [] == named_files(entry, GRAPH, ())


# -- what -----------------------------------------------------------------------------------------------
def noise(count: int, width: int = 32, height: int = 16) -> list[np.ndarray]:
    random = np.random.default_rng(7)
    return [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]


def movie(
    path: Path, codec: str, rate: float | Fraction, frames: int = 25, *, sound: bool = False, **options: str
) -> Path:
    muxer = {".mkv": "matroska"}.get(path.suffix, path.suffix[1:])
    pixels = "yuv422p10le" if codec == "prores_ks" else "yuv420p"
    movflags = {"movflags": options.pop("movflags")} if "movflags" in options else {}
    with av.open(str(path), "w", format=muxer, options=movflags) as container:
        stream = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1001), options=options)
        stream.width, stream.height, stream.pix_fmt = 32, 16, pixels
        audio = (
            container.add_stream("libopus" if muxer in ("webm", "matroska") else "aac", rate=48000)
            if sound
            else None
        )
        for picture in noise(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
        if audio is not None:  # three seconds: longer than the picture
            silence = av.AudioFrame.from_ndarray(
                np.zeros((1, 96000 * 3), np.int16), format="s16", layout="stereo"
            )
            silence.sample_rate = 48000
            container.mux(audio.encode(silence))
            container.mux(audio.encode())
    return path


def decoded(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


RATES = (12, 16, Fraction(24000, 1001), 24, 12.5, Fraction(30000, 1001))
CODECS = (
    (".mp4", "libx264", {"bf": "3"}, "video/mp4"),
    (".mp4", "libx264", {"bf": "2", "movflags": "faststart"}, "video/mp4"),
    (".mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}, "video/mp4"),
    (".mov", "prores_ks", {}, "video/quicktime"),
    (".webm", "libvpx-vp9", {"cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}, "video/webm"),
    (".webm", "libvpx", {"cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}, "video/webm"),
    (".mkv", "libx264", {"bf": "3"}, "video/matroska"),
    (".mkv", "ffv1", {}, "video/matroska"),
)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(("suffix", "codec", "options", "content_type"), CODECS)
def test_videos_are_counted_exactly(
    tmp_path: Path, suffix: str, codec: str, options: dict, content_type: str, rate: float | Fraction
) -> None:
    path = movie(tmp_path / f"a{suffix}", codec, rate, **options)
    assert 25 == decoded(path)
    assert Produced(path, "video", content_type, 32, 16, 25, float(rate)) == produced(path)


@pytest.mark.parametrize("frames", [1, 2, 81])
@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "libx264"), (".mkv", "libx264"), (".webm", "libvpx")])
def test_any_number_of_frames_is_counted(tmp_path: Path, suffix: str, codec: str, frames: int) -> None:
    path = movie(tmp_path / f"a{suffix}", codec, 16, frames)
    measured = produced(path)
    assert (frames, frames, 16.0) == (decoded(path), measured.frames, measured.fps)


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "libx264"), (".mkv", "libx264"), (".webm", "libvpx")])
def test_sound_does_not_count(tmp_path: Path, suffix: str, codec: str) -> None:
    path = movie(tmp_path / f"a{suffix}", codec, 24, sound=True)
    assert (25, 24.0) == (produced(path).frames, produced(path).fps)


def test_frames_at_uneven_times_have_their_mean_rate(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for moment, picture in zip((0, 100, 500, 600, 1000), noise(5), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = moment, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert (5, 4.0) == (produced(path).frames, produced(path).fps)


@pytest.mark.parametrize(
    ("name", "content_type"),
    [("a.png", "image/png"), ("a.jpg", "image/jpeg"), ("a.webp", "image/webp"), ("a.gif", "image/gif")],
)
def test_pictures_are_told_by_their_content(tmp_path: Path, name: str, content_type: str) -> None:
    path = tmp_path / name
    Image.fromarray(noise(1)[0]).save(path)
    renamed = path.rename(tmp_path / "saved_00001_.mp4")
    assert Produced(renamed, "image", content_type, 32, 16) == produced(renamed)


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".png", ".avif"])
def test_pictures_that_move_are_videos(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    first, *rest = [Image.fromarray(picture) for picture in noise(7)]
    first.save(path, save_all=True, append_images=rest, duration=80)
    content_type = f"image/{suffix[1:]}"
    assert Produced(path, "video", content_type, 32, 16, 7, 12.5) == produced(path)


def test_an_animation_without_times_has_no_rate(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    first, *rest = [Image.fromarray(picture) for picture in noise(3)]
    first.save(path, save_all=True, append_images=rest, duration=0)
    assert (3, None) == (produced(path).frames, produced(path).fps)


def test_large_pictures_are_taken_and_pillows_own_limit_stays(tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    path = tmp_path / "large.png"
    Image.new("1", (20000, 10000)).save(path)
    assert (20000, 10000) == (produced(path).width, produced(path).height)
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"hello"),
        ("a.latent", b"\x08\0\0\0\0\0\0\0{}"),
        ("a.flac", b"fLaC" + bytes(40)),
        ("empty.txt", b""),
    ],
)
def test_what_is_neither_picture_nor_video_is_left_out(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert produced(path) is None


def test_sound_alone_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 96000), np.int16), format="s16", layout="stereo")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert produced(path) is None


def whole(path: Path) -> Path:
    if path.suffix in (".png", ".jpg", ".webp"):
        Image.fromarray(noise(1, 64, 64)[0]).save(path)
        return path
    codec, options = ("libvpx-vp9", {}) if path.suffix == ".webm" else ("libx264", {})
    if path.name == "fast.mp4":
        options = {"movflags": "faststart"}
    return movie(path, codec, 24, **options)


@pytest.mark.parametrize("cut", [0.0, 0.0001, 0.5, 0.999])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.mp4", "fast.mp4", "a.mov", "a.webm", "a.mkv"])
def test_a_file_that_ends_early_is_an_error(tmp_path: Path, name: str, cut: float) -> None:
    path = whole(tmp_path / name)
    assert produced(path) is not None
    content = path.read_bytes()
    path.write_bytes(content[: min(len(content) - 2, int(len(content) * cut))])

    with pytest.raises(EngineError) as caught:
        produced(path)
    assert ("output_unreadable", False) == (caught.value.reason, caught.value.retryable)
    assert f"ComfyUI's file {name} is truncated or corrupt." == caught.value.message


@pytest.mark.parametrize("name", ["a.png", "a.mp4", "a.webm"])
def test_a_file_of_rubbish_behind_a_good_beginning_is_an_error(tmp_path: Path, name: str) -> None:
    path = whole(tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(
        content[:64] + bytes(np.random.default_rng(3).integers(0, 256, len(content), dtype=np.uint8))
    )
    with pytest.raises(EngineError):
        produced(path)


def test_the_workflow_is_taken_out_of_what_is_stored(tmp_path: Path) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    words = PngInfo()
    words.add_text("prompt", '{"6": {"class_type": "SecretNode"}}')
    path = tmp_path / "made.png"
    Image.new("RGB", (8, 6), "teal").save(path, pnginfo=words)
    assert b"SecretNode" in path.read_bytes()
    made = produced(path)
    assert made is not None
    assert (8, 6) == (made.width, made.height)
    assert b"SecretNode" not in path.read_bytes()
    with Image.open(path) as picture:
        assert (0, 128, 128) == picture.getpixel((3, 3))
