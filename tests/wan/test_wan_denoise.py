"""The denoising of the Wan engine against the stock pipelines, on tiny random weights."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra: pip install 'rushes[wan]'")

import msgspec
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image

from rushes.engines.wan.denoise import Denoiser, Stop
from rushes.engines.wan.plan import Plan
from rushes.engines.wan.prompts import Embeddings
from rushes.engines.wan.schedules import schedule
from rushes.errors import EngineError, MediaError
from support.tiny_diffusers import KINDS, Kind
from support.wan_running import SMALL, fresh, picture, stock, stock_latents

Tiny = Callable[[Kind], Path]
ONE_EXPERT: tuple[Kind, ...] = ("text", "image", "vace")


def but(plan: Plan, **changed: Any) -> Plan:
    return msgspec.structs.replace(plan, **changed)


def denoise(loaded: Any, plan: Plan, stop: Stop | None = None, on_step: Any = lambda *_: None) -> torch.Tensor:
    return Denoiser(loaded, Embeddings()).run(plan, stop or Stop(), on_step)


@pytest.fixture
def start(tmp_path: Path) -> Path:
    return picture(tmp_path / "start.png", 64, 48, seed=1)


@pytest.fixture
def end(tmp_path: Path) -> Path:
    return picture(tmp_path / "end.png", 64, 48, seed=2)


@pytest.fixture
def plans(start: Path, end: Path) -> Callable[[Kind], Plan]:
    """A plan with what each kind of weights needs."""

    def made(kind: Kind) -> Plan:
        if kind == "image":
            return but(SMALL, start_image=start)
        if kind == "image-two-experts":
            return but(SMALL, start_image=start, end_image=end)
        if kind.startswith("vace"):
            return but(SMALL, reference_images=(start,))
        return SMALL

    return made


def given(plan: Plan) -> dict[str, Any]:
    """The plan's pictures, which have the padded size already, as a user of the stock pipeline gives them."""
    found: dict[str, Any] = {}
    if plan.start_image is not None:
        found["image"] = Image.open(plan.start_image)
    if plan.end_image is not None:
        found["last_image"] = Image.open(plan.end_image)
    if plan.reference_images:
        found["reference_images"] = [Image.open(path) for path in plan.reference_images]
    return found


# -- the same as stock ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_those_of_the_stock_pipeline_bit_for_bit(
    kind: Kind, tiny: Tiny, plans: Callable[[Kind], Plan]
) -> None:
    plan = plans(kind)
    expected = stock_latents(tiny(kind), plan, **given(plan))[:, :, len(plan.reference_images) :]

    steps = []
    made = denoise(fresh(tiny(kind)), plan, on_step=lambda *told: steps.append(told))

    assert (1, 16, 3, 6, 8) == made.shape
    assert torch.equal(expected, made)
    assert [(1, 3), (2, 3), (3, 3)] == [told[:2] for told in steps]
    assert {made.shape} == {told[2].shape for told in steps}
    assert torch.allclose(made, steps[-1][2], atol=1e-4)  # the last step arrives where it aims


@pytest.mark.parametrize("kind", ["image", "vace"])
def test_nothing_but_the_copy_of_a_job_is_written_to(
    kind: Kind, tiny: Tiny, plans: Callable[[Kind], Plan]
) -> None:
    loaded = fresh(tiny(kind))
    before = dict(loaded.pipe.__dict__)

    denoise(loaded, plans(kind))

    assert before == loaded.pipe.__dict__
    assert not any(module._forward_pre_hooks for module in loaded.pipe.transformer.modules())


def test_one_step_and_one_frame(tiny: Tiny) -> None:
    plan = but(SMALL, frames=1, generated_frames=1, fps=None, steps=1, kind="image")
    loaded = fresh(tiny("text-two-experts"))

    made = denoise(loaded, plan)

    assert (1, 16, 1, 6, 8) == made.shape
    assert torch.equal(stock_latents(tiny("text-two-experts"), plan), made)


# -- seeds and samplers ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("sampler", ["unipc", "euler", "lcm"])
def test_the_seed_decides_and_nothing_else(sampler: str, tiny: Tiny) -> None:
    loaded = fresh(tiny("text"))
    plan = but(SMALL, scheduler=sampler)

    torch.manual_seed(1)
    first = denoise(loaded, plan)
    torch.manual_seed(2)
    second = denoise(loaded, plan)

    assert torch.equal(first, second)
    assert not torch.equal(first, denoise(loaded, but(plan, seed=2**64 - 1)))
    assert first.isfinite().all()


