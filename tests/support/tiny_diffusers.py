"""Wan pipelines of a few hundred KB in the hub's own layout, with random weights: what the real loaders load.

The classes, the file names, the schedulers and the switches are those of the real repositories
(``Wan-AI/Wan2.2-T2V-A14B-Diffusers``, ``Wan2.2-I2V-A14B-Diffusers``, ``Wan2.1-I2V-14B-480P-Diffusers`` and the
VACE ones); only the sizes are small. Everything is written by ``save_pretrained``, the transformers in shards with
an index.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Literal, get_args

Kind = Literal["text", "text-two-experts", "image", "image-two-experts", "vace-two-experts", "vace"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

HEADS, HEAD_WIDTH, LAYERS, FFN = 2, 12, 2, 32
TEXT_WIDTH, IMAGE_WIDTH = 32, 32
SHARD = "100KB"
"""Small enough for two shards of each transformer and each text encoder."""
BOUNDARY: Final = {"text-two-experts": 0.875, "image-two-experts": 0.9, "vace-two-experts": 0.875}
"""Where the second expert takes over, as in the real repositories."""
WORDS = "a the of in and cat dog man woman sea street kitchen lamp red blue green wide golden light slow walks camera"
TARGETS: Final = ("attn1.to_q", "attn1.to_v", "attn2.to_k", "ffn.net.0.proj")
"""What a small LoRA touches in every block."""
ORIGINAL: Final = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_v": "self_attn.v",
    "attn2.to_k": "cross_attn.k",
    "ffn.net.0.proj": "ffn.0",
}
LOUD: Final = (
    "condition_embedder.text",
    "condition_embedder.image",
    "attn2.to_",
    "add_",
    "patch_embedding",
    "proj_out",
)


def save(kind: Kind, folder: Path, seed: int = 0) -> Path:
    """Write the pipeline into ``folder`` (made where it is missing) and return it. Equal seeds, equal bytes."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = _pipeline(kind)
    pipe.save_pretrained(folder, max_shard_size=SHARD)
    _name_as_on_the_hub(folder / "model_index.json")
    return folder


def save_lora(
    path: Path,
    *,
    layout: Literal["diffusers", "original"] = "diffusers",
    rank: int = 4,
    strength: float = 0.5,
    targets: Iterable[str] = TARGETS,
    seed: int = 0,
) -> Path:
    """Write a LoRA that fits every transformer here: in diffusers' own names, or in those of the original code with
    ``lora_down``, ``lora_up`` and ``alpha``, as most of the published ones have. Equal seeds, equal bytes.
    """
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(seed)
    width = HEADS * HEAD_WIDTH
    tensors = {}
    for layer in range(LAYERS):
        for target in targets:
            wide = FFN if target.startswith("ffn") else width
            down = torch.randn(rank, width, generator=draw)
            up = torch.randn(wide, rank, generator=draw) * strength / rank
            if layout == "diffusers":
                name = f"transformer.blocks.{layer}.{target}"
                tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
            else:
                name = f"diffusion_model.blocks.{layer}.{ORIGINAL[target]}"
                tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def _name_as_on_the_hub(index: Path) -> None:
    """The repositories were written by an older transformers, with the older names of two classes."""
    known = json.loads(index.read_text(encoding="utf-8"))
    known["tokenizer"] = ["transformers", "T5TokenizerFast"]
    if known.get("image_processor", [None])[0]:
        known["image_processor"] = ["transformers", "CLIPImageProcessor"]
    index.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def _pipeline(kind: Kind) -> Any:
    from diffusers import WanImageToVideoPipeline, WanPipeline, WanVACEPipeline

    parts: dict[str, Any] = {
        "tokenizer": _tokenizer(),
        "text_encoder": _text_encoder(),
        "vae": _vae(),
        "scheduler": _scheduler(kind),
        "transformer": _transformer(kind),
        "transformer_2": _transformer(kind) if kind in BOUNDARY else None,
        "boundary_ratio": BOUNDARY.get(kind),
    }
    if kind.startswith("text"):
        return WanPipeline(**parts)
    if kind.startswith("vace"):
        return WanVACEPipeline(**parts)
    images = (_image_encoder(), _image_processor()) if kind == "image" else (None, None)
    return WanImageToVideoPipeline(**parts, image_encoder=images[0], image_processor=images[1])


def _scheduler(kind: Kind) -> Any:
    from diffusers import UniPCMultistepScheduler

    shift = 5.0 if kind.startswith("image") else 3.0
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )


def _tokenizer() -> Any:
    """Pieces for a few words and letters; every other character is spelt in bytes, as UMT5's own tokenizer does."""
    from tokenizers import models
    from transformers import T5TokenizerFast

    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((f"<0x{byte:02X}>", -8.0) for byte in range(256)),
    ]
    pieces += [("▁", -3.0), *((letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    pieces += [("▁" + word, -2.0) for word in WORDS.split() if len(word) > 1]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)
    tokenizer.backend_tokenizer.model = models.Unigram(pieces, 2, byte_fallback=True)
    return tokenizer


def _text_encoder() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(_tokenizer()),
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=64,
        num_heads=2,
        num_layers=2,
        feed_forward_proj="gated-gelu",
    )
    return UMT5EncoderModel(config).eval()


def _vae() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


def _transformer(kind: Kind) -> Any:
    from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

    config: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_WIDTH,
        "in_channels": 36 if kind.startswith("image") else 16,
        "out_channels": 16,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 256,
        "ffn_dim": FFN,
        "num_layers": LAYERS,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
    }
    if kind.startswith("vace"):
        return _heard(WanVACETransformer3DModel(**config, vace_layers=[0], vace_in_channels=96))
    if kind == "image":
        config |= {"image_dim": IMAGE_WIDTH, "added_kv_proj_dim": HEADS * HEAD_WIDTH}
    return _heard(WanTransformer3DModel(**config))


def _heard(transformer: Any) -> Any:
    """Fresh weights hardly listen to what they are given; louder ones show a prompt, an image or a LoRA in the
    pixels.
    """
    import torch

    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith("weight") and any(part in name for part in LOUD):
                parameter.mul_(3.0)
    return transformer


def _image_encoder() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        projection_dim=IMAGE_WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    return CLIPVisionModel(config).eval()


def _image_processor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def tensors(folder: Path, component: str) -> dict[str, str]:
    """The safetensors file of each tensor of a component, by the tensor's name."""
    index = next((folder / component).glob("*.index.json"), None)
    if index is not None:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    from safetensors import safe_open

    (file,) = (folder / component).glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        return dict.fromkeys(opened.keys(), file.name)
