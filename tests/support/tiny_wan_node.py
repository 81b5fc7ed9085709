"""A custom node without nodes: lets ComfyUI's stock loaders take small Wan files.

Some loaders take a model's size from their own code. Here it comes from the file; files of the usual size load as
before. Copied into a ComfyUI by `tiny_wan.py`; nothing else imports it.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.ldm.wan.vae
import comfy.sd

NODE_CLASS_MAPPINGS: dict[str, type] = {}

_vae_dim: list[int] = []


def _vae() -> None:
    module_class, start = comfy.ldm.wan.vae.WanVAE, comfy.sd.VAE.__init__

    def sized(*given: Any, **named: Any) -> Any:
        if _vae_dim:
            named["dim"] = _vae_dim[-1]
        return module_class(*given, **named)

    def init(self: Any, sd: Any = None, *given: Any, **named: Any) -> None:
        last = (sd or {}).get("decoder.head.0.gamma")
        if last is not None:
            _vae_dim.append(int(last.shape[0]))
        try:
            start(self, sd, *given, **named)
        finally:
            _vae_dim.clear()

    comfy.ldm.wan.vae.WanVAE = sized
    comfy.sd.VAE.__init__ = init


def _text_encoder() -> None:
    load = comfy.sd.load_text_encoder_state_dicts

    def sized(state_dicts: Any = (), *given: Any, **named: Any) -> Any:
        for tensors in state_dicts:
            inner = tensors.get("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")
            heads = tensors.get("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
            query = tensors.get("encoder.block.0.layer.0.SelfAttention.q.weight")
            if inner is None or heads is None or query is None:
                continue
            layers = [name for name in tensors if name.endswith("layer.0.SelfAttention.q.weight")]
            named["model_options"] = {
                **named.get("model_options", {}),
                "umt5xxl_model_config": {
                    "d_ff": inner.shape[0],
                    "d_kv": query.shape[0] // heads.shape[1],
                    "num_heads": heads.shape[1],
                    "num_layers": len(layers),
                    "vocab_size": tensors["shared.weight"].shape[0],
                },
            }
        return load(state_dicts, *given, **named)

    comfy.sd.load_text_encoder_state_dicts = sized


def _image_encoder() -> None:
    load = comfy.clip_vision.load_clipvision_from_sd

    def sized(sd: Any, *given: Any, **named: Any) -> Any:
        layers = [name for name in sd if name.endswith("layer_norm1.weight")]
        inner = sd.get("vision_model.encoder.layers.0.mlp.fc1.weight")
        if inner is None or len(layers) > 2:
            return load(sd, *given, **named)
        usual = Path(comfy.clip_vision.__file__).with_name("clip_vision_config_h.json")
        config = json.loads(usual.read_text("utf-8"))
        config |= {"num_hidden_layers": len(layers), "intermediate_size": inner.shape[0]}
        with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
            json.dump(config, file)
            file.flush()
            model = comfy.clip_vision.ClipVisionModel(file.name)
        missing, _ = model.load_sd(sd)
        assert not missing, missing
        return model

    comfy.clip_vision.load_clipvision_from_sd = sized


_vae()
_text_encoder()
_image_encoder()
