"""The Wan engine with real pipelines of tiny random weights: files, turns, and what ends a job."""

import gc
import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra: pip install 'rushes[wan]'")

import torch
from PIL import Image

from rushes.engines.base import Overlapping
from rushes.engines.wan.engine import WanEngine
from rushes.engines.wan.memory import Rung
from rushes.engines.wan.pace import AGAIN, DECODING, DENOISING, READING, WAITING
from rushes.errors import EngineError
from support.tiny_diffusers import Kind
from support.wan_engine import SECONDS, Heard, Running, before, job, local, made, model, video
from support.wan_running import picture

Tiny = Callable[[Kind], Path]
KINDS: tuple[Kind, ...] = ("text-two-experts", "image", "image-two-experts", "vace-two-experts")
"""Those of the four models that come with Rushes."""


def engine(**changed: Any) -> WanEngine:
    given: dict[str, Any] = {"profile": "exact", "device": "cpu", "loras_dir": None, **changed}
    return WanEngine(local, **given)


def loaded(warm: WanEngine) -> Any:
    assert warm._ready is not None
    return warm._ready.loaded


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """The engine collects garbage to free memory; what the imports left is no part of it, and a million objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def text(tiny: Tiny) -> Any:
    return model("text", tiny("text"))


@pytest.fixture(scope="module")
def alone(text: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """What a fresh engine makes of a job; made once for the same roles."""
    folder = tmp_path_factory.mktemp("alone")
    known: dict[str, bytes] = {}

    def made_alone(**roles: Any) -> bytes:
        if repr(roles) not in known:
            known[repr(roles)] = made(engine(), job(text, folder, **roles))
        return known[repr(roles)]

    return made_alone


@pytest.fixture
def warm(text: Any) -> WanEngine:
    made_ = engine()
    made_.warm(text)
    return made_


@pytest.fixture
def pictures(tmp_path: Path) -> dict[Kind, dict[str, Path]]:
    """What each kind needs besides the prompt: a PNG and a JPEG."""
    start = picture(tmp_path / "start.png", 50, 40, seed=1)
    end = tmp_path / "end.jpg"
    Image.open(picture(tmp_path / "end.png", 40, 50, seed=2)).save(end, quality=90)
    return {
        "text-two-experts": {},
        "image": {"start_image": start},
        "image-two-experts": {"start_image": start, "end_image": end},
        "vace-two-experts": {"reference_image": start},
    }


# -- files ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "frames", "fps"), [((54, 96), 10, 12), ((90, 50), 9, 29.97)])
def test_every_kind_makes_a_video_of_exactly_what_was_asked(
    kind: Kind, size: tuple[int, int], frames: int, fps: float, tiny: Tiny, pictures: Any, tmp_path: Path
) -> None:
    asked = job(model(kind, tiny(kind)), tmp_path, resolution=size, frames=frames, fps=fps, **pictures[kind])

    (file,) = engine().run(asked, Heard())

    assert (frames, size[1], size[0], 3) == video(file.path)[0]
    assert pytest.approx(fps, abs=0.001) == video(file.path)[1]
    assert (*size, frames, "video", "video/mp4") == (
        file.width,
        file.height,
        file.frames,
        file.kind,
        file.content_type,
    )
    assert pytest.approx(fps, abs=0.001) == file.fps
    assert asked.output_dir / "wan.mp4" == file.path


@pytest.mark.parametrize("frames", [13, 81, 141])
def test_every_number_of_frames_comes_out(frames: int, warm: WanEngine, text: Any, tmp_path: Path) -> None:
    (file,) = warm.run(job(text, tmp_path, resolution=(18, 20), frames=frames), Heard())

    assert (frames, 20, 18, 3) == video(file.path)[0]
    assert frames == file.frames


@pytest.mark.parametrize("size", [(54, 96), (90, 50), (33, 31)])
def test_a_picture_is_a_png_of_exactly_the_size(size: tuple[int, int], tiny: Tiny, tmp_path: Path) -> None:
    asked = job(model("text-two-experts", tiny("text-two-experts"), output="image"), tmp_path, resolution=size)

    (file,) = engine().run(asked, Heard())

    with Image.open(file.path) as opened:
        assert (size, "RGB", "PNG") == (opened.size, opened.mode, opened.format)
        assert not opened.info  # neither the prompt nor anything else is told
    assert (asked.output_dir / "wan.png", "image", "image/png", 1, None) == (
        file.path,
        file.kind,
        file.content_type,
        file.frames,
        file.fps,
    )
    assert size == (file.width, file.height)


def test_the_same_request_gives_the_same_bytes_and_another_seed_gives_others(
    warm: WanEngine, text: Any, tmp_path: Path, alone: Callable[..., bytes]
) -> None:
    first = made(warm, job(text, tmp_path))

    assert first == made(warm, job(text, tmp_path))
    assert first == alone()
    assert first != made(warm, job(text, tmp_path, seed=4))


def test_a_second_attempt_without_a_seed_is_the_first_once_more(
    warm: WanEngine, text: Any, tmp_path: Path
) -> None:
    asked = job(text, tmp_path, seed=None)
    first = made(warm, asked)

    assert first == made(warm, asked)
    assert first != made(warm, job(text, tmp_path, seed=None))


def test_words_of_any_language_are_prompts(warm: WanEngine, text: Any, tmp_path: Path) -> None:
    told = {
        words: made(warm, job(text, tmp_path, prompt=words)) for words in ("kedi", "猫が歩く", "кіт 🐈", "")
    }

    assert len(told) == len(set(told.values()))


def test_prompts_are_read_once(warm: WanEngine, text: Any, tmp_path: Path) -> None:
    read: list[int] = []
    with before(loaded(warm).pipe.text_encoder.encoder, lambda: read.append(1)):
        made(warm, job(text, tmp_path))
        made(warm, job(text, tmp_path, seed=9))

    assert 2 == len(read)  # the prompt and the negative one


# -- loading ----------------------------------------------------------------------------------------------------
def test_what_it_says_of_itself() -> None:
    assert ["wan", "wan-fast", "wan-turbo"] == [engine(profile=one).name for one in ("exact", "fast", "turbo")]
    assert isinstance(engine(), Overlapping)
    assert (2, True) == (engine().lanes, engine().one_model)


def test_a_model_is_loaded_once_and_told_in_one_line(text: Any, capfd: Any) -> None:
    asked: list[str] = []
    cold = WanEngine(
        lambda one: (asked.append(one.id), local(one))[1], profile="exact", device="cpu", loras_dir=None
    )

    cold.warm(text)
    first = cold._ready
    cold.warm(text)

    assert ["tiny/text"] == asked
    assert first is cold._ready
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    (ready,) = [line for line in lines if line["event"] == "wan model ready"]
    assert ("tiny/text", "exact") == (ready["model"], ready["profile"])
    assert "loading the transformer" in ready["done"]
    assert any(words.startswith("attention: ") for words in ready["done"])


def test_two_lanes_that_begin_at_once_load_once(text: Any, tmp_path: Path) -> None:
    asked: list[str] = []
    cold = WanEngine(
        lambda one: (asked.append(one.id), local(one))[1], profile="exact", device="cpu", loras_dir=None
    )

    both = [Running(cold, job(text, tmp_path)) for _ in range(2)]

    assert both[0].made() == both[1].made()
    assert ["tiny/text"] == asked


@pytest.mark.parametrize("other", ["another model", "the same with other steps"])
def test_another_model_needs_another_process(other: str, warm: WanEngine, text: Any, tiny: Tiny) -> None:
    changed = (
        model("image", tiny("image")) if other == "another model" else model("text", tiny("text"), steps=5)
    )

    with pytest.raises(EngineError) as refused:
        warm.warm(changed)

    error = refused.value
    assert (True, True, False) == (error.replace, error.retryable, error.began)
    warm.warm(text)


def test_weights_that_cannot_be_used_are_refused_and_can_be_mended(
    tiny: Tiny, tmp_path: Path, text: Any
) -> None:
    folders = [tmp_path / "nothing", tiny("text")]
    (tmp_path / "nothing").mkdir()
    cold = WanEngine(
        lambda _: local(model("text", folders.pop(0))), profile="exact", device="cpu", loras_dir=None
    )

    with pytest.raises(EngineError) as refused:
        cold.warm(text)

    assert "weights_unusable" == refused.value.reason
    cold.warm(text)


def test_too_little_memory_to_load_costs_the_process(text: Any) -> None:
    def short(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    cold = engine()
    handle = torch.nn.modules.module.register_module_parameter_registration_hook(short)
    try:
        with pytest.raises(EngineError) as refused:
            cold.warm(text)
    finally:
        handle.remove()

    assert ("out_of_memory", True) == (refused.value.reason, refused.value.replace)
    cold.warm(text)


def test_a_profile_that_the_manifest_does_not_have_is_refused(text: Any) -> None:
    with pytest.raises(EngineError) as refused:
        engine(profile="turbo").warm(text)

    assert "profile_unusable" == refused.value.reason


def test_a_manifest_that_is_wrong_is_refused_without_a_path(text: Any, tiny: Tiny) -> None:
    with pytest.raises(EngineError) as refused:
        engine().warm(model("text", tiny("text"), stepz=3))

    assert "model_unusable" == refused.value.reason
    assert str(tiny("text")) not in refused.value.message


def test_the_few_steps_of_turbo_are_those_of_the_manifest(tiny: Tiny, tmp_path: Path, tiny_lora: Path) -> None:
    turbo = {"steps": 1, "guidance": 1.0, "loras": [{"source": str(tiny_lora.parent), "path": tiny_lora.name}]}
    heard = Heard()

    engine(profile="turbo").run(job(model("text", tiny("text"), turbo=turbo), tmp_path), heard)

    assert [1] == [progress.steps for progress in heard.told if progress.stage == DENOISING]


# -- what is told -----------------------------------------------------------------------------------------------
def test_progress_rises_with_a_finite_eta_and_the_next_job_is_called_once(
    warm: WanEngine, text: Any, tmp_path: Path
) -> None:
    for _ in range(2):  # the second knows the first one's times
        heard = Heard()
        warm.run(job(text, tmp_path), heard)

        assert [READING, DENOISING, DECODING] == heard.stages
        fractions = [progress.fraction for progress in heard.told]
        assert sorted(fractions) == fractions
        assert (0.0, 1.0, 0.0) == (fractions[0], fractions[-1], heard.told[-1].eta)
        assert all(progress.eta is None or 0 <= progress.eta < math.inf for progress in heard.told)
        steps = [(one.step, one.steps) for one in heard.told if one.stage == DENOISING]
        assert [(1, 2), (2, 2)] == steps
        (ahead,) = heard.ahead
        assert DECODING == heard.told[ahead].stage
        assert DENOISING == heard.told[ahead - 1].stage

    assert heard.told[0].eta is not None


def test_the_first_job_of_all_is_not_said_to_end_before_its_frames_are_decoded(
    tiny: Tiny, tmp_path: Path
) -> None:
    heard = Heard()

    engine().run(job(model("text", tiny("text")), tmp_path), heard)

    (ahead,) = heard.ahead
    assert {None} == {progress.eta for progress in heard.told[: ahead + 1]}
    assert 0.0 == heard.told[-1].eta


def test_a_preview_is_there_after_the_first_step(warm: WanEngine, text: Any, tmp_path: Path) -> None:
    asked = job(text, tmp_path, resolution=(64, 48))
    seen: list[tuple[int, int]] = []

    def look(progress: Any) -> None:
        if progress.stage == DECODING and not seen:
            with Image.open(asked.output_dir.parent / "preview.jpg") as opened:
                opened.load()
                assert ("JPEG", "RGB") == (opened.format, opened.mode)
                seen.append(opened.size)

    warm.run(asked, Heard(look))

    assert [(64, 48)] == seen
    assert {"outputs", "preview.jpg"} == {path.name for path in asked.output_dir.parent.iterdir()}


# -- two at once ------------------------------------------------------------------------------------------------
def test_one_denoises_at_a_time_and_the_next_denoises_while_this_one_decodes(
    warm: WanEngine, text: Any, tmp_path: Path, alone: Callable[..., bytes]
) -> None:
    first, second = job(text, tmp_path), job(text, tmp_path, seed=8)
    expected = alone(), alone(seed=8)
    may_denoise, other_denoised = threading.Event(), threading.Event()
    denoising: list[str] = []
    met: list[bool] = []

    def on_block() -> None:
        name = threading.current_thread().name
        denoising.append(name)
        if name == first.request_id:
            may_denoise.wait(SECONDS)
        else:
            other_denoised.set()

    def on_decode() -> None:
        if threading.current_thread().name == first.request_id and not met:
            met.append(other_denoised.wait(SECONDS))

    model_ = loaded(warm)
    with before(model_.pipe.transformer.blocks[0], on_block), before(model_.decoder.decoder, on_decode):
        one = Running(warm, first)
        one.heard.wait(READING)
        two = Running(warm, second)
        two.heard.wait(WAITING)
        assert [WAITING] == two.heard.stages
        may_denoise.set()
        both = one.made(), two.made()

    assert expected == both
    assert [True] == met  # the first one's decoding stood still until the second one denoised
    turns = [name for place, name in enumerate(denoising) if place == 0 or denoising[place - 1] != name]
    assert [first.request_id, second.request_id] == turns
    assert ([1], [1]) == ([len(one.heard.ahead)], [len(two.heard.ahead)])


# -- ending -----------------------------------------------------------------------------------------------------
def test_jobs_that_nobody_has_can_be_aborted(warm: WanEngine) -> None:
    warm.abort("request-that-is-not", 1)


def _waited(event: threading.Event) -> None:
    event.wait(SECONDS)


def _ends(running: Running) -> None:
    error = running.ended()
    assert isinstance(error, EngineError)
    assert "aborted" == error.reason
    assert not error.replace
    assert not list(running.job.output_dir.iterdir())


@pytest.mark.parametrize("where", ["text", "denoise", "decode"])
def test_a_job_ends_where_it_is_and_the_next_one_is_as_on_a_fresh_engine(
    where: str, warm: WanEngine, text: Any, tmp_path: Path, alone: Callable[..., bytes]
) -> None:
    expected = alone(prompt="a dog")
    model_ = loaded(warm)
    part = {
        "text": model_.pipe.text_encoder.encoder.block[0],
        "denoise": model_.pipe.transformer.blocks[1],
        "decode": model_.decoder.decoder,
    }[where]
    asked = job(text, tmp_path, frames=9)
    with before(part, lambda: warm.abort(asked.request_id, 1)):
        running = Running(warm, asked)
        _ends(running)

    assert 1.0 not in [progress.fraction for progress in running.heard.told]
    assert expected == made(warm, job(text, tmp_path, prompt="a dog"))


def test_a_waiting_job_ends_and_the_one_before_it_goes_on(
    warm: WanEngine, text: Any, tmp_path: Path, alone: Callable[..., bytes]
) -> None:
    expected = alone()
    go_on = threading.Event()
    with before(loaded(warm).pipe.transformer.blocks[0], lambda: _waited(go_on)):
        one = Running(warm, job(text, tmp_path))
        one.heard.wait(READING)
        two = Running(warm, job(text, tmp_path))
        two.heard.wait(WAITING)
        two.abort()
        _ends(two)
        go_on.set()

        assert expected == one.made()


@pytest.mark.parametrize("failure", [RuntimeError("a shape does not fit"), EngineError("size_unusable", "no")])
def test_an_error_leaves_nothing_that_the_next_job_notices(
    failure: Exception, warm: WanEngine, text: Any, tmp_path: Path, alone: Callable[..., bytes]
) -> None:
    expected = alone()

    def fail() -> None:
        raise failure

    with before(loaded(warm).pipe.transformer.blocks[1], fail), pytest.raises(type(failure)) as raised:
        made(warm, job(text, tmp_path, frames=9))

    assert failure is raised.value
    assert expected == made(warm, job(text, tmp_path))


def test_what_cannot_be_generated_names_its_input(warm: WanEngine, text: Any, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as refused:
        warm.run(job(text, tmp_path, frames=100_000), Heard())

    assert ("frames_unusable", "length") == (refused.value.reason, refused.value.field)


def test_a_picture_that_is_none_is_named(tiny: Tiny, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.png"
    nothing.write_bytes(b"no picture")

    with pytest.raises(EngineError) as refused:
        engine().run(job(model("image", tiny("image")), tmp_path, start_image=nothing), Heard())

    assert "input_not_media" == refused.value.reason


@pytest.mark.parametrize("output", ["video", "image"])
def test_a_full_disk_is_an_os_error_and_the_next_job_works(output: str, tiny: Tiny, tmp_path: Path) -> None:
    asked_of = model("text", tiny("text"), output=output)
    warm = engine()
    asked = job(asked_of, tmp_path)
    name = "wan.mp4" if output == "video" else "wan.png"
    (asked.output_dir / name).symlink_to("/dev/full")

    with pytest.raises(OSError):  # which one is the system's affair
        warm.run(asked, Heard())

    assert made(warm, job(asked_of, tmp_path))


# -- out of memory ----------------------------------------------------------------------------------------------
class Short:
    """Raises as torch does where a card has no more memory, until ``enough`` says so."""

    def __init__(self, enough: Callable[[], bool]) -> None:
        self._enough = enough
        self.times = 0

    def __call__(self) -> None:
        if not self._enough():
            self.times += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")


def _part(model_: Any, where: str) -> Any:
    return {
        "text": model_.pipe.text_encoder.encoder,
        "encode": model_.pipe.vae.encoder,
        "denoise": model_.pipe.transformer,
        "decode": model_.decoder.decoder,
    }[where]


@pytest.fixture(scope="module")
def vace(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any], bytes]:
    """Weights that have every stage, what they need, and what a fresh engine makes of it."""
    folder = tmp_path_factory.mktemp("vace")
    asked_of = model("vace-two-experts", tiny("vace-two-experts"))
    given = {"reference_image": picture(folder / "start.png", 50, 40, seed=1)}
    return asked_of, given, made(engine(), job(asked_of, folder, **given))


@pytest.mark.parametrize("where", ["text", "encode", "denoise", "decode"])
@pytest.mark.parametrize("rung", [Rung.SAVING, Rung.OFFLOAD])
def test_a_job_that_runs_out_of_memory_is_done_with_less(
    where: str, rung: Rung, vace: Any, tmp_path: Path
) -> None:
    asked_of, given, expected = vace
    warm = engine()
    warm.warm(asked_of)
    model_, heard = loaded(warm), Heard()
    short = Short(lambda: model_.rung >= rung)
    steps: list[int] = []
    with before(_part(model_, where), short), before(model_.pipe.transformer_2, lambda: steps.append(1)):
        (file,) = warm.run(job(asked_of, tmp_path, **given), heard)

    assert (int(rung), rung) == (short.times, model_.rung)
    assert AGAIN in heard.stages
    assert 1 == len(heard.ahead)
    assert expected == file.path.read_bytes()  # no tile is smaller than this picture, and nothing else differs
    if where == "decode":
        assert [READING, DENOISING] == heard.stages[:2]
        assert 1 == heard.stages.count(DENOISING)  # what was denoised is kept
    between = _runs(heard)
    assert all(sorted(run) == run for run in between)
    assert int(rung) + 1 == len(between)


def _runs(heard: Heard) -> list[list[float]]:
    """The fractions of each try."""
    tries: list[list[float]] = [[]]
    for progress in heard.told:
        if progress.stage == AGAIN:
            tries.append([])
        tries[-1].append(progress.fraction)
    return tries


@pytest.mark.parametrize("where", ["text", "encode", "denoise", "decode"])
def test_a_job_that_nothing_makes_room_for_fails_and_costs_the_process(
    where: str, vace: Any, tmp_path: Path
) -> None:
    asked_of, given, expected = vace
    warm = engine()
    warm.warm(asked_of)
    short = Short(lambda: False)
    asked = job(asked_of, tmp_path, **given)
    with before(_part(loaded(warm), where), short), pytest.raises(EngineError) as failed:
        warm.run(asked, Heard())

    error = failed.value
    assert ("out_of_memory", False, True) == (error.reason, error.retryable, error.replace)
    assert "smaller" in error.message
    assert 3 == short.times
    assert not list(asked.output_dir.iterdir())
    assert expected == made(warm, job(asked_of, tmp_path, **given))


def test_who_runs_out_of_memory_beside_another_waits_for_it_and_is_then_done_as_ever(
    warm: WanEngine, text: Any, tmp_path: Path, alone: Callable[..., bytes]
) -> None:
    first, second = job(text, tmp_path), job(text, tmp_path, seed=8)
    expected = alone(), alone(seed=8)
    second_failed = threading.Event()
    failed: list[str] = []

    def on_decode() -> None:
        if threading.current_thread().name == first.request_id:
            assert second_failed.wait(SECONDS)

    def on_step() -> None:
        if threading.current_thread().name == second.request_id and not failed:
            failed.append("once")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    def on_second(progress: Any) -> None:
        if progress.stage == AGAIN:
            second_failed.set()

    model_ = loaded(warm)
    with before(model_.decoder.decoder, on_decode), before(model_.pipe.transformer, on_step):
        one = Running(warm, first)
        one.heard.wait(DECODING)
        two = Running(warm, second, Heard(on_second))
        both = one.made(), two.made()

    assert expected == both
    assert Rung.PLAIN == model_.rung
    assert [READING, DENOISING, DECODING] == one.heard.stages
    own = [stage for stage in two.heard.stages if stage != WAITING]
    assert [READING, AGAIN, READING, DENOISING, DECODING] == own
    assert two.heard.told[two.heard.ahead[0]].fraction >= 0.99  # alone to its end: no third job beside it


def test_a_job_that_fails_for_memory_does_the_other_lane_no_harm(
    warm: WanEngine, text: Any, tmp_path: Path, alone: Callable[..., bytes]
) -> None:
    first, second = job(text, tmp_path), job(text, tmp_path, seed=8)
    expected = alone()
    second_failed = threading.Event()

    def on_decode() -> None:
        if threading.current_thread().name == first.request_id:
            assert second_failed.wait(SECONDS)

    def on_step() -> None:
        if threading.current_thread().name == second.request_id:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    def on_second(progress: Any) -> None:
        if progress.stage == AGAIN:
            second_failed.set()

    model_ = loaded(warm)
    with before(model_.decoder.decoder, on_decode), before(model_.pipe.transformer, on_step):
        one = Running(warm, first)
        one.heard.wait(DECODING)
        two = Running(warm, second, Heard(on_second))
        error = two.ended()

        assert expected == one.made()

    assert isinstance(error, EngineError)
    assert ("out_of_memory", True) == (error.reason, error.replace)


def test_a_smaller_job_is_not_done_with_less_for_a_larger_one_that_was(
    warm: WanEngine, text: Any, tmp_path: Path, alone: Callable[..., bytes]
) -> None:
    small, large = {"resolution": (48, 48), "frames": 1}, {"resolution": (80, 80), "frames": 1}
    fresh = alone(**small), alone(**large)
    model_ = loaded(warm)
    for vae in (model_.pipe.vae, model_.decoder):
        vae.enable_tiling(32, 32, 16, 16)  # so that both are larger than a tile
        vae.disable_tiling()
    with before(model_.decoder.decoder, Short(lambda: model_.rung >= Rung.SAVING)):
        tiled = made(warm, job(text, tmp_path, **large))

    assert fresh[1] != tiled
    assert tiled == made(warm, job(text, tmp_path, **large))  # from the start now, with the same bytes
    assert fresh[0] == made(warm, job(text, tmp_path, **small))
    heard = Heard()
    warm.run(job(text, tmp_path, **small), heard)
    assert DENOISING == heard.told[heard.ahead[0] - 1].stage  # and others may denoise beside its decoding


def test_no_memory_for_the_way_out_either_costs_the_process(warm: WanEngine, text: Any, tmp_path: Path) -> None:
    def on(progress: Any) -> None:
        if progress.stage == AGAIN:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    with (
        before(loaded(warm).pipe.transformer, Short(lambda: False)),
        pytest.raises(EngineError) as failed,
    ):
        warm.run(job(text, tmp_path), Heard(on))

    assert ("out_of_memory", True) == (failed.value.reason, failed.value.replace)


def test_a_card_that_fails_costs_the_process_and_not_the_request(
    warm: WanEngine, text: Any, tmp_path: Path
) -> None:
    def fail() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with before(loaded(warm).pipe.transformer, fail), pytest.raises(EngineError) as failed:
        warm.run(job(text, tmp_path), Heard())

    error = failed.value
    assert ("engine_error", True, True) == (error.reason, error.retryable, error.replace)


# -- the LoRAs of requests --------------------------------------------------------------------------------------
def test_a_requests_lora_is_in_its_own_video_only(tiny: Tiny, tmp_path: Path, tiny_lora: Path) -> None:
    kind: Kind = "text-two-experts"
    asked_of = model(kind, tiny(kind))
    warm = engine(loras_dir=tiny_lora.parent)
    plain = made(warm, job(asked_of, tmp_path))

    strong, weak = (
        made(warm, job(asked_of, tmp_path, loras=[{"path": tiny_lora.name, "scale": scale}]))
        for scale in (1.0, 0.5)
    )

    assert 3 == len({plain, strong, weak})
    assert plain == made(warm, job(asked_of, tmp_path))
    assert strong == made(warm, job(asked_of, tmp_path, loras=[{"path": tiny_lora.name}]))


def test_loras_that_cannot_be_used_are_named(tiny: Tiny, tmp_path: Path, tiny_lora: Path) -> None:
    asked_of = model("text", tiny("text"))
    folder = tmp_path / "loras"
    folder.mkdir()
    (folder / "broken.safetensors").write_bytes(b"none of it")
    (folder / "outside.safetensors").symlink_to(tiny_lora)
    warm = engine(loras_dir=folder)
    expected = made(warm, job(asked_of, tmp_path))
    for name in ("missing.safetensors", "broken.safetensors", "outside.safetensors", "program.ckpt"):
        with pytest.raises(EngineError) as refused:
            warm.run(job(asked_of, tmp_path, loras=[{"path": name}]), Heard())
        assert ("loras_unusable", "styles") == (refused.value.reason, refused.value.field)
        assert name in refused.value.message
        assert str(folder) not in refused.value.message

    assert expected == made(warm, job(asked_of, tmp_path))
