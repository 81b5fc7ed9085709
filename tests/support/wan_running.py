"""What the tests of the Wan engine's denoising share: a tiny model on the CPU, a plan for it, and the stock way."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rushes.engines.wan.plan import Plan

SMALL = Plan(
    width=64,
    height=48,
    padded_width=64,
    padded_height=48,
    left=0,
    top=0,
    frames=9,
    generated_frames=9,
    fps=16.0,
    seed=7,
    steps=3,
    guidance=3.5,
    guidance_2=2.5,
    shift=5.0,
    scheduler="unipc",
    prompt="a cat in the street",
    negative_prompt="a lamp",
    start_image=None,
    end_image=None,
    reference_images=(),
    source_video=None,
    kind="video",
    loras=(),
)


def fresh(folder: Path) -> Any:
    """A model that was just loaded."""
    from rushes.catalog.wan import WanModel
    from rushes.engines.wan.load import load
    from rushes.engines.wan.weights import Local

    local = Local(folder=folder, loras=(), turbo_loras=(), bytes=0)
    return load(local, WanModel(weights=str(folder)), turbo=False, device="cpu", tell=lambda _: None)


def stock(folder: Path) -> Any:
    """The pipeline as a user of diffusers has it."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_latents(folder: Path, plan: Plan, **given: Any) -> Any:
    """What the stock pipeline's own call makes of the plan's numbers and of pictures that are ``given``."""
    import torch
    from diffusers import UniPCMultistepScheduler

    pipe = stock(folder)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=plan.shift)
    made = pipe(
        prompt=plan.prompt,
        negative_prompt=plan.negative_prompt,
        height=plan.padded_height,
        width=plan.padded_width,
        num_frames=plan.generated_frames,
        num_inference_steps=plan.steps,
        guidance_scale=plan.guidance,
        guidance_scale_2=plan.guidance_2 if pipe.config.boundary_ratio is not None else None,
        generator=torch.Generator().manual_seed(plan.seed),
        output_type="latent",
        max_sequence_length=512,
        **given,
    )
    return made.frames


def picture(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """A PNG of colours that change everywhere."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path
