"""Wan weights of a few MB under the official file names, for a real ComfyUI on a CPU.

Run with ComfyUI's own python: ``tiny_wan.py COMFYUI_DIR TARGET``. The module classes of that checkout say which
tensors there are; their values are random, from one seed. TARGET gets the folders of ComfyUI's ``models``, a
custom node that lets the stock loaders take small files (`tiny_wan_node.py`), and ``paths.yaml``, which ComfyUI
reads with ``--extra-model-paths-config``.
"""

import argparse
import io
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

WORDS = (
    "puppy playing happy barking joyful dog cat a the of in on man woman camera wide shot golden hour light city "
    "red blue green video image frame lighthouse kitchen kettle sea window stove film street wall smile ruins"
)
SIZE: dict[str, Any] = {"dim": 128, "ffn_dim": 128, "num_heads": 1, "num_layers": 2}
T5_SIZE = {"d_ff": 32, "d_kv": 64, "num_heads": 1, "num_layers": 1, "vocab_size": 512}
DETECTED_BY = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"
"""The key by which ComfyUI's loader knows a T5 of this family; the small one has no such block."""
CLIP_LAYERS, CLIP_INNER = 2, 64
LORA = "tiny_wan_lora.safetensors"
FOLDERS = ("custom_nodes", "diffusion_models", "text_encoders", "vae", "clip_vision", "loras")


class Maker:
    def __init__(self, comfy: Path, target: Path) -> None:
        self.comfy, self.target = comfy, target
        arguments, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
        sys.path.insert(0, str(comfy))
        import comfy.cli_args
        import torch

        sys.argv = arguments
        comfy.cli_args.args.cpu = True
        self.torch = torch
        self.random = torch.Generator().manual_seed(0)

    def filled(self, module: Any) -> dict[str, Any]:
        """The module's tensors with values that keep activations finite."""
        return {name: self._values(name, tuple(value.shape)) for name, value in module.state_dict().items()}

    def _values(self, name: str, shape: tuple[int, ...]) -> Any:
        torch = self.torch
        if len(shape) > 1 and not name.endswith(("modulation", "emb_pos", "gamma")):
            value = torch.randn(shape, generator=self.random) / math.sqrt(math.prod(shape[1:]))
        elif name.endswith("gamma") or (name.endswith("weight") and len(shape) == 1):
            value = torch.ones(shape)
        elif name.endswith("bias"):
            value = torch.zeros(shape)
        else:
            value = torch.randn(shape, generator=self.random) * 0.02
        return value.to(torch.float16).contiguous()

    def write(self, tensors: dict[str, Any], folder: str, *names: str) -> None:
        from safetensors.torch import save_file

        for name in names:
            save_file(tensors, str(self.target / folder / name))

    def diffusion_models(self) -> None:
        import comfy.ldm.wan.model as wan
        import comfy.ops

        more = {"device": "meta", "dtype": self.torch.float16, "operations": comfy.ops.disable_weight_init}
        experts = "wan2.2_{}_{}_noise_14B_fp8_scaled.safetensors"
        for expert in ("high", "low"):
            text = wan.WanModel(model_type="t2v", in_dim=16, **SIZE, **more)
            image = wan.WanModel(model_type="t2v", in_dim=36, **SIZE, **more)
            vace = wan.VaceWanModel(in_dim=16, vace_layers=1, vace_in_dim=96, **SIZE, **more)
            self.write(self.filled(text), "diffusion_models", experts.format("t2v", expert))
            self.write(self.filled(image), "diffusion_models", experts.format("i2v", expert))
            self.write(self.filled(vace), "diffusion_models", experts.format("fun_vace", expert))
        with_image_encoder = wan.WanModel(model_type="i2v", in_dim=36, **SIZE, **more)
        self.write(self.filled(with_image_encoder), "diffusion_models", "Wan14Bi2vFusioniX.safetensors")

    def vae(self) -> None:
        import comfy.ldm.wan.vae as wan

        with self.torch.device("meta"):
            module = wan.WanVAE(
                dim=8,
                z_dim=16,
                dim_mult=[1, 2, 4, 4],
                num_res_blocks=2,
                attn_scales=[],
                temperal_downsample=[False, True, True],
            )
        self.write(self.filled(module), "vae", "wan_2.1_vae.safetensors")

    def text_encoder(self) -> None:
        import comfy.ops
        import comfy.text_encoders.t5 as t5

        config = (
            json.loads((self.comfy / "comfy/text_encoders/umt5_config_xxl.json").read_text("utf-8")) | T5_SIZE
        )
        tensors = self.filled(t5.T5(config, self.torch.float16, "meta", comfy.ops.disable_weight_init))
        tensors["spiece_model"] = self.torch.frombuffer(bytearray(self._tokenizer()), dtype=self.torch.uint8)
        tensors[DETECTED_BY] = self.torch.zeros(1, 4096, dtype=self.torch.float16)
        self.write(tensors, "text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors")

    def _tokenizer(self) -> bytes:
        import sentencepiece

        words, model = WORDS.split(), io.BytesIO()
        lines = [" ".join(words[(i * 7 + j * j) % len(words)] for j in range(9)) for i in range(400)]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines + [chr(code) for code in range(33, 127)]),
            model_writer=model,
            vocab_size=300,
            model_type="bpe",
            character_coverage=1.0,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
            hard_vocab_limit=False,
        )
        return model.getvalue()

    def image_encoder(self) -> None:
        import comfy.clip_model
        import comfy.ops

        config = json.loads((self.comfy / "comfy/clip_vision_config_h.json").read_text("utf-8"))
        config |= {"num_hidden_layers": CLIP_LAYERS, "intermediate_size": CLIP_INNER}
        operations = comfy.ops.disable_weight_init
        module = comfy.clip_model.CLIPVisionModelProjection(config, self.torch.float16, "meta", operations)
        self.write(self.filled(module), "clip_vision", "clip_vision_h.safetensors")

    def lora(self) -> None:
        """For any of the diffusion models here: it changes how each block looks at itself, by much."""
        names = [f"diffusion_model.blocks.{block}.self_attn.{part}" for block in range(2) for part in "qkvo"]
        tensors = {
            f"{name}.{half}.weight": self.torch.randn(shape, generator=self.random).to(self.torch.float16)
            for name in names
            for half, shape in (("lora_A", (4, 128)), ("lora_B", (128, 4)))
        }
        self.write(tensors, "loras", LORA)

    def make(self) -> None:
        for folder in FOLDERS:
            (self.target / folder).mkdir(parents=True, exist_ok=True)
        pack = self.target / "custom_nodes" / "tiny_wan"
        pack.mkdir(exist_ok=True)
        shutil.copyfile(Path(__file__).with_name("tiny_wan_node.py"), pack / "__init__.py")
        self.diffusion_models()
        self.vae()
        self.text_encoder()
        self.image_encoder()
        self.lora()
        at = json.dumps(str(self.target))
        rows = ["tiny_wan_node:", f"  base_path: {at}", "  custom_nodes: custom_nodes"]
        # is_default: before that ComfyUI's own models, which may hold the real weights under the same names
        rows += ["tiny_wan:", f"  base_path: {at}", "  is_default: true"]
        rows += [f"  {name}: {name}" for name in FOLDERS if name != "custom_nodes"]
        (self.target / "paths.yaml").write_text("\n".join([*rows, ""]), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comfy", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args()
    Maker(given.comfy.resolve(), given.target.resolve()).make()


if __name__ == "__main__":
    main()
