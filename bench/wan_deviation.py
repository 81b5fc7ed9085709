"""By how much the speed profiles change what a Wan model makes: PSNR and SSIM against `exact`, on equal seeds.

    python bench/wan_deviation.py FOLDER --prompt "…" [--image A.png [--last-image B.png]] --output FILE.md

FOLDER has a model in the format of diffusers. Each profile loads it anew and generates the same videos, and each is
compared with `exact`'s of the same seed; `exact` is compared with the stock pipeline's own. `turbo` is measured where
--turbo-lora names its LoRA; it goes another way in other steps, so its videos are others, not worse ones by as much.
For VACE give --image as the reference. Only real weights tell anything.
"""

import argparse
import copy
import gc
import math
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from gpu import facts
from report import Row, markdown
from rushes.catalog.wan import WanLora, WanModel
from rushes.engines.wan import decode, profiles
from rushes.engines.wan.denoise import Denoiser, Stop
from rushes.engines.wan.load import load
from rushes.engines.wan.plan import Plan, round_up, whole_latents
from rushes.engines.wan.prompts import TOKENS, Embeddings
from rushes.engines.wan.weights import Local
from wan_similarity import Frame, psnr, ssim

Videos = list[list[Frame]]


def main() -> None:
    options = _options()
    torch.manual_seed(0)
    plans = {"exact": _plan(options), "fast": _plan(options), "turbo": _plan(options, turbo=True)}
    rows: list[Row] = []
    exact, words = _generated(options, "exact", plans["exact"])
    rows += _compared(f"exact against stock ({words})", _stock(options, plans["exact"]), exact, options)
    for profile in ("fast", "turbo"):
        if profile == "turbo" and not options.turbo_lora:
            rows.append(Row(profile, "against exact", "not measured: --turbo-lora names no file"))
            continue
        made, words = _generated(options, profile, plans[profile])
        rows += _compared(f"{profile} against exact ({words})", exact, made, options)
    text = markdown(rows, " ".join(["python", "bench/wan_deviation.py", *sys.argv[1:]]), facts(options.device))
    print("\n" + text)
    if options.output:
        options.output.write_text(text, "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--last-image", type=Path)
    parser.add_argument("--size", default="832x480", help="pixels, as 832x480")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--shift", type=float, default=5.0)
    parser.add_argument(
        "--turbo-lora", type=Path, action="append", default=[], help="may be given several times"
    )
    parser.add_argument("--turbo-steps", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def _plan(options: argparse.Namespace, *, turbo: bool = False) -> Plan:
    """The pictures' roles are set when the model's kind is known."""
    width, height = (int(side) for side in options.size.split("x"))
    padded = round_up(width), round_up(height)
    guidance = 1.0 if turbo else options.guidance
    return Plan(
        width=width,
        height=height,
        padded_width=padded[0],
        padded_height=padded[1],
        left=(padded[0] - width) // 2,
        top=(padded[1] - height) // 2,
        frames=options.frames,
        generated_frames=whole_latents(options.frames),
        fps=16.0,
        seed=0,
        steps=options.turbo_steps if turbo else options.steps,
        guidance=guidance,
        guidance_2=guidance,
        shift=options.shift,
        scheduler="euler" if turbo else "unipc",
        prompt=options.prompt,
        negative_prompt=options.negative_prompt,
        start_image=None,
        end_image=None,
        reference_images=(),
        source_video=None,
        kind="video",
        loras=(),
    )


def _generated(options: argparse.Namespace, profile: str, plan: Plan) -> tuple[Videos, str]:
    """The videos of all seeds, and what the profile came to."""
    loaded = _loaded(options, turbo=profile == "turbo")
    plan = _with_pictures(loaded.kind, options, plan)
    applied = profiles.apply(loaded, profile)
    applied.begin(plan.steps)
    denoiser = Denoiser(loaded, Embeddings())
    videos = []
    for seed in range(options.seeds):
        one = msgspec.structs.replace(plan, seed=seed)
        latents = denoiser.run(one, Stop(), lambda *_: None)
        videos.append(_decoded(loaded, latents, one))
        print(f"{profile}: seed {seed} of {options.seeds}", file=sys.stderr, flush=True)
    del loaded, denoiser
    _release()
    return videos, "; ".join(applied)


def _stock(options: argparse.Namespace, plan: Plan) -> Videos:
    """The pipeline's own call with its own prompt; ours is only what comes after the latents."""
    from rushes.engines.wan import pictures
    from rushes.engines.wan.schedules import schedule

    loaded = _loaded(options, turbo=False)
    plan = _with_pictures(loaded.kind, options, plan)
    given: dict[str, Any] = {}
    if plan.start_image is not None:
        given["image"] = pictures.fitted(plan.start_image, plan)
        given["last_image"] = pictures.fitted(plan.end_image, plan) if plan.end_image else None
    if loaded.kind == "vace":
        given = {"reference_images": [pictures.reference(path) for path in plan.reference_images] or None}
        given |= pictures.conditions(plan)
    videos = []
    for seed in range(options.seeds):
        generator = torch.Generator().manual_seed(seed)
        pipe = copy.copy(loaded.pipe)
        pipe.scheduler = schedule(loaded.pipe.scheduler.config, plan, generator)
        latents = pipe(
            prompt=plan.prompt,
            negative_prompt=plan.negative_prompt,
            height=plan.padded_height,
            width=plan.padded_width,
            num_frames=plan.generated_frames,
            num_inference_steps=plan.steps,
            guidance_scale=plan.guidance,
            generator=generator,
            output_type="latent",
            return_dict=False,
            max_sequence_length=TOKENS,
            **given,
        )[0][:, :, len(plan.reference_images) :]
        videos.append(_decoded(loaded, latents, plan))
        print(f"stock: seed {seed} of {options.seeds}", file=sys.stderr, flush=True)
    del loaded, pipe
    _release()
    return videos


def _loaded(options: argparse.Namespace, *, turbo: bool) -> Any:
    loras = tuple((path, WanLora(source=str(path.parent), path=path.name)) for path in options.turbo_lora)
    local = Local(folder=options.folder, loras=(), turbo_loras=loras, bytes=0)
    wan = WanModel(weights=str(options.folder))
    return load(local, wan, turbo=turbo, device=options.device, tell=lambda _: None)


def _with_pictures(kind: str, options: argparse.Namespace, plan: Plan) -> Plan:
    if kind == "vace":
        references = (options.image,) if options.image else ()
        return msgspec.structs.replace(plan, reference_images=references)
    return msgspec.structs.replace(plan, start_image=options.image, end_image=options.last_image)


def _decoded(loaded: Any, latents: Any, plan: Plan) -> list[Frame]:
    with closing(decode.frames(loaded, latents, plan, Stop())) as frames:
        return [np.array(frame) for frame in frames]


def _compared(what: str, one: Videos, other: Videos, options: argparse.Namespace) -> list[Row]:
    signal = [psnr(a, b) for a, b in zip(one, other, strict=True)]
    alike = [ssim(a, b) for a, b in zip(one, other, strict=True)]
    name = what.partition(" ")[0]
    value = f"PSNR {min(signal):.2f} to {max(signal):.2f} dB, SSIM {min(alike):.4f} to {max(alike):.4f}"
    if min(signal) == math.inf:
        value = "the same bytes"
    return [Row(name, f"{what}; seeds: {options.seeds}", value)]


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