def test_sampler_and_shift_do_not_reach_the_next_job(tiny: Tiny) -> None:
    loaded = fresh(tiny("text"))
    one = denoise(loaded, SMALL)

    others = [
        denoise(loaded, but(SMALL, **changed))
        for changed in ({"shift": 2.0}, {"scheduler": "euler"}, {"scheduler": "lcm"}, {"steps": 2})
    ]
    again = denoise(loaded, SMALL)

    assert torch.equal(one, again)
    for left, right in pairwise([one, *others]):
        assert not torch.equal(left, right)
    assert torch.equal(stock_latents(tiny("text"), but(SMALL, shift=2.0)), others[0])


@pytest.mark.parametrize("sampler", ["euler", "lcm"])
def test_few_steps_divide_the_way_evenly(sampler: str) -> None:
    shifted = [5 * level / (1 + 4 * level) for level in (1.0, 0.75, 0.5, 0.25, 0.0)]

    made = schedule({}, but(SMALL, scheduler=sampler, shift=5.0), torch.Generator())
    made.set_timesteps(4, device="cpu")

    assert shifted == pytest.approx(made.sigmas.tolist())
    assert [1000 * level for level in shifted[:-1]] == pytest.approx(made.timesteps.tolist(), rel=1e-5)


def test_unipc_for_weights_that_come_with_another_sampler(tiny: Tiny) -> None:
    own = fresh(tiny("text")).pipe.scheduler.config
    plan = but(SMALL, shift=3.0)

    made = schedule({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 9.0}, plan, torch.Generator())
    expected = UniPCMultistepScheduler.from_config(own, flow_shift=3.0)
    made.set_timesteps(5)
    expected.set_timesteps(5)

    assert torch.equal(expected.sigmas, made.sigmas)
    assert expected.config.solver_order == made.config.solver_order


def test_a_sampler_that_there_is_not() -> None:
    with pytest.raises(EngineError, match="unipc, euler or lcm") as caught:
        schedule({}, but(SMALL, scheduler="magic"), torch.Generator())
    assert "scheduler_unusable" == caught.value.reason


# -- guidance -------------------------------------------------------------------------------------------------
def by_hand(folder: Path, plan: Plan) -> torch.Tensor:
    """Text to video, written out: classifier-free guidance with the scale that the expert in charge has."""
    pipe = stock(folder)
    scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=plan.shift)
    scheduler.set_timesteps(plan.steps)
    boundary = 1000 * (pipe.config.boundary_ratio or 0)
    with torch.no_grad():
        prompt, negative = pipe.encode_prompt(plan.prompt, plan.negative_prompt, max_sequence_length=512)
        latents = torch.randn(1, 16, 3, 6, 8, generator=torch.Generator().manual_seed(plan.seed))
        for time in scheduler.timesteps:
            high = time >= boundary
            expert, scale = (pipe.transformer, plan.guidance) if high else (pipe.transformer_2, plan.guidance_2)
            with_prompt = expert(latents, time[None], prompt).sample
            without = expert(latents, time[None], negative).sample
            guided = with_prompt if scale == 1 else without + scale * (with_prompt - without)
            latents = scheduler.step(guided, time, latents).prev_sample
    return latents


def calls(expert: Any) -> list[float]:
    """The times for which a transformer is asked, from now on."""
    asked: list[float] = []
    expert.register_forward_pre_hook(
        lambda _module, _args, named: asked.append(named["timestep"][0].item()), with_kwargs=True
    )
    return asked


@pytest.mark.parametrize("guidance", [0.0, 0.6, 1.0, 1.0001, 4.0])
def test_guidance_means_what_it_says(guidance: float, tiny: Tiny) -> None:
    plan = but(SMALL, guidance=guidance)
    loaded = fresh(tiny("text"))
    asked = calls(loaded.pipe.transformer)

    made = denoise(loaded, plan)

    assert torch.equal(by_hand(tiny("text"), plan), made)
    assert plan.steps * (1 if guidance == 1 else 2) == len(asked)


@pytest.mark.parametrize("guidance", [(4.0, 3.0), (0.6, 2.0), (1.0, 3.0), (3.0, 1.0), (1.0, 1.0), (0.0, 0.6)])
def test_each_expert_has_its_guidance_and_its_part_of_the_way(
    guidance: tuple[float, float], tiny: Tiny
) -> None:
    plan = but(SMALL, guidance=guidance[0], guidance_2=guidance[1], steps=5)
    loaded = fresh(tiny("text-two-experts"))
    high, low = calls(loaded.pipe.transformer), calls(loaded.pipe.transformer_2)

    made = denoise(loaded, plan)

    assert torch.equal(by_hand(tiny("text-two-experts"), plan), made)
    assert {True} == {time >= 875 for time in high}
    assert {True} == {time < 875 for time in low}
    assert len(set(high)) * (1 if guidance[0] == 1 else 2) == len(high)
    assert len(set(low)) * (1 if guidance[1] == 1 else 2) == len(low)


