"""The speed profiles on tiny models: what a CPU has of them runs, the rest must step back and say why."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support import tiny_diffusers
from support.wan_running import SMALL, fresh, stock_latents

torch = pytest.importorskip("torch", reason="needs the extra: pip install 'rushes[wan]'")
diffusers = pytest.importorskip("diffusers", reason="needs the extra: pip install 'rushes[wan]'")

from rushes.engines.wan import profiles  # noqa: E402 - after the check for the extra
from rushes.engines.wan.denoise import Denoiser, Stop  # noqa: E402
from rushes.engines.wan.profiles import Means  # noqa: E402
from rushes.engines.wan.prompts import Embeddings  # noqa: E402
from rushes.engines.wan.trials import relative  # noqa: E402
from rushes.errors import EngineError  # noqa: E402

Tiny = Callable[[tiny_diffusers.Kind], Path]
NOTHING = Means(None, None, None, "cpu multiplies no fp8")
SIZES = ((2, 8, 10), (3, 12, 8), (5, 4, 18), (1, 6, 10))


class Counting:
    """A compiler that compiles nothing and counts how often it was asked to."""

    def __init__(self, spoil: float = 1.0) -> None:
        self.compiled, self.called, self.spoil = 0, 0, spoil

    def __call__(self, graph: Any, _inputs: Any) -> Callable[..., Any]:
        self.compiled += 1

        def run(*given: Any) -> Any:
            self.called += 1
            return tuple(one * self.spoil if one.is_floating_point() else one for one in graph(*given))

        return run


@pytest.fixture(autouse=True)
def forget_compiled() -> None:
    torch._dynamo.reset()


def predict(expert: Any, size: tuple[int, int, int] = SIZES[0]) -> Any:
    config, draw = expert.config, torch.Generator().manual_seed(3)
    given = {
        "hidden_states": torch.randn(1, config.in_channels, *size, generator=draw),
        "encoder_hidden_states": torch.randn(1, 512, config.text_dim, generator=draw),
        "timestep": torch.tensor([700.0]),
    }
    if hasattr(config, "vace_layers"):
        given["control_hidden_states"] = torch.randn(1, config.vace_in_channels, *size, generator=draw)
    given = {name: one.to(expert.dtype if one.ndim > 1 else one.dtype) for name, one in given.items()}
    with torch.no_grad(), expert.cache_context("cond"):
        return expert(**given, return_dict=False)[0]


def generate(loaded: Any, **changed: Any) -> Any:
    plan = msgspec.structs.replace(SMALL, **changed)
    return Denoiser(loaded, Embeddings()).run(plan, Stop(), lambda *_: None)


def with_sides_for_fp8(loaded: Any) -> Any:
    """A bf16 transformer whose sides are multiples of 16, in the place of the tiny one."""
    torch.manual_seed(5)
    config = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16, "out_channels": 16}
    expert = diffusers.WanTransformer3DModel(
        **config, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=3, cross_attn_norm=True
    )
    expert = expert.to(torch.bfloat16).eval()
    loaded.pipe.register_modules(transformer=expert)
    return replace(loaded, experts=(expert,), dtype=torch.bfloat16)


def to_fp8_anywhere(linear: Any) -> None:
    """What torchao makes of a layer on a card; torchao itself refuses other devices."""
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    weight = Float8Tensor.from_hp(
        linear.weight.detach(),
        granularity=PerRow(),
        mm_config=Float8MMConfig(use_fast_accum=True),
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, PerRow()),
    )
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)


# -- exact --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["text-two-experts", "text"])
def test_exact_is_stock_bit_for_bit(tiny: Tiny, kind: tiny_diffusers.Kind) -> None:
    loaded = fresh(tiny(kind))
    applied = profiles.apply(loaded, "exact")

    assert torch.equal(stock_latents(tiny(kind), SMALL), generate(loaded))
    assert [False] * 4 == [part.done for part in applied.parts]


def test_every_part_says_why_it_is_left_out(tiny: Tiny) -> None:
    applied = profiles.apply(fresh(tiny("vace")), "fast")

    assert [
        "attention: PyTorch's own, as stock has it",
        "fp8: not used: cpu multiplies no fp8",
        "compile: not compiled on cpu",
        "cache: not used: unsound with VACE, whose hints are added outside the blocks",
    ] == list(applied)


def test_an_unknown_profile_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="'quick' is no profile: exact, fast, turbo"):
        profiles.apply(fresh(tiny("text")), "quick")


# -- compiling ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "kinds_of_blocks"), [("text-two-experts", 1), ("vace-two-experts", 2)])
def test_blocks_are_compiled_once_for_all_experts_and_sizes(
    tiny: Tiny, kind: tiny_diffusers.Kind, kinds_of_blocks: int
) -> None:
    plain, loaded = fresh(tiny(kind)), fresh(tiny(kind))
    compiler = Counting()
    applied = profiles.apply(loaded, "turbo", Means(None, compiler, None))
    assert applied.part("compile").done
    assert kinds_of_blocks == compiler.compiled

    called = compiler.called
    for ours, stock in zip(loaded.experts, plain.experts, strict=True):
        for size in SIZES:
            assert torch.equal(predict(stock, size), predict(ours, size))
    assert kinds_of_blocks == compiler.compiled
    blocks = sum(len(one.blocks) + len(getattr(one, "vace_blocks", ())) for one in loaded.experts)
    assert called + blocks * len(SIZES) == compiler.called


def test_torch_s_own_tracing_keeps_the_numbers(tiny: Tiny) -> None:
    loaded = fresh(tiny("text"))
    applied = profiles.apply(loaded, "turbo", Means(None, "aot_eager", None))

    assert applied.part("compile").done
    assert torch.equal(generate(fresh(tiny("text"))), generate(loaded))


def test_a_job_that_is_ended_compiles_nothing_anew(tiny: Tiny) -> None:
    loaded = fresh(tiny("text"))
    compiler = Counting()
    profiles.apply(loaded, "turbo", Means(None, compiler, None))
    alone = generate(loaded)
    stop = Stop()

    def end(*_: Any) -> None:
        stop.set()

    with pytest.raises(EngineError, match="ended before"):
        Denoiser(loaded, Embeddings()).run(SMALL, stop, end)
    assert torch.equal(alone, generate(loaded))
    assert compiler.compiled == 1


def test_a_compiler_that_fails_is_left_out(tiny: Tiny) -> None:
    loaded = fresh(tiny("text"))
    before = predict(loaded.experts[0])

    def broken(_graph: Any, _inputs: Any) -> Any:
        raise OSError("no C compiler found")

    applied = profiles.apply(loaded, "turbo", Means(None, broken, None))
    assert not applied.part("compile").done
    assert "no C compiler found" in applied.part("compile").words
    assert torch.equal(before, predict(loaded.experts[0]))
    assert "forward" not in vars(loaded.experts[0].blocks[0])


@pytest.mark.parametrize(("profile", "spoil"), [("exact", 1.2), ("turbo", 10.0), ("exact", float("nan"))])
def test_a_compiler_that_miscalculates_is_left_out(tiny: Tiny, profile: str, spoil: float) -> None:
    loaded = fresh(tiny("text"))
    before = predict(loaded.experts[0])
    applied = profiles.apply(loaded, profile, Means(None, Counting(spoil), None))

    assert "the prediction changed by" in applied.part("compile").words
    assert not applied.part("compile").done
    assert torch.equal(before, predict(loaded.experts[0]))


def test_weights_that_move_are_not_compiled(tiny: Tiny) -> None:
    loaded, compiler = fresh(tiny("text")), Counting()
    offload(loaded)
    applied = profiles.apply(loaded, "fast", Means(None, compiler, to_fp8_anywhere))

    assert applied.part("compile").words == "not compiled: the weights are moved in and out of the card"
    assert applied.part("fp8").words == "not used: the weights are moved in and out of the card"
    assert compiler.compiled == 0


def test_weights_that_begin_to_move_run_uncompiled(tiny: Tiny) -> None:
    loaded, compiler = fresh(tiny("text")), Counting()
    profiles.apply(loaded, "turbo", Means(None, compiler, None))
    before, called = generate(loaded), compiler.called
    offload(loaded)

    assert torch.equal(before, generate(loaded))
    assert (1, called) == (compiler.compiled, compiler.called)


def offload(loaded: Any) -> None:
    cpu = torch.device("cpu")
    for expert in loaded.experts:
        expert.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)


def test_a_lora_of_a_request_compiles_nothing_anew(tiny: Tiny, tiny_lora: Path) -> None:
    plain, loaded, compiler = fresh(tiny("text")), fresh(tiny("text")), Counting()
    profiles.apply(loaded, "turbo", Means(None, compiler, None))
    without = generate(loaded)
    for one in (plain, loaded):
        one.pipe.load_lora_weights(tiny_lora.parent, weight_name=tiny_lora.name)
    called = compiler.called

    assert torch.equal(generate(plain), generate(loaded))
    assert (1, called) == (compiler.compiled, compiler.called)
    loaded.pipe.unload_lora_weights()
    assert torch.equal(without, generate(loaded))
    assert compiler.compiled == 1
    assert called < compiler.called


# -- fp8 ----------------------------------------------------------------------------------------------------------
def test_the_large_layers_become_fp8(tiny: Tiny) -> None:
    loaded = with_sides_for_fp8(fresh(tiny("text")))
    before = predict(loaded.experts[0])
    applied = profiles.apply(loaded, "turbo", Means(None, None, to_fp8_anywhere))

    changed = [
        name
        for name, module in loaded.experts[0].named_modules()
        if type(getattr(module, "weight", None)).__name__ == "Float8Tensor"
    ]
    large = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0"]
    large += ["ffn.net.0.proj", "ffn.net.2"]
    assert sorted(f"blocks.{layer}.{name}" for layer in range(3) for name in large) == sorted(changed)
    part = applied.part("fp8")
    assert part.words.startswith("24 linear layers, deviation ")
    assert part.deviation is not None
    assert 0 < part.deviation < profiles.LESS_PRECISION
    assert 0 < relative(predict(loaded.experts[0]), before) < profiles.LESS_PRECISION


def test_fp8_and_compiling_go_together(tiny: Tiny) -> None:
    loaded = with_sides_for_fp8(fresh(tiny("text")))
    compiler = Counting()
    applied = profiles.apply(loaded, "turbo", Means(None, compiler, to_fp8_anywhere))

    assert [True, True] == [applied.part(name).done for name in ("fp8", "compile")]
    assert applied.part("fp8").deviation == applied.part("compile").deviation


def test_a_device_without_fp8_changes_no_layer(tiny: Tiny) -> None:
    """torchao's own refusal, of a copy."""
    loaded = with_sides_for_fp8(fresh(tiny("text")))
    before = predict(loaded.experts[0])
    applied = profiles.apply(loaded, "fast", Means(None, None, profiles.to_fp8))

    assert applied.part("fp8").words.startswith("not used: Float8 dynamic quantization requires")
    assert torch.equal(before, predict(loaded.experts[0]))


