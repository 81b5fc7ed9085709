"""What a request asks of Wan: sizes, frames, seeds, and which of request, manifest and default wins."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rushes.catalog.load import Catalog
from rushes.catalog.model import Input, Model, Role
from rushes.catalog.roles import roles_of
from rushes.catalog.wan import BOUNDS, Turbo, WanModel, has_wan, wan_of
from rushes.engines.base import Job
from rushes.engines.wan.plan import Plan, plan, round_up, whole_latents
from rushes.errors import EngineError

WAN = WanModel("me/wan")
FIELDS: dict[Role, str] = {
    "prompt": "string",
    "negative_prompt": "string",
    "start_image": "string",
    "end_image": "string",
    "source_video": "string",
    "resolution": "string",
    "frames": "integer",
    "fps": "float",
    "seed": "integer",
    "steps": "integer",
    "guidance": "float",
    "shift": "float",
    "loras": "loras",
}


def model(output: str = "video", references: int = 1) -> Model:
    inputs = [Input(f"1_{role}", role, type_, role) for role, type_ in FIELDS.items()]  # type: ignore[arg-type]
    inputs += [Input(f"2_{n}", "Reference", "string", "reference_image") for n in range(references)]
    return Model("me/mine", "Mine", "", (), output, tuple(inputs), (), Path("/models"))  # type: ignore[arg-type]


def job(of: Model | None = None, files: dict[str, Path] | None = None, id_: str = "r-1", **roles: Any) -> Job:
    of, files = of or model(), files or {}
    roles |= {field.role: files[field.name] for field in of.inputs if field.name in files}
    return Job(id_, 1, of, {}, roles, files, Path("/scratch/out"))


def planned(wan: WanModel = WAN, turbo: bool = False, **roles: Any) -> Plan:
    return plan(job(**roles), wan, turbo)


# -- sizes --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("size", "padded", "offset"),
    [
        ((1024, 576), (1024, 576), (0, 0)),
        ((540, 960), (544, 960), (2, 0)),
        ((960, 540), (960, 544), (0, 2)),
        ((1440, 810), (1440, 816), (0, 3)),
        ((1024, 1365), (1024, 1376), (0, 5)),
        ((1, 1), (16, 16), (7, 7)),
    ],
)
def test_sides_are_padded_and_the_middle_is_kept(
    size: tuple[int, int], padded: tuple[int, int], offset: tuple[int, int]
) -> None:
    made = planned(resolution=size)
    assert size == (made.width, made.height)
    assert padded == (made.padded_width, made.padded_height)
    assert offset == (made.left, made.top)


@given(st.integers(1, 8192))
def test_a_padded_side_is_the_next_multiple_and_holds_the_crop(side: int) -> None:
    made = planned(resolution=(side, 16))
    assert 0 == made.padded_width % 16
    assert 0 <= made.padded_width - side < 16
    right = made.padded_width - made.left - side
    assert right - made.left in (0, 1)
    assert made.padded_width == round_up(side)


@pytest.mark.parametrize(
    ("output", "size"), [("video", (832, 480)), ("image", (1024, 1024))], ids=["video", "image"]
)
def test_a_model_without_a_resolution_has_one(output: str, size: tuple[int, int]) -> None:
    made = plan(job(model(output)), WAN, turbo=False)
    assert size == (made.width, made.height)


# -- frames -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("frames", "generated"), [(1, 1), (2, 5), (5, 5), (80, 81), (81, 81), (141, 141), (142, 145)]
)
def test_frames_are_generated_in_fours_and_one(frames: int, generated: int) -> None:
    made = planned(frames=frames)
    assert (frames, generated) == (made.frames, made.generated_frames)


@given(st.integers(1, 4093))
def test_generated_frames_are_the_fewest_that_are_enough(frames: int) -> None:
    generated = whole_latents(frames)
    assert 1 == generated % 4
    assert 0 <= generated - frames < 4


def test_an_image_is_one_frame_without_a_rate() -> None:
    made = plan(job(model("image"), frames=81, fps=16), WAN, turbo=False)
    assert ("image", 1, 1, None) == (made.kind, made.frames, made.generated_frames, made.fps)


def test_each_reference_takes_a_latent_frame() -> None:
    of = model(references=3)
    files = {f"2_{n}": Path(f"/in/{n}.png") for n in range(3)}
    assert 4081 == plan(job(of, files, frames=4081), WAN, turbo=False).generated_frames
    with pytest.raises(EngineError, match="4082 frames are too many: Wan generates 4081 at most") as caught:
        plan(job(of, files, frames=4082), WAN, turbo=False)
    assert ("frames_unusable", "1_frames") == (caught.value.reason, caught.value.field)
    assert 4093 == planned(frames=4093).frames


# -- who wins -----------------------------------------------------------------------------------------------
def test_what_nobody_gives_is_wans_own() -> None:
    made = planned()
    assert (40, 5.0, 5.0, 5.0, "unipc") == (
        made.steps,
        made.guidance,
        made.guidance_2,
        made.shift,
        made.scheduler,
    )
    assert (81, 16.0, "", "", "video") == (
        made.frames,
        made.fps,
        made.prompt,
        made.negative_prompt,
        made.kind,
    )
    nothing = (made.start_image, made.end_image, made.reference_images, made.source_video, made.loras)
    assert (None, None, (), None, ()) == nothing


TABLE = WanModel(
    "me/wan",
    scheduler="euler",
    steps=30,
    guidance=3.5,
    shift=8.0,
    frames=49,
    fps=24.0,
    negative_prompt="blur",
    turbo=Turbo(4, shift=5.0, scheduler="lcm"),
)


def test_the_manifest_gives_what_no_input_does() -> None:
    made = planned(TABLE)
    assert (30, 3.5, 3.5, 8.0) == (made.steps, made.guidance, made.guidance_2, made.shift)
    assert (49, 24.0, "blur", "euler") == (made.frames, made.fps, made.negative_prompt, made.scheduler)


def test_the_request_wins_and_none_is_not_given() -> None:
    given = {"steps": 7, "guidance": 0.6, "shift": 2, "frames": 9, "fps": 12.5, "negative_prompt": ""}
    made = planned(TABLE, prompt="a fox", **given)
    assert (7, 0.6, 0.6, 2.0) == (made.steps, made.guidance, made.guidance_2, made.shift)
    assert (9, 12.5, "", "a fox") == (made.frames, made.fps, made.negative_prompt, made.prompt)
    assert planned(TABLE) == planned(TABLE, **dict.fromkeys(given))


def test_the_low_noise_expert_has_its_own_guidance_where_the_manifest_gives_one() -> None:
    made = planned(WanModel("me/wan", guidance=4.0, guidance_2=3.0), guidance=2.0)
    assert (2.0, 3.0) == (made.guidance, made.guidance_2)


def test_turbo_wins_over_the_request() -> None:
    made = planned(TABLE, turbo=True, steps=20, guidance=4.0, shift=9.0, frames=9)
    assert (4, 1.0, 1.0, 5.0, "lcm") == (
        made.steps,
        made.guidance,
        made.guidance_2,
        made.shift,
        made.scheduler,
    )
    assert 9 == made.frames


def test_turbo_leaves_what_it_does_not_name() -> None:
    made = planned(WanModel("me/wan", scheduler="euler", guidance_2=3.0, turbo=Turbo(6)), turbo=True, shift=9.0)
    assert (6, 1.0, 9.0, "euler") == (made.steps, made.guidance_2, made.shift, made.scheduler)


def test_a_model_without_turbo_says_so() -> None:
    with pytest.raises(EngineError, match="me/mine has no profile turbo") as caught:
        planned(turbo=True)
    assert "profile_unusable" == caught.value.reason


# -- seeds --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("seed", "expected"), [(0, 0), (2**64 - 1, 2**64 - 1), (-1, 2**64 - 1)])
def test_a_seed_is_64_bits(seed: int, expected: int) -> None:
    assert expected == planned(seed=seed).seed


def test_without_a_seed_a_request_draws_one_that_its_next_attempt_has_too() -> None:
    first = plan(job(id_="r-1"), WAN, turbo=False)
    second = Job("r-1", 2, model(), {}, {}, {}, Path("/scratch/other"))
    assert first.seed == plan(second, WAN, turbo=False).seed
    others = {plan(job(id_=f"r-{n}"), WAN, turbo=False).seed for n in range(100)}
    assert 100 == len(others)
    assert all(0 <= seed < 2**64 for seed in others)


# -- files, texts, LoRAs ------------------------------------------------------------------------------------
def test_files_come_by_role_and_references_in_the_manifests_order() -> None:
    files = {
        "2_1": Path("/in/b.png"),
        "1_start_image": Path("/in/start.png"),
        "1_end_image": Path("/in/end.png"),
        "1_source_video": Path("/in/video.mp4"),
        "2_0": Path("/in/a.png"),
    }
    made = plan(job(model(references=3), files), WAN, turbo=False)
    assert (Path("/in/a.png"), Path("/in/b.png")) == made.reference_images
    assert Path("/in/start.png") == made.start_image
    assert Path("/in/end.png") == made.end_image
    assert Path("/in/video.mp4") == made.source_video


def test_a_reference_by_role_alone_is_taken() -> None:
    assert (Path("/in/a.png"),) == planned(reference_image=Path("/in/a.png")).reference_images


def test_texts_stay_as_they_are_but_for_halves_of_characters() -> None:
    made = planned(prompt="  ein Fuchs\n狐狸 🦊 \ud83d", negative_prompt="\udc80")
    assert ("  ein Fuchs\n狐狸 🦊 \ufffd", "\ufffd") == (made.prompt, made.negative_prompt)


def test_loras_of_the_request() -> None:
    loras = [{"path": "wan/a.safetensors", "scale": 0.5}, {"path": "b.safetensors"}]
    assert (("wan/a.safetensors", 0.5), ("b.safetensors", 1.0)) == planned(loras=loras).loras


# -- what cannot be -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("role", "value", "reason", "message"),
    [
        ("resolution", (8193, 16), "size_unusable", "8193x16 pixels is no size from 1 to 8192 a side"),
        ("resolution", (0, 16), "size_unusable", "0x16 pixels"),
        ("resolution", "wide", "size_unusable", "'wide' is no width and height"),
        ("resolution", (1, 2, 3), "size_unusable", "no width and height"),
        ("frames", 0, "frames_unusable", "frames is 0; Wan takes 1 to 4093"),
        ("frames", 2.5, "frames_unusable", "frames is 2.5; it must be a whole number"),
        ("fps", 0, "fps_unusable", "fps is 0; Wan takes 0.1 to 240"),
        ("steps", 1001, "steps_unusable", "Wan takes 1 to 1000"),
        ("steps", 10**400, "steps_unusable", "Wan takes 1 to 1000"),
        ("guidance", float("nan"), "guidance_unusable", "guidance is nan"),
        ("guidance", -1, "guidance_unusable", "Wan takes 0 to 100"),
        ("shift", "five", "shift_unusable", "shift is 'five'; Wan takes 0.01 to 100"),
        ("shift", float("inf"), "shift_unusable", "shift is inf"),
        ("seed", 1.5, "seed_unusable", "seed is 1.5; it must be a whole number"),
    ],
)
def test_what_wan_cannot_generate_names_the_input(role: str, value: Any, reason: str, message: str) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        planned(**{role: value})
    assert (reason, f"1_{role}", False) == (caught.value.reason, caught.value.field, caught.value.retryable)


def test_a_role_without_an_input_has_no_field() -> None:
    bare = Model("me/mine", "Mine", "", (), "video", (), (), Path("/models"))
    with pytest.raises(EngineError) as caught:
        plan(job(bare, steps=0), WAN, turbo=False)
    assert None is caught.value.field


# -- the built-in models ------------------------------------------------------------------------------------
@pytest.mark.parametrize("turbo", [False, True], ids=["exact", "turbo"])
@pytest.mark.parametrize("entry", Catalog().entries(), ids=lambda entry: entry.model.id)
def test_every_built_in_model_can_be_planned_at_every_size_and_bound(entry: Any, turbo: bool) -> None:
    """Nothing that a built-in model's schema lets pass is refused here."""
    of: Model = entry.model
    assert has_wan(of)
    wan = wan_of(of)
    complete = entry.validator.validate_input(of.sample).input
    files = {name: Path(f"/in/{name}.png") for name in of.files() if name in complete}

    def at(name: str, value: Any) -> Plan:
        roles = roles_of(of, complete | {name: value})
        roles |= {field.role: files[field.name] for field in of.inputs if field.name in files}
        return plan(Job("r", 1, of, complete, roles, files, Path("/out")), wan, turbo)

    for field in of.inputs:
        bounds = (one for one in (field.minimum, field.maximum, field.default) if one is not None)
        for value in field.enum or bounds:
            made = at(field.name, value)
            if field.role == "resolution":
                assert (made.width, made.height) == roles_of(of, {field.name: value})["resolution"]
            elif field.role in BOUNDS and not (turbo and field.role in ("steps", "guidance", "shift")):
                assert value == getattr(made, field.role)