def test_guidance_is_off_at_1_for_every_kind(tiny: Tiny, plans: Callable[[Kind], Plan]) -> None:
    for kind in ONE_EXPERT:
        loaded, plan = fresh(tiny(kind)), plans(kind)
        one, other = but(plan, guidance=1.0), but(plan, guidance=1.0, negative_prompt="a dog")

        assert torch.equal(denoise(loaded, one), denoise(loaded, other)), kind
        low = but(one, guidance=0.6)
        assert not torch.equal(denoise(loaded, low), denoise(loaded, but(low, negative_prompt="a dog"))), kind


# -- pictures -------------------------------------------------------------------------------------------------
def test_pictures_cover_the_padded_size(tiny: Tiny, tmp_path: Path) -> None:
    wide = picture(tmp_path / "wide.png", 200, 60)
    cut = (
        Image.open(wide).resize((160, 48), Image.Resampling.LANCZOS, box=(0, 0, 200, 60)).crop((48, 0, 112, 48))
    )
    cut.save(tmp_path / "cut.png")
    grey, sharp = tmp_path / "grey.png", tmp_path / "alpha.png"
    Image.open(wide).convert("L").save(grey)
    Image.open(wide).convert("RGBA").save(sharp)
    loaded = fresh(tiny("image-two-experts"))

    made = {
        path.name: denoise(loaded, but(SMALL, start_image=path, end_image=wide))
        for path in (wide, tmp_path / "cut.png", grey, sharp)
    }

    assert torch.allclose(made["cut.png"], made["wide.png"], atol=0.02)
    assert torch.equal(made["wide.png"], made["alpha.png"])
    assert not torch.allclose(made["wide.png"], made["grey.png"], atol=0.02)


def test_the_end_image_is_heeded(tiny: Tiny, start: Path, end: Path) -> None:
    loaded = fresh(tiny("image-two-experts"))
    alone = but(SMALL, start_image=start)

    made = [denoise(loaded, but(alone, end_image=path)) for path in (None, start, end)]

    assert torch.equal(stock_latents(tiny("image-two-experts"), alone, image=Image.open(start)), made[0])
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[1], made[2])


def test_references_of_any_size_and_number(tiny: Tiny, tmp_path: Path) -> None:
    tall, wide = picture(tmp_path / "tall.png", 50, 120), picture(tmp_path / "wide.png", 300, 70, seed=3)
    plan = but(SMALL, reference_images=(tall, wide))

    made = denoise(fresh(tiny("vace")), plan)

    assert torch.equal(stock_latents(tiny("vace"), plan, **given(plan))[:, :, 2:], made)


def test_more_references_than_latent_frames(tiny: Tiny, start: Path, end: Path) -> None:
    plan = but(SMALL, frames=1, generated_frames=1, reference_images=(start, end))

    made = denoise(fresh(tiny("vace-two-experts")), plan)

    assert (1, 16, 1, 6, 8) == made.shape


@pytest.mark.parametrize(
    ("kind", "changed", "reason"),
    [
        ("text", {"start_image": Path("a.png")}, "start_image_unusable"),
        ("text", {"reference_images": (Path("a.png"),)}, "reference_image_unusable"),
        ("image", {}, "start_image_unusable"),
        ("image", {"start_image": Path("a.png"), "end_image": Path("a.png")}, "end_image_unusable"),
        ("image", {"start_image": Path("a.png"), "source_video": Path("a.mp4")}, "source_video_unusable"),
        (
            "image-two-experts",
            {"start_image": Path("a.png"), "end_image": Path("a.png"), "generated_frames": 1},
            "end_image_unusable",
        ),
        ("text", {"padded_width": 72}, "size_unusable"),
        ("text", {"generated_frames": 10}, "frames_unusable"),
    ],
)
def test_what_the_weights_do_not_take_is_refused(
    kind: Kind, changed: dict[str, Any], reason: str, tiny: Tiny
) -> None:
    loaded = fresh(tiny(kind))
    asked = calls(loaded.pipe.transformer)

    with pytest.raises(EngineError) as caught:
        denoise(loaded, but(SMALL, **changed))

    assert reason == caught.value.reason
    assert [] == asked


def test_a_picture_that_is_none(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(MediaError) as caught:
        denoise(fresh(tiny("image")), but(SMALL, start_image=tmp_path / "text.png"))
    assert "input_not_media" == caught.value.reason
