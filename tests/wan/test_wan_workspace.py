"""How much memory Wan's own sizes need to work in, counted on torch's device without memory."""

import weakref
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra: pip install 'rushes[wan]'")

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rushes.engines.wan.memory import WORKSPACE, locked_bytes_of

META = torch.device("meta")
GIB = 2**30
I2V_A14B: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "cross_attn_norm": True,
}


class Counting(TorchDispatchMode):
    """Bytes of the tensors that are made within and still referred to, and the most that they ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._tensors: dict[int, tuple[int, int]] = {}

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                size, users = self._tensors.get(key, (storage.nbytes(), 0))
                self.now += 0 if users else size
                self._tensors[key] = (size, users + 1)
                weakref.finalize(tensor, self._dropped, key)
        self.peak = max(self.peak, self.now)
        return made

    def _dropped(self, key: int) -> None:
        size, users = self._tensors.pop(key)
        if users > 1:
            self._tensors[key] = (size, users - 1)
        else:
            self.now -= size


class Fused(TorchFunctionMode):
    """Attention as a card's kernels do it, which keep no table of all pairs of tokens."""

    def __torch_function__(
        self, function: Any, _types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like((kwargs or {}).get("query", args[0] if args else None))
        return function(*args, **(kwargs or {}))


def transformer(layers: int) -> Any:
    with META:
        made = WanTransformer3DModel(**I2V_A14B, num_layers=layers).eval().requires_grad_(False)
    kept = WanTransformer3DModel._keep_in_fp32_modules
    for name, parameter in made.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    return made


def decoding(width: int, height: int) -> int:
    with META:
        decoder = AutoencoderKLWan().eval().requires_grad_(False).decoder
    state: list[Any] = [None] * sum(isinstance(module, WanCausalConv3d) for module in decoder.modules())
    latents = torch.empty(1, 16, 3, height // 8, width // 8, device=META)
    with torch.no_grad(), Counting() as count:
        for number in range(3):  # the state is complete after the second
            one = latents[:, :, number : number + 1]
            decoder(one, feat_cache=state, feat_idx=[0], first_chunk=number == 0)
    return count.peak


def encoding(width: int, height: int) -> int:
    with META:
        encoder = AutoencoderKLWan().eval().requires_grad_(False).encoder
    state: list[Any] = [None] * sum(isinstance(module, WanCausalConv3d) for module in encoder.modules())
    frames = torch.empty(1, 3, 9, height, width, device=META)
    with torch.no_grad(), Counting() as count:
        for part in (slice(0, 1), slice(1, 5), slice(5, 9)):
            encoder(frames[:, :, part], feat_cache=state, feat_idx=[0])
    return count.peak


def predicting(width: int, height: int) -> int:
    """A pass of a 14B expert over 81 frames; two of its forty blocks, which work one after another."""
    expert = transformer(2)
    given = torch.empty(1, 36, 21, height // 8, width // 8, device=META, dtype=torch.bfloat16)
    text = torch.empty(1, 512, 4096, device=META, dtype=torch.bfloat16)
    with torch.no_grad(), Fused(), Counting() as count:
        expert(given, torch.empty(1, device=META), text, return_dict=False)
    return count.peak


@pytest.mark.parametrize(
    ("work", "large", "small"), [(decoding, 16.7, 7.2), (encoding, 12.2, 5.3), (predicting, 8.0, 3.5)]
)
def test_each_work_at_720p_has_room_with_some_to_spare(work: Any, large: float, small: float) -> None:
    """The numbers are those that :data:`WORKSPACE` tells, in GiB."""
    counted = work(1280, 720)
    assert large == round(counted / GIB, 1)
    assert small == round(work(832, 480) / GIB, 1)
    assert counted * 1.15 < WORKSPACE


def test_wan_s_weights_take_half_as_much_again_in_locked_pages() -> None:
    expert = transformer(40)
    weights = sum(one.numel() * one.element_size() for one in expert.parameters())
    assert 26.7 == round(weights / GIB, 1)
    assert 40.8 == round(locked_bytes_of(expert) / GIB, 1)
