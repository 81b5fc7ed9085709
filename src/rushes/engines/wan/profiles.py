"""Speed profiles: what is done to a loaded model so that the same steps take less time, and what that costs.

``exact``
    The maths of stock diffusers in the same precision: no cache, no quantisation. Two things are exchanged for faster
    ones that compute the same: the attention kernel (FlashAttention 3 or cuDNN for PyTorch's own choice), and the
    chain of small operations around the large ones, which is compiled into few kernels with every intermediate
    rounded to the type to which stock rounds it. What may differ is the order of sums (inside attention's softmax and
    product, and in the means of the norms) and so the last bit of what is rounded after them. On a CPU nothing is
    exchanged: there it is stock, bit for bit.
``fast``
    Besides: kernels may keep intermediates in higher precision than stock; attention in 8 bits where SageAttention
    is installed; the large linear layers in fp8 (e4m3, one scale for each row of the weights and for each token)
    where the card has it; FirstBlockCache where the pipeline is one for which that is sound, and only for many steps.
``turbo``
    The manifest's few-step LoRA, which `load.py` fuses, and what of ``fast`` does not live from having many steps.

Nothing is taken on trust: each part is tried on the model itself before it stays, its deviation from the untouched
model is measured there, and what fails or deviates too far is undone, with the reason in :class:`Applied` and in the
log. `bench/wan_deviation.py` measures whole videos.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import msgspec

from rushes import log
from rushes.engines.wan.attention import (
    exact_kernels,
    fast_kernels,
    reset_attention,
    set_attention,
    spread_kernels,
)
from rushes.engines.wan.compiling import BLOCKS, compile_blocks, offloaded, options_of

if TYPE_CHECKING:
    from rushes.engines.wan.load import Loaded
    from rushes.engines.wan.trials import Trial

Profile = Literal["exact", "fast", "turbo"]
PROFILES: Final[tuple[Profile, ...]] = get_args(Profile)

SAME_MATHS: Final = 0.03
"""The most by which a part of ``exact`` may change an expert's prediction, as root mean square over that of the
prediction. bf16 rounds by 0.004, and differently rounded sums grow over forty layers; a wrong kernel is off by 1."""
LESS_PRECISION: Final = 0.25
"""The same for the other profiles: above it something is broken."""
FP8_LAYER: Final = 0.1
"""The most for one linear layer in fp8. e4m3 has three bits of mantissa: about 0.036 is normal."""
CACHE_THRESHOLD: Final = 0.04
"""Of FirstBlockCache: the relative change of the first block's residual below which the other blocks are skipped.
diffusers' default is 0.05, ParaAttention's for Wan 0.1."""
CACHE_STEPS: Final = 16
"""Fewer steps are too far apart for what one computed to hold for the next."""

_ATTENTION_LAYERS: Final = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
_FP8_LAYERS: Final = (*_ATTENTION_LAYERS, "attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")
"""Those that work on every token of the video: nearly all of the multiplications. The rest (embeddings, keys and
values of the text and the picture, VACE's hints, the last projection) is small, and errors there reach everything."""

Tell = Callable[[str], None]
PartName = Literal["attention", "compile", "fp8", "cache"]


class Part(msgspec.Struct, frozen=True):
    """One part of a profile: whether it is in force, in words, and by how much the prediction of an expert changed
    in the trial (root mean square of the difference over that of the prediction; the worst expert), all parts
    up to this one together.
    """

    name: PartName
    done: bool
    words: str
    deviation: float | None = None


@dataclass(frozen=True)
class Applied:
    """What a profile came to on this model and card."""

    profile: str
    parts: tuple[Part, ...]
    _caches: tuple[Any, ...] = field(default=(), repr=False)

    def __iter__(self) -> Iterator[str]:
        """The parts in words."""
        return (f"{part.name}: {part.words}" for part in self.parts)

    def part(self, name: PartName) -> Part:
        return next(part for part in self.parts if part.name == name)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The parts that are in force, without what was measured of them: the same on equal cards."""
        return tuple(f"{part.name}: {part.words.partition(',')[0]}" for part in self.parts if part.done)

    def begin(self, steps: int) -> bool:
        """To be called before each denoising, with its number of steps; says whether the cache is on for it.

        Until then the cache is off.
        """
        on = bool(self._caches) and steps >= CACHE_STEPS
        for hook in self._caches:
            hook.threshold = CACHE_THRESHOLD if on else _NEVER
        return on


_NEVER: Final = -1.0
"""A relative change is at least 0, and FirstBlockCache computes where it is above the threshold."""


@dataclass(frozen=True)
class Means:
    """What there is to speed a model up with."""

    capability: tuple[int, int] | None
    """Of an NVIDIA card; None for anything else."""
    backend: str | Callable[..., Any] | None
    """Of ``torch.compile``; None where nothing is to be compiled."""
    fp8: Callable[[Any], None] | None
    """Replaces a linear layer's weight, in place; None where the card multiplies no fp8."""
    why_no_fp8: str = ""
    cudnn: int | None = None
    """Its version, 91501 for 9.15.1; None where it is not there."""


def means_of(device: Any) -> Means:
    """What the device at hand has."""
    import torch

    if device.type != "cuda":
        return Means(None, None, None, f"{device.type} multiplies no fp8")
    if torch.version.hip is not None:
        return Means(None, "inductor", None, "only tried on NVIDIA cards")
    capability, cudnn = torch.cuda.get_device_capability(device), torch.backends.cudnn.version()
    if capability < (8, 9):
        why = f"compute capability {capability[0]}.{capability[1]} has none; it begins with 8.9"
        return Means(capability, "inductor", None, why, cudnn)
    try:
        import torchao  # noqa: F401 - whether it is there
    except ImportError:
        return Means(capability, "inductor", None, "torchao is not installed", cudnn)
    return Means(capability, "inductor", to_fp8, cudnn=cudnn)


def apply(
    loaded: "Loaded",
    profile: str,
    means: Means | None = None,
    tell: Tell = lambda _words: None,
    *,
    spread: bool = False,
) -> Applied:
    """Change ``loaded`` in place to what ``profile`` is, and say what was done. Call it once, after loading. Where
    ``spread``, several cards will work together, for which some parts are no good.

    Compiling takes its time on a cold machine, here and not in a request: sizes are symbols in what is
    compiled, so that no later size compiles again (the exceptions: a request's own LoRA and weights that are moved
    in and out of the card, for both of which the blocks run uncompiled). ``tell`` is told what goes on.

    Raises torch's OutOfMemoryError where not even the smallest trial fits.
    """
    if profile not in PROFILES:
        raise ValueError(f"{profile!r} is no profile: {', '.join(PROFILES)}")
    work = _Work(loaded, profile, means or means_of(loaded.device), tell, spread=spread)
    applied = work.run()
    log.event("wan profile", profile=profile, **{part.name: part.words for part in applied.parts})
    return applied


# -- fp8 ------------------------------------------------------------------------------------------------------
def fp8_layers(expert: Any) -> Iterator[tuple[str, Any]]:
    """The linear layers of an expert that ``fast`` computes in fp8, by their names."""
    import torch

    for name, module in expert.named_modules():
        inner = name.split(".", 2)[2:]
        if not (
            isinstance(module, torch.nn.Linear) and inner and name.startswith(tuple(f"{b}." for b in BLOCKS))
        ):
            continue
        if inner[0] in _FP8_LAYERS and module.in_features % 16 == 0 and module.out_features % 16 == 0:
            yield name, module


def to_fp8(linear: Any) -> None:
    """Replace a bf16 layer's weight by torchao's: fp8 by rows, the activations by tokens when they come.

    torchao's own settings for the compiler are refused: they would let fp32 matrices, the VAE's among them, be
    multiplied in TF32.
    """
    import torch
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    from torchao.quantization.quant_api import Float8MMConfig

    # https://github.com/pytorch/ao/issues/4582: cuBLASLt of CUDA 12.9 fails at some shapes with fast accumulation
    accumulate = Float8MMConfig(use_fast_accum=not (torch.version.cuda or "").startswith("12.9"))
    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), mm_config=accumulate, set_inductor_config=False
    )
    quantize_(linear, config)


