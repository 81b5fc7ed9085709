"""Full-size Wan models with random weights, made directly on the device: no file, no download.

The configurations are those of the repositories on the hub (``transformer/config.json`` and so on); the number of
parameters is checked against what their publishers say, so that a wrong configuration cannot pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from gpu_floor import Sizes, Work

WAN_14B: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
UMT5_XXL: dict[str, Any] = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
CLIP_VIT_H: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "hidden_act": "gelu",
    "projection_dim": 1024,
}
TINY = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 32, "ffn_dim": 64, "num_layers": 3}
TINY_UMT5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512}
TINY_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
TINY_VAE = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
WORDS = ("a", "the", "puppy", "playing", "happy", "barking", "joyful")


@dataclass(frozen=True)
class Case:
    """What is measured: a model and its default generation."""

    name: str
    kind: str
    """As :class:`rushes.engines.wan.load.Loaded` has it."""
    work: Work
    transformer: dict[str, Any]
    billions: tuple[float, float]
    """Parameters of one transformer, from and to, as published."""
    experts: int = 2
    boundary: float | None = None
    shift: float = 5.0
    guidance: float = 1.0
    clip: bool = False
    profiles: tuple[str, ...] = ("exact", "fast")
    tiny: bool = field(default=False)

    @property
    def sizes(self) -> Sizes:
        made = self.transformer
        return Sizes(
            width=made["num_attention_heads"] * made["attention_head_dim"],
            feed_forward=made["ffn_dim"],
            blocks=made["num_layers"],
            channels_in=made["in_channels"],
            vace_blocks=len(made.get("vace_layers", ())),
            picture=self.clip,
        )


CASES: dict[str, Case] = {
    "first-last-frame": Case(
        "first-last-frame",
        "image",
        Work(720, 720, 81, 20, guided=True),
        WAN_14B | {"in_channels": 36},
        (14.2, 14.4),  # "14B active" and files of 28.6 GB an expert
        boundary=0.9,
        shift=8.0,
        guidance=4.0,
    ),
    "vace-fun": Case(
        "vace-fun",
        "vace",
        Work(1024, 576, 81, 12, guided=True, references=1),
        WAN_14B | {"vace_layers": list(range(0, 40, 5)), "vace_in_channels": 96},
        (17.0, 18.0),  # files of 34.7 GB an expert
        boundary=0.875,
        shift=8.0,
        guidance=3.5,
    ),
    "turbo": Case(
        "turbo",
        "image",
        Work(832, 480, 81, 4, guided=False),
        WAN_14B | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        (16.2, 16.6),  # Wan2.1-I2V-14B: 16.4B on its page
        experts=1,
        clip=True,
        profiles=("turbo",),
    ),
}


def tiny(case: Case) -> Case:
    """The same at a size that a CPU works through in a second."""
    small = case.transformer | TINY
    if case.kind == "vace":
        small["vace_layers"] = [0, 2]
    if case.clip:
        small |= {"image_dim": 32, "added_kv_proj_dim": 32}
    work = replace(case.work, width=64, height=64, frames=9, steps=min(case.work.steps, 4))
    return replace(case, work=work, transformer=small, tiny=True)


def build(case: Case, device: str) -> Any:
    """A :class:`Loaded` with random weights on the device, and no LoRA."""
    import copy

    import torch

    from rushes.engines.wan.load import Loaded

    place = torch.device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    experts = tuple(_transformer(case, place, dtype, number) for number in range(case.experts))
    for expert in experts:
        count = sum(parameter.numel() for parameter in expert.parameters()) / 1e9
        if not case.tiny and not case.billions[0] <= count <= case.billions[1]:
            raise SystemExit(f"bench: {count:.2f}B parameters; published are {case.billions}")
    pipe = _pipe(case, experts, place, dtype)
    pipe.set_progress_bar_config(disable=True)
    decoder = copy.copy(pipe.vae)
    decoder.clear_cache()
    return Loaded(pipe, place, dtype, experts, case.kind, decoder)  # type: ignore[arg-type]


def _transformer(case: Case, device: Any, dtype: Any, seed: int) -> Any:
    from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

    made = WanVACETransformer3DModel if case.kind == "vace" else WanTransformer3DModel
    with _empty():
        expert = made(**case.transformer)
    return _fill(expert, device, dtype, tuple(made._keep_in_fp32_modules), seed)  # noqa: SLF001


def _pipe(case: Case, experts: tuple[Any, ...], device: Any, dtype: Any) -> Any:
    import torch
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanImageToVideoPipeline,
        WanVACEPipeline,
    )
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    with _empty():
        text = UMT5EncoderModel(UMT5Config(**UMT5_XXL | (TINY_UMT5 if case.tiny else {})))
        text.encoder.embed_tokens = text.shared  # as transformers ties them
        vae = AutoencoderKLWan(**(TINY_VAE if case.tiny else {}))
    parts: dict[str, Any] = {
        "tokenizer": _tokenizer(),
        "text_encoder": _fill(text, device, dtype, (), 10),
        "vae": _fill(vae, device, torch.float32, (), 11),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            num_train_timesteps=1000,
            flow_shift=case.shift,
        ),
        "transformer": experts[0],
        "transformer_2": experts[1] if len(experts) > 1 else None,
        "boundary_ratio": case.boundary,
    }
    if case.kind == "vace":
        return WanVACEPipeline(**parts)
    parts |= {"image_encoder": None, "image_processor": None}
    if case.clip:
        config = CLIPVisionConfig(**CLIP_VIT_H | (TINY_CLIP if case.tiny else {}))
        with _empty():
            clip = CLIPVisionModel(config)
        parts["image_encoder"] = _fill(clip, device, torch.float32, (), 12)
        parts["image_processor"] = CLIPImageProcessor()
    return WanImageToVideoPipeline(**parts)


@contextmanager
def _empty() -> Iterator[None]:
    """Parameters without memory; buffers, which are computed and few, with it."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield


def _fill(module: Any, device: Any, dtype: Any, in_fp32: tuple[str, ...], seed: int) -> Any:
    """Give every parameter memory on the device and random numbers of the spread that torch begins training with.

    ``in_fp32`` are the parts of names that diffusers keeps in fp32 when it loads.
    """
    import torch

    draw = torch.Generator(device).manual_seed(seed)
    made: dict[int, Any] = {}
    for owner_name, owner in module.named_modules():
        for name, parameter in tuple(owner.named_parameters(recurse=False)):
            if id(parameter) not in made:
                parts = f"{owner_name}.{name}".split(".")
                kept = torch.float32 if any(part in in_fp32 for part in parts) else dtype
                value = torch.empty(parameter.shape, dtype=kept, device=device)
                _draw(value, name, parts, draw)
                made[id(parameter)] = torch.nn.Parameter(value, requires_grad=False)
            setattr(owner, name, made[id(parameter)])
    return module.to(device).eval()


def _draw(value: Any, name: str, parts: list[str], draw: Any) -> None:
    if any("norm" in part for part in parts) or name == "gamma":
        value.fill_(0.0 if name == "bias" else 1.0)
    elif name == "bias":
        value.zero_()
    else:
        spread = value[0].numel() if value.ndim > 1 else value.numel()
        value.normal_(0.0, (3 * max(spread, 1)) ** -0.5, generator=draw)


def _tokenizer() -> Any:
    """Real, and small: a prompt is padded to 512 tokens whatever it says, so its words take no time."""
    from tokenizers import models
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)
    tokenizer.backend_tokenizer.model = models.Unigram(pieces, 2)
    return tokenizer
