"""The measurements of `gpu.py`: each is given a model and adds its rows."""

import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from gpu_floor import seconds
from gpu_models import WORDS, Case, build
from report import Bench, Row
from rushes.engines.wan import attention as kernels
from rushes.engines.wan import decode, profiles
from rushes.engines.wan.denoise import Denoiser, Stop
from rushes.engines.wan.plan import Plan
from rushes.engines.wan.prompts import TOKENS, Embeddings
from rushes.media.encode import VideoWriter

PROMPT = " ".join(WORDS)
GB = 1e9


@dataclass
class Run:
    """What all parts share, and the numbers for the JSON file."""

    bench: Bench
    device: str
    steps: int
    """Measured of each profile; 0: as many as the model's default."""
    until: float
    """On the monotonic clock: later than that no part begins."""
    judged: bool
    """Whether the targets mean anything: the sizes are whole, and the card is there."""
    numbers: dict[str, Any] = field(default_factory=dict)

    def add(self, group: str, what: str, value: str, target: str = "", *, ok: bool | None = None) -> None:
        self.bench.add(Row(group, what, value, target, ok) if self.judged else Row(group, what, value))

    def late(self, group: str, what: str) -> bool:
        if time.monotonic() < self.until:
            return False
        self.add(group, what, "not measured: no time left, see --minutes")
        return True


class Watch:
    """Seconds since it was made, the card's work included."""

    def __init__(self, device: str) -> None:
        self._card = device.startswith("cuda")
        if self._card:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._began = time.perf_counter()
        self.marks: list[float] = []

    def seconds(self) -> float:
        if self._card:
            torch.cuda.synchronize()
        return time.perf_counter() - self._began

    def mark(self, *_: Any) -> None:
        self.marks.append(self.seconds())

    def peak(self) -> float | None:
        """Bytes of the card's memory at most since it was made."""
        return float(torch.cuda.max_memory_allocated()) if self._card else None

    def step(self) -> tuple[float, float]:
        """The median and the longest step, of those after the first."""
        each = [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]
        return median(each), max(each)


def generate(run: Run, case: Case) -> None:
    """Stock and all of the case's profiles, in this order, on the same weights."""
    watch = Watch(run.device)
    loaded = build(case, run.device)
    numbers = run.numbers.setdefault(case.name, {})
    parameters = sum(p.numel() for p in loaded.experts[0].parameters()) / GB
    run.add(case.name, "made on the device", f"{watch.seconds():.1f} s, {case.experts} x {parameters:.2f}B")
    floor = seconds(case.sizes, case.work)
    numbers |= {"parameters_billions": parameters, "floor_seconds": floor, "default_steps": case.work.steps}
    run.add(case.name, f"floor of the denoising loop: {_said(case)}", f"{floor:.1f} s")
    embeddings = Embeddings()
    numbers["text_seconds"] = _text(run, case, loaded, embeddings)
    with tempfile.TemporaryDirectory() as scratch:
        plan = _plan(case, Path(scratch), run.steps or case.work.steps)
        numbers["stock"] = stock = _stock(run, case, loaded, plan, embeddings, floor)
        latents = None
        for profile in case.profiles:
            if not run.late(case.name, profile):
                found, latents = _profile(run, case, loaded, plan, embeddings, profile)
                numbers[profile] = found
                _judge(run, case, profile, found, floor, stock)
        if latents is not None and not run.late(case.name, "decode"):
            numbers["after"] = after = _after(run, case, loaded, plan, latents, Path(scratch))
            if "turbo" in numbers:
                _whole(run, case, numbers, after)
    del loaded
    _release()


def _said(case: Case) -> str:
    work = case.work
    references = f" and {work.references} reference" if work.references else ""
    guided = "with CFG" if work.guided else "without CFG"
    return f"{work.width}x{work.height}, {work.frames} frames{references}, {work.steps} steps {guided}"