# -- the work -----------------------------------------------------------------------------------------------------
class _Work:
    def __init__(self, loaded: "Loaded", profile: str, means: Means, tell: Tell, *, spread: bool) -> None:
        self._loaded, self._profile, self._means, self._tell = loaded, profile, means, tell
        self._spread = spread
        self._experts = tuple(loaded.experts)
        self._exact = profile == "exact"
        self._bound = SAME_MATHS if self._exact else LESS_PRECISION
        self._moved = any(offloaded(expert) for expert in self._experts)
        self._trials: tuple[Trial, ...] = ()

    def run(self) -> Applied:
        attention = self._attention()
        fp8 = self._fp8()
        compiled = self._compile()
        cache, hooks = self._cache()
        if self._trials:
            self._forget()
        return Applied(self._profile, (attention, fp8, compiled, cache), hooks)

    def _forget(self) -> None:
        from rushes.engines.wan.memory import release

        self._trials = ()
        release()

    def _deviation(self) -> float:
        """Of the experts as they are now from what they were; the worst. Raises what the model raises."""
        if not self._trials:
            raise RuntimeError("the reference must be taken before anything is changed")
        return max(trial.deviation() for trial in self._trials)

    def _reference(self) -> None:
        """Have the untouched experts predict."""
        from rushes.engines.wan.trials import Trial

        if not self._trials:
            self._tell("trying the model")
            self._trials = tuple(Trial(self._loaded, expert) for expert in self._experts)

    def _tried(self) -> tuple[float | None, str]:
        """The deviation, or None and why what was just done cannot stay."""
        try:
            deviation = self._deviation()
        except Exception as error:  # of any of a dozen libraries; without the part the model works
            return None, _short(error)
        if not deviation <= self._bound:
            return None, f"the prediction changed by {deviation:.3g}, more than {self._bound}"
        return deviation, ""

    # attention
    def _attention(self) -> Part:
        kernels = (exact_kernels if self._exact else fast_kernels)(self._means.capability)
        if self._spread:
            kernels = spread_kernels(kernels)
        if not kernels:
            return Part("attention", done=False, words="PyTorch's own, as stock has it")
        self._reference()
        refused: list[str] = []
        for kernel in kernels:
            try:
                set_attention(self._experts, kernel, self._means.cudnn)
            except Exception as error:  # not installed, not for this card, not to be fetched, …
                deviation, why = None, _short(error)
            else:
                deviation, why = self._tried()
            if deviation is not None:
                words = f"{kernel}, deviation {deviation:.2g}"
                return Part("attention", done=True, words=words + _not(refused), deviation=deviation)
            refused.append(f"{kernel}: {why}")
            reset_attention(self._experts)
        return Part("attention", done=False, words="PyTorch's own, as stock has it" + _not(refused))

    # fp8
    def _fp8(self) -> Part:
        if self._exact:
            return Part("fp8", done=False, words="not in this profile")
        replace = self._means.fp8
        if replace is None:
            return Part("fp8", done=False, words=f"not used: {self._means.why_no_fp8}")
        layers = [linear for expert in self._experts for _, linear in fp8_layers(expert)]
        why = self._why_not_fp8(layers, replace)
        if why:
            return Part("fp8", done=False, words=f"not used: {why}")
        self._reference()
        self._tell("rounding the linear layers to fp8")
        for linear in layers:
            replace(linear)
        try:
            deviation = self._deviation()
        except Exception as error:
            # Unlike the other parts this one cannot be undone: what was rounded away is gone.
            raise RuntimeError(f"The model fails with linear layers in fp8: {_short(error)}") from error
        return Part(
            "fp8",
            done=True,
            words=f"{len(layers)} linear layers, deviation {deviation:.2g}",
            deviation=deviation,
        )

    def _why_not_fp8(self, layers: list[Any], replace: Callable[[Any], None]) -> str:
        """Try a copy of one layer of each shape, since what was rounded cannot be put back."""
        import torch

        from rushes.engines.wan.trials import relative

        if self._moved:
            return "the weights are moved in and out of the card"
        if not layers:
            return "no linear layer has sides that are multiples of 16"
        shapes = {(one.in_features, one.out_features): one for one in layers}
        for linear in shapes.values():
            try:
                one = copy.deepcopy(linear)
                replace(one)
                given = torch.randn(
                    1, 1024, linear.in_features, device=linear.weight.device, dtype=linear.weight.dtype
                )
                with torch.no_grad():
                    deviation = relative(one(given), linear(given))
            except Exception as error:
                return _short(error)
            if not deviation <= FP8_LAYER:
                return f"a layer's result changed by {deviation:.3g}, more than {FP8_LAYER}"
        return ""

    # compiling
    def _compile(self) -> Part:
        backend = self._means.backend
        if backend is None:
            return Part("compile", done=False, words=f"not compiled on {self._loaded.device.type}")
        if self._moved:
            return Part(
                "compile", done=False, words="not compiled: the weights are moved in and out of the card"
            )
        try:
            options = options_of(backend, exact=self._exact)
        except LookupError as error:
            return Part("compile", done=False, words=f"not compiled: {error}")
        self._reference()
        self._tell("compiling")
        regions = compile_blocks(self._experts, backend, options)
        deviation, why = self._tried()
        if deviation is None:
            for undo in regions:
                undo()
            return Part("compile", done=False, words=f"not compiled: {why}")
        words = f"blocks compiled for all sizes, deviation {deviation:.2g}"
        return Part("compile", done=True, words=words, deviation=deviation)

    # cache
    def _cache(self) -> tuple[Part, tuple[Any, ...]]:
        why = self._why_no_cache()
        if why:
            return Part("cache", done=False, words=f"not used: {why}"), ()
        self._reference()
        hooks: tuple[Any, ...] = ()
        try:
            hooks = tuple(_cached(expert) for expert in self._experts)
            deviation, why = self._tried()
        except Exception as error:
            deviation, why = None, _short(error)
        if deviation is None:
            for expert in self._experts:
                expert.disable_cache()
            return Part("cache", done=False, words=f"not used: {why}"), ()
        words = f"FirstBlockCache at {CACHE_THRESHOLD} from {CACHE_STEPS} steps"
        return Part("cache", done=True, words=words), hooks

    def _why_no_cache(self) -> str:
        if self._profile != "fast":
            return "not in this profile"
        if self._spread:
            return "each card sees its own share of the video and would skip other blocks"
        if self._loaded.kind == "vace":
            return "unsound with VACE, whose hints are added outside the blocks"
        if self._loaded.pipe.config.get("expand_timesteps"):
            return "not tried with a time for each token"
        if any(len(expert.blocks) < 2 for expert in self._experts):
            return "too few blocks"
        return ""


def _not(refused: list[str]) -> str:
    return f" (not {'; not '.join(refused)})" if refused else ""


def _short(error: BaseException) -> str:
    """The beginning, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _cached(expert: Any) -> Any:
    """Install the cache, switched off; what is returned has its ``threshold``."""
    from diffusers.hooks import FirstBlockCacheConfig
    from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK

    expert.enable_cache(FirstBlockCacheConfig(threshold=CACHE_THRESHOLD))
    hook = expert.blocks[0]._diffusers_hook.get_hook(_FBC_LEADER_BLOCK_HOOK)  # noqa: SLF001
    hook.threshold = _NEVER
    return hook