def test_layers_that_fp8_ruins_are_left(tiny: Tiny) -> None:
    loaded = with_sides_for_fp8(fresh(tiny("text")))
    before = predict(loaded.experts[0])

    def ruin(linear: Any) -> None:
        linear.weight.data *= 1.5

    applied = profiles.apply(loaded, "fast", Means(None, None, ruin))
    assert applied.part("fp8").words.startswith("not used: a layer's result changed by 0.")
    assert torch.equal(before, predict(loaded.experts[0]))


def test_exact_never_rounds_to_fp8(tiny: Tiny) -> None:
    loaded = with_sides_for_fp8(fresh(tiny("text")))
    before = predict(loaded.experts[0])
    applied = profiles.apply(loaded, "exact", Means(None, None, to_fp8_anywhere))

    assert not applied.part("fp8").done
    assert torch.equal(before, predict(loaded.experts[0]))


# -- cache --------------------------------------------------------------------------------------------------------
def test_the_cache_is_off_for_few_steps_and_until_it_is_begun(tiny: Tiny) -> None:
    loaded = fresh(tiny("text-two-experts"))
    applied = profiles.apply(loaded, "fast", NOTHING)
    without = generate(fresh(tiny("text-two-experts")))

    assert applied.part("cache").done
    assert torch.equal(without, generate(loaded))
    assert not applied.begin(profiles.CACHE_STEPS - 1)
    assert torch.equal(without, generate(loaded))