def _plan(case: Case, folder: Path, steps: int) -> Plan:
    pictures = []
    for number in range(2):
        path = folder / f"{number}.png"
        draw = np.random.default_rng(number)
        rows = draw.integers(0, 256, (case.work.height, case.work.width, 3), np.uint8)
        Image.fromarray(rows).save(path)
        pictures.append(path)
    image = case.kind == "image"
    return Plan(
        width=case.work.width,
        height=case.work.height,
        padded_width=case.work.width,
        padded_height=case.work.height,
        left=0,
        top=0,
        frames=case.work.frames,
        generated_frames=case.work.frames,
        fps=16.0,
        seed=1,
        steps=steps,
        guidance=case.guidance,
        guidance_2=case.guidance,
        shift=case.shift,
        scheduler="unipc",
        prompt=PROMPT,
        negative_prompt="",
        start_image=pictures[0] if image else None,
        # Wan 2.1's picture tokens are for one picture
        end_image=pictures[1] if image and not case.clip else None,
        reference_images=tuple(pictures[: case.work.references]),
        source_video=None,
        kind="video",
        loras=(),
    )


def _text(run: Run, case: Case, loaded: Any, embeddings: Embeddings) -> float:
    negative = "" if case.work.guided else None
    Embeddings().get(loaded, "a", None)  # the card's libraries load their kernels
    watch = Watch(run.device)
    embeddings.get(loaded, PROMPT, negative)
    cold = watch.seconds()
    watch = Watch(run.device)
    embeddings.get(loaded, PROMPT, negative)
    run.add(case.name, "text encoding; of a prompt that was seen", f"{cold:.3f} s; {watch.seconds():.4f} s")
    return cold


def _stock(
    run: Run, case: Case, loaded: Any, plan: Plan, embeddings: Embeddings, floor: float
) -> dict[str, Any]:
    """diffusers as its users have it: the pipeline's own call, its own attention, nothing compiled."""
    prompt, negative = embeddings.get(loaded, plan.prompt, "" if case.work.guided else None)
    given: dict[str, Any] = {}
    if plan.start_image is not None:
        given["image"] = Image.open(plan.start_image)
        given["last_image"] = Image.open(plan.end_image) if plan.end_image else None
    if plan.reference_images:
        given["reference_images"] = [Image.open(path) for path in plan.reference_images]
    watch = Watch(run.device)

    def ended(_pipe: Any, _index: int, _time: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        watch.mark()
        return {}

    loaded.pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        height=plan.padded_height,
        width=plan.padded_width,
        num_frames=plan.generated_frames,
        num_inference_steps=plan.steps,
        guidance_scale=plan.guidance,
        generator=torch.Generator().manual_seed(plan.seed),
        output_type="latent",
        max_sequence_length=TOKENS,
        callback_on_step_end=ended,
        **given,
    )
    found = _found(case, watch)
    over = f", {found['loop_seconds'] / floor:.2f}x the floor" if run.judged else ""
    value = _loop(case, found) + over + _peak(found)
    run.add(case.name, "stock diffusers: denoising loop", value)
    return found


def _found(case: Case, watch: Watch) -> dict[str, Any]:
    step, longest = watch.step()
    return {
        "step_seconds": step,
        "longest_step_seconds": longest,
        "steps_measured": len(watch.marks) - 1,
        "before_first_step_seconds": watch.marks[0] - step,
        "loop_seconds": step * case.work.steps,
        "peak_bytes": watch.peak(),
    }


def _loop(case: Case, found: dict[str, Any]) -> str:
    measured, steps = found["steps_measured"], case.work.steps
    word = "" if measured == steps - 1 else "extrapolated: "
    each = f"{found['step_seconds']:.3f} s, median of {measured}"
    return f"{found['loop_seconds']:.2f} s ({word}{steps} steps at {each})"


def _peak(found: dict[str, Any]) -> str:
    return "" if found["peak_bytes"] is None else f", peak {found['peak_bytes'] / GB:.1f} GB"


