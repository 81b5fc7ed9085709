"""The samplers with predictions in 16 bits, as a card gives them; `test_wan_denoise.py` has them beside stock."""

from typing import Any

import msgspec
import pytest

pytest.importorskip("diffusers", reason="needs the extra: pip install 'rushes[wan]'")

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from rushes.engines.wan.schedules import schedule
from support.wan_running import SMALL

STEPS = 8
SIZE = (1, 16, 3, 8, 8)


def drawn(seed: int) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def sampler(name: str) -> Any:
    plan = msgspec.structs.replace(SMALL, scheduler=name, steps=STEPS)
    made = schedule({"num_train_timesteps": 1000}, plan, torch.Generator().manual_seed(3))
    made.set_timesteps(STEPS, device="cpu")
    return made


def walked(made: Any, kind: torch.dtype) -> list[torch.Tensor]:
    """The latents after each step, by a model that knows the answer and tells it rounded to bfloat16, as ``kind``."""
    clean, latents, found = drawn(1), drawn(2), []
    for time in made.timesteps:
        told = ((latents.float() - clean) / (time / 1000)).to(torch.bfloat16).to(kind)
        latents = made.step(told, time, latents, return_dict=False)[0]
        found.append(latents)
    return found


@pytest.mark.parametrize("name", ["unipc", "euler", "lcm"])
def test_latents_are_not_rounded_to_the_precision_of_the_predictions(name: str) -> None:
    made = sampler(name)
    latents = walked(made, torch.bfloat16)

    assert {torch.float32} == {one.dtype for one in latents}
    assert torch.float32 == made.clean.dtype
    assert not torch.equal(latents[2], latents[2].to(torch.bfloat16).float())


@pytest.mark.parametrize("name", ["euler", "lcm"])
def test_the_type_in_which_a_prediction_comes_changes_nothing(name: str) -> None:
    for one, other in zip(
        walked(sampler(name), torch.bfloat16), walked(sampler(name), torch.float32), strict=True
    ):
        assert torch.equal(one, other)


def test_stock_would_round_them() -> None:
    """What is left out here; should diffusers do so too one day, the point in `schedules.py` is of no more use."""
    made = FlowMatchEulerDiscreteScheduler(shift=5.0)
    made.set_timesteps(STEPS)
    assert {torch.bfloat16} == {one.dtype for one in walked(made, torch.bfloat16)}