def test_the_cache_skips_blocks_and_forgets_an_ended_job(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "CACHE_THRESHOLD", 1e9)  # random weights: what they skip is no matter here
    loaded, steps = fresh(tiny("text")), profiles.CACHE_STEPS
    without = generate(fresh(tiny("text")), steps=steps)
    applied = profiles.apply(loaded, "fast", NOTHING)
    assert applied.begin(steps)

    ran = []
    loaded.experts[0].blocks[1].ffn.register_forward_hook(lambda *_: ran.append(1))
    cached = generate(loaded, steps=steps)
    assert len(ran) == 2  # once for the prompt and once for the negative one, then never
    assert not torch.equal(without, cached)

    stop = Stop()
    with pytest.raises(EngineError, match="ended before"):
        Denoiser(loaded, Embeddings()).run(
            msgspec.structs.replace(SMALL, steps=steps), stop, lambda *_: stop.set()
        )
    assert torch.equal(cached, generate(loaded, steps=steps))
    assert not applied.begin(3)
    assert torch.equal(generate(fresh(tiny("text"))), generate(loaded))


@pytest.mark.parametrize(("kind", "profile"), [("vace", "fast"), ("text", "turbo"), ("text", "exact")])
def test_where_a_cache_is_unsound_there_is_none(tiny: Tiny, kind: tiny_diffusers.Kind, profile: str) -> None:
    loaded = fresh(tiny(kind))
    applied = profiles.apply(loaded, profile, NOTHING)

    assert not applied.part("cache").done
    assert not applied.begin(1000)
    assert not any(expert.is_cache_enabled for expert in loaded.experts)