def _profile(
    run: Run, case: Case, loaded: Any, plan: Plan, embeddings: Embeddings, profile: str
) -> tuple[dict[str, Any], Any]:
    """Two requests after the profile was applied; the second is what a warm model does."""
    watch = Watch(run.device)
    applied = profiles.apply(loaded, profile, tell=run.bench.say)
    setting_up = watch.seconds()
    run.add(
        case.name,
        f"{profile}: set up once, when the model is loaded",
        f"{setting_up:.1f} s: {'; '.join(applied)}",
    )
    # Whether a block may be skipped depends on what real weights make of a video; random ones would tell a tale.
    requests = []
    for _ in range(2):
        watch = Watch(run.device)
        latents = Denoiser(loaded, embeddings).run(plan, Stop(), watch.mark)
        requests.append(_found(case, watch))
    first, second = requests
    before = [request["before_first_step_seconds"] for request in requests]
    value = f"{before[1]:.2f} s before its steps (the first: {before[0]:.2f} s)"
    steps = f"; longest step {second['longest_step_seconds'] / second['step_seconds']:.2f}x the median"
    run.add(case.name, f"{profile}: second request of the warm model", value + steps)
    deviations = ", ".join(
        f"{part.name} {part.deviation:.2g}" for part in applied.parts if part.deviation is not None
    )
    run.add(
        case.name,
        f"{profile}: deviation of a prediction from stock's, after each part",
        deviations or "none was tried",
    )
    parts = {
        part.name: {"done": part.done, "words": part.words, "deviation": part.deviation}
        for part in applied.parts
    }
    return second | {"first_request": first, "setting_up_seconds": setting_up, "parts": parts}, latents


def _judge(
    run: Run, case: Case, profile: str, found: dict[str, Any], floor: float, stock: dict[str, Any]
) -> None:
    over, faster = found["loop_seconds"] / floor, stock["loop_seconds"] / found["loop_seconds"]
    found |= {"over_floor": over, "faster_than_stock": faster}
    value = (
        _loop(case, found)
        + (f", {over:.2f}x the floor, {faster:.2f}x faster than stock" if run.judged else "")
        + _peak(found)
    )
    target, ok = {
        "exact": ("<= 1.25x floor", over <= 1.25),
        "fast": (">= 1.6x stock", faster >= 1.6),
    }.get(profile, ("", None))
    cache = ", without its cache" if profile == "fast" and case.kind != "vace" else ""
    run.add(case.name, f"{profile}: denoising loop{cache}", value, target, ok=ok)


def _after(run: Run, case: Case, loaded: Any, plan: Plan, latents: Any, scratch: Path) -> dict[str, Any]:
    """The VAE and the encoder, apart and, as the engine has them, together."""

    def decoded(take: Callable[[Any], None]) -> Watch:
        watch = Watch(run.device)
        with closing(decode.frames(loaded, latents, plan, Stop())) as frames:
            for frame in frames:
                take(frame)
        watch.mark()
        return watch

    decoded(lambda _frame: None)  # the card's libraries choose their kernels
    kept: list[Any] = []
    alone = decoded(lambda frame: kept.append(frame.copy()))
    began = time.perf_counter()
    with VideoWriter(scratch / "a.mp4", plan.width, plan.height, 16.0) as writer:
        for frame in kept:
            writer.write(frame)
    encoding = time.perf_counter() - began
    began = time.perf_counter()
    with VideoWriter(scratch / "b.mp4", plan.width, plan.height, 16.0) as writer:
        decoded(writer.write)
    both = time.perf_counter() - began
    peak = alone.peak()
    memory = "" if peak is None else f", peak {peak / GB:.1f} GB"
    run.add(case.name, f"VAE decode, {plan.frames} frames", f"{alone.marks[0]:.2f} s{memory}")
    run.add(
        case.name,
        "encoding to MP4 (random weights make noise, which is the slowest there is)",
        f"{encoding:.2f} s",
    )
    run.add(case.name, "decode and encoding together", f"{both:.2f} s")
    return {
        "decode_seconds": alone.marks[0],
        "encode_seconds": encoding,
        "together_seconds": both,
        "peak_bytes": peak,
    }