# -- attention ----------------------------------------------------------------------------------------------------
def test_kernels_that_are_not_there_are_passed_over(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "exact_kernels", lambda _capability: ("_flash_3", "sage", "no such kernel"))
    loaded = fresh(tiny("image-two-experts"))
    before = predict(loaded.experts[1])
    applied = profiles.apply(loaded, "exact", Means((9, 0), None, None))

    words = applied.part("attention").words
    assert words.startswith("PyTorch's own, as stock has it (not _flash_3: ")
    assert "; not sage: " in words
    assert "; not no such kernel: " in words
    assert torch.equal(before, predict(loaded.experts[1]))


def test_a_kernel_is_set_for_its_model_alone(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "exact_kernels", lambda _capability: ("_native_math",))
    loaded = fresh(tiny("text"))
    applied = profiles.apply(loaded, "exact", Means((9, 0), None, None))

    part = applied.part("attention")
    assert part.words.startswith("_native_math, deviation ")
    assert part.deviation is not None
    assert part.deviation < profiles.SAME_MATHS
    assert loaded.experts[0].blocks[0].attn1.processor._attention_backend == "_native_math"
    other = fresh(tiny("text")).experts[0].blocks[0].attn1.processor
    assert other._attention_backend is None
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    assert _AttentionBackendRegistry.get_active_backend()[0] == "native"


# peft cannot merge into fp8, says so in advance, and is never asked to
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning")
def test_a_lora_of_a_request_goes_on_top_of_fp8(tiny: Tiny, tmp_path: Path) -> None:
    """It stays in its own precision, and leaves nothing behind."""
    from rushes.engines.wan.loras import added

    loaded = with_sides_for_fp8(fresh(tiny("text")))
    profiles.apply(loaded, "turbo", Means(None, None, to_fp8_anywhere))
    expert = loaded.experts[0]
    before = predict(expert)
    draw = torch.Generator().manual_seed(1)
    name = "transformer.blocks.0.attn1.to_q"
    lora = {f"{name}.lora_{part}.weight": torch.randn(4, 32, generator=draw) for part in "AB"}
    lora[f"{name}.lora_B.weight"] = lora[f"{name}.lora_B.weight"].T.contiguous()
    from safetensors.torch import save_file

    save_file(lora, tmp_path / "one.safetensors")
    with added(loaded, [("one.safetensors", 1.0)], tmp_path):
        assert not torch.equal(before, predict(expert))
    assert torch.equal(before, predict(expert))