def _whole(run: Run, case: Case, numbers: dict[str, Any], after: dict[str, Any]) -> None:
    turbo = numbers["turbo"]
    parts = {
        "text": numbers["text_seconds"],
        "pictures": turbo["before_first_step_seconds"],
        "steps": turbo["loop_seconds"],
        "decode and encoding": after["together_seconds"],
    }
    numbers["request_seconds"] = total = sum(parts.values())
    words = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
    run.add(
        case.name,
        "turbo: a whole request with a new prompt",
        f"{total:.1f} s ({words})",
        "<= 14 s",
        ok=total <= 14,
    )


def attention(run: Run, cases: Sequence[Case]) -> None:
    """Each kernel that is there, at the sizes of the cases: what the order in `attention.py` rests on."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    place = torch.device(run.device)
    card = place.type == "cuda"
    capability = torch.cuda.get_device_capability(place) if card else None
    for case in cases:
        sizes, tokens = case.sizes, case.work.tokens
        heads = case.transformer["num_attention_heads"]
        shape = (1, tokens, heads, sizes.width // heads)
        given = [torch.randn(shape, device=place, dtype=torch.bfloat16) for _ in range(3)]
        for kernel in ("native", *kernels.fast_kernels(capability)):
            what = f"attention of {tokens} tokens with {kernel}"
            try:
                each = []
                for _ in range(4):
                    watch = Watch(run.device)
                    _attend(dispatch_attention_fn, kernel, given)
                    each.append(watch.seconds())
            except Exception as error:
                run.add(case.name, what, f"not here: {' '.join(str(error).split())[:120]}")
                continue
            speed = 4 * tokens**2 * sizes.width / median(each[1:])
            run.numbers.setdefault("attention", {})[f"{case.name} {kernel}"] = speed
            run.add(case.name, what, f"{median(each[1:]) * 1e3:.2f} ms, {speed / 1e12:.3g} TFLOP/s")


def _attend(dispatch: Any, kernel: str, given: list[Any]) -> None:
    from diffusers.models.attention_dispatch import attention_backend

    cudnn = kernel == kernels.CUDNN
    if cudnn:
        kernels.set_attention((), kernel, torch.backends.cudnn.version())
    try:
        with torch.no_grad(), attention_backend("native" if cudnn else kernel):
            dispatch(*given)
    finally:
        kernels.reset_attention(())


def loading(run: Run, case: Case) -> None:
    """From files to a model that is ready, by the engine's own loader. The files lie in the page cache."""
    from rushes.catalog.wan import WanModel
    from rushes.engines.wan.load import load
    from rushes.engines.wan.weights import Local

    loaded = build(case, run.device)
    parts = [
        *loaded.experts,
        loaded.pipe.text_encoder,
        loaded.pipe.vae,
        getattr(loaded.pipe, "image_encoder", None),
    ]
    bytes_ = sum(p.numel() * p.element_size() for part in parts if part is not None for p in part.parameters())
    with tempfile.TemporaryDirectory() as scratch:
        if shutil.disk_usage(scratch).free < 1.1 * bytes_:
            run.add("load", case.name, f"not measured: {scratch} has no room for {bytes_ / GB:.0f} GB")
            return
        loaded.pipe.save_pretrained(scratch)
        _name_as_on_the_hub(Path(scratch) / "model_index.json")
        del loaded, parts
        _release()
        watch = Watch(run.device)
        load(
            Local(folder=Path(scratch), loras=(), turbo_loras=(), bytes=bytes_),
            WanModel(weights=scratch),
            turbo=False,
            device=run.device,
            tell=run.bench.say,
        )
        took = watch.seconds()
    run.numbers["load"] = {"seconds": took, "bytes": bytes_}
    run.add(
        "load",
        f"{bytes_ / GB:.1f} GB of weights, from the page cache",
        f"{took:.1f} s, {bytes_ / took / GB:.2f} GB/s",
    )


def _name_as_on_the_hub(index: Path) -> None:
    """The repositories were written by an older transformers, with the older names of two classes."""
    known = json.loads(index.read_text("utf-8"))
    known["tokenizer"] = ["transformers", "T5TokenizerFast"]
    if known.get("image_processor", [None])[0]:
        known["image_processor"] = ["transformers", "CLIPImageProcessor"]
    index.write_text(json.dumps(known), "utf-8")


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
