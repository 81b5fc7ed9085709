"""Loading: the stock pipeline bit for bit, LoRAs fused into their expert, clear words for what is unusable."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra: pip install 'rushes[wan]'")

import diffusers
import torch
from safetensors.torch import load_file, save_file

from rushes.catalog.wan import WanLora, WanModel
from rushes.engines.wan import main_memory
from rushes.engines.wan.load import Loaded, load
from rushes.engines.wan.memory import WORKSPACE, Placement
from rushes.engines.wan.weights import Local
from rushes.errors import EngineError
from support import tiny_diffusers

WAN = WanModel(weights="./weights")
PIPELINES = {"text": "WanPipeline", "image": "WanImageToVideoPipeline", "vace": "WanVACEPipeline"}


def loaded_from(folder: Path, *loras: tuple[Path, WanLora], tell=lambda _text: None, **more: Any) -> Loaded:
    options = {"turbo": False, "device": "cpu"} | more
    return load(Local(folder=folder, loras=loras), WAN, tell=tell, **options)


def stock(folder: Path) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def weights_of(module: Any) -> dict[str, torch.Tensor]:
    return module.state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) and tensor.dtype == second[name].dtype
        for name, tensor in first.items()
    )


@pytest.fixture
def copied(tiny, tmp_path: Path) -> Callable[[tiny_diffusers.Kind], Path]:
    """A pipeline of one's own, to be harmed."""

    def copy(kind: tiny_diffusers.Kind) -> Path:
        return Path(shutil.copytree(tiny(kind), tmp_path / "harmed"))

    return copy


def refused(folder: Path, *loras: tuple[Path, WanLora]) -> str:
    """What a user reads; it names no place of this machine."""
    before = torch.get_default_dtype()
    with pytest.raises(EngineError) as caught:
        loaded_from(folder, *loras)
    assert "weights_unusable" == caught.value.reason
    assert not caught.value.retryable
    assert str(folder.parent) not in caught.value.message
    assert before == torch.get_default_dtype()
    return caught.value.message


# -- what is loaded -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", tiny_diffusers.KINDS)
def test_every_kind_is_the_stock_pipeline_with_its_weights(tiny, kind):
    pipe, loaded = stock(tiny(kind)), loaded_from(tiny(kind))
    assert PIPELINES[loaded.kind] == type(loaded.pipe).__name__ == type(pipe).__name__
    assert loaded.kind == kind.split("-")[0]
    assert (2 if "two-experts" in kind else 1) == len(loaded.experts)
    assert loaded.experts[0] is loaded.pipe.transformer
    assert pipe.config.boundary_ratio == loaded.pipe.config.boundary_ratio
    for name in ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder"):
        theirs, ours = getattr(pipe, name, None), getattr(loaded.pipe, name, None)
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            assert same(weights_of(theirs), weights_of(ours)), name
            assert not any(parameter.requires_grad for parameter in ours.parameters())
            assert not ours.training
    assert torch.float32 == loaded.dtype
    assert (torch.device("cpu"), Placement.RESIDENT) == (loaded.device, loaded.placement)


def test_what_is_being_loaded_is_told(tiny):
    told: list[str] = []
    loaded_from(tiny("image"), tell=told.append)
    assert [
        "checking the weights",
        "loading the text encoder",
        "loading the image encoder",
        "loading the VAE",
        "loading the transformer",
        "putting the pipeline together",
    ] == told


def test_on_the_processor_weights_stay_in_the_type_they_are_stored_in(copied):
    folder = copied("text")
    for file in (folder / "transformer").glob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    loaded = loaded_from(folder)
    assert torch.bfloat16 == loaded.dtype
    assert torch.bfloat16 == loaded.pipe.transformer.blocks[0].attn1.to_q.weight.dtype
    assert torch.float32 == loaded.pipe.transformer.scale_shift_table.dtype  # diffusers keeps these as they are
    assert torch.float32 == loaded.pipe.text_encoder.dtype
    assert torch.float32 == loaded.pipe.vae.dtype


def test_the_decoder_has_the_same_weights_and_its_own_state(tiny):
    loaded = loaded_from(tiny("text"))
    theirs, ours = loaded.pipe.vae, loaded.decoder
    assert all(one is other for one, other in zip(theirs.parameters(), ours.parameters(), strict=True))
    with torch.no_grad():
        latents = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(1))
        expected = theirs.decode(latents).sample
        video = torch.randn(1, 3, 5, 64, 64, generator=torch.Generator().manual_seed(2))
        theirs.clear_cache()
        ours.clear_cache()
        theirs._enc_feat_map[0] = theirs._feat_map[0] = video  # as if in the middle of another job
        assert ours._feat_map[0] is None
        assert ours._enc_feat_map[0] is None
        assert torch.equal(expected, ours.decode(latents).sample)


@pytest.mark.parametrize("prompts", [("日本", "中国"), ("кот", "пёс"), ("قطة", "كلب"), ("🐈", "🐕")])
def test_prompts_in_every_script_are_told_apart(tiny, prompts):
    loaded = loaded_from(tiny("text"))
    unknown = loaded.pipe.tokenizer.unk_token_id
    ids = [loaded.pipe.tokenizer(prompt).input_ids for prompt in prompts]
    assert ids[0] != ids[1]
    assert unknown not in ids[0] + ids[1]


def test_prompts_of_known_words_are_read_as_the_stock_tokenizer_does(tiny):
    pipe, loaded = stock(tiny("text")), loaded_from(tiny("text"))
    text = "a cat walks in  golden light, wide shot?"
    known = "".join(letter for letter in text if letter not in ",?")
    assert pipe.tokenizer(known).input_ids == loaded.pipe.tokenizer(known).input_ids


# -- LoRAs ----------------------------------------------------------------------------------------------------------
def fused(folder: Path, file: Path, expert: str, scale: float) -> dict[str, torch.Tensor]:
    """The weights of an expert with a LoRA in diffusers' names added by arithmetic."""
    lora = load_file(file)
    weights = weights_of(getattr(stock(folder), expert))
    for name in [name for name in lora if name.endswith(".lora_A.weight")]:
        layer = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
        up, down = lora[name.replace("lora_A", "lora_B")], lora[name]
        weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + scale * (up @ down)
    return weights


def close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.allclose(tensor, second[name], atol=1e-5) for name, tensor in first.items()
    )


@pytest.mark.parametrize(
    ("experts", "touched"),
    [("both", {"transformer", "transformer_2"}), ("high", {"transformer"}), ("low", {"transformer_2"})],
)
def test_a_lora_is_fused_into_its_experts_only(tiny, tiny_lora, experts, touched):
    folder = tiny("image-two-experts")
    lora = WanLora(source="./loras", path=tiny_lora.name, scale=0.7, experts=experts)
    loaded, plain = loaded_from(folder, (tiny_lora, lora)), stock(folder)
    for name in ("transformer", "transformer_2"):
        found, before = weights_of(getattr(loaded.pipe, name)), weights_of(getattr(plain, name))
        assert (name not in touched) == same(before, found)
        assert name not in touched or close(fused(folder, tiny_lora, name, 0.7), found)


@pytest.mark.parametrize("kind", ["image", "vace", "text"])
def test_loras_in_the_original_names_fit_too(tiny, tmp_path, kind):
    ours = tiny_diffusers.save_lora(tmp_path / "ours.safetensors", seed=3)
    original = tiny_diffusers.save_lora(tmp_path / "original.safetensors", seed=3, layout="original")
    loaded = loaded_from(tiny(kind), (original, WanLora(source="./loras", path=original.name)))
    assert close(fused(tiny(kind), ours, "transformer", 1.0), weights_of(loaded.pipe.transformer))


def test_several_loras_add_up_and_turbo_s_come_only_with_turbo(tiny, tmp_path):
    files = [tiny_diffusers.save_lora(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 2)]
    first, second = [(file, WanLora(source="./loras", path=file.name)) for file in files]
    local = Local(folder=tiny("text"), loras=(first,), turbo_loras=(second,))

    def weights(*, turbo: bool) -> dict[str, torch.Tensor]:
        return weights_of(load(local, WAN, turbo=turbo, device="cpu", tell=lambda _text: None).pipe.transformer)

    one = fused(tiny("text"), files[0], "transformer", 1.0)
    other = fused(tiny("text"), files[1], "transformer", 1.0)
    plain = weights_of(stock(tiny("text")).transformer)
    assert close(one, weights(turbo=False))
    assert close({name: one[name] + other[name] - plain[name] for name in plain}, weights(turbo=True))


def test_a_lora_for_the_low_noise_expert_needs_one(tiny, tiny_lora):
    lora = WanLora(source="./loras", path=tiny_lora.name, experts="low")
    assert "has but one transformer" in refused(tiny("image"), (tiny_lora, lora))


def test_a_lora_for_something_else_is_refused(tiny, tmp_path):
    file = tmp_path / "flux.safetensors"
    save_file({f"transformer.single_blocks.0.q.lora_{one}.weight": torch.ones(4, 4) for one in "AB"}, file)
    assert "the LoRA flux.safetensors" in refused(
        tiny("text"), (file, WanLora(source="./loras", path=file.name))
    )


def test_a_lora_of_another_width_is_refused(tiny, tmp_path):
    file = tmp_path / "wide.safetensors"
    name = "transformer.blocks.0.attn1.to_q.lora_{}.weight"
    save_file({name.format("A"): torch.ones(4, 5120), name.format("B"): torch.ones(5120, 4)}, file)
    assert "the LoRA wide.safetensors" in refused(
        tiny("text"), (file, WanLora(source="./loras", path=file.name))
    )


def test_a_broken_lora_is_refused(tiny, tiny_lora, tmp_path):
    file = tmp_path / "cut.safetensors"
    file.write_bytes(tiny_lora.read_bytes()[:-100])
    assert "the LoRA cut.safetensors" in refused(
        tiny("text"), (file, WanLora(source="./loras", path=file.name))
    )


# -- what cannot be used --------------------------------------------------------------------------------------------
def weights_file(folder: Path, part: str) -> Path:
    return max((folder / part).glob("*.safetensors"), key=lambda file: file.stat().st_size)


@pytest.mark.parametrize("part", ["transformer", "transformer_2", "vae", "text_encoder"])
@pytest.mark.parametrize("harm", ["truncated", "empty", "garbage", "gone"])
def test_harmed_files_are_refused_by_name(copied, part, harm, capfd):
    folder = copied("text-two-experts")
    file = weights_file(folder, part)
    if harm == "gone":
        file.unlink()
    else:
        data = file.read_bytes()
        file.write_bytes(
            {"truncated": data[: len(data) // 2], "empty": b"", "garbage": b"\xff" * len(data)}[harm]
        )
    assert f"{part}/{file.name}" in refused(folder)
    assert "weights unusable" in capfd.readouterr().err


def without(file: Path, *names: str, instead: dict[str, torch.Tensor] | None = None) -> None:
    tensors = {name: one for name, one in load_file(file).items() if name not in names}
    save_file(tensors | (instead or {}), file, {"format": "pt"})


def forget(folder: Path, part: str, tensor: str) -> None:
    """Take a tensor out of the index as well."""
    for file in (folder / part).glob("*.index.json"):
        index = json.loads(file.read_text())
        index["weight_map"].pop(tensor)
        file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("transformer", "blocks.1.attn1.to_q.weight"),
        ("vae", "decoder.conv_in.bias"),
        ("text_encoder", "encoder.final_layer_norm.weight"),
        ("image_encoder", "post_layernorm.weight"),
    ],
)
def test_missing_tensors_are_refused_by_name(copied, part, tensor):
    """Their libraries would fill them with random numbers."""
    folder = copied("image")
    (stored,) = [name for name in tiny_diffusers.tensors(folder, part) if name.endswith(tensor)]
    without(folder / part / tiny_diffusers.tensors(folder, part)[stored], stored)
    forget(folder, part, stored)
    message = refused(folder)
    assert f"{part} lacks" in message
    assert tensor in message


def test_a_shard_that_lacks_what_the_index_looks_for_is_refused_by_name(copied):
    folder = copied("text")
    tensor = "blocks.1.attn1.to_q.weight"
    file = tiny_diffusers.tensors(folder, "transformer")[tensor]
    without(folder / "transformer" / file, tensor)
    assert f"transformer/{file} lacks {tensor}" in refused(folder)


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("transformer", "blocks.0.ffn.net.0.proj.weight"),
        ("vae", "decoder.conv_in.weight"),
        ("text_encoder", "shared.weight"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(copied, part, tensor):
    folder = copied("text")
    file = folder / part / tiny_diffusers.tensors(folder, part)[tensor]
    without(file, instead={tensor: torch.zeros(3, 3)})
    message = refused(folder)
    assert part in message
    assert tensor in message


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("_class_name", "FluxPipeline", "'FluxPipeline'"),
        ("_class_name", None, "'None'"),
        ("transformer", ["diffusers", "FluxTransformer2DModel"], "'FluxTransformer2DModel'"),
        ("vae", [None, None], "names no vae"),
        ("boundary_ratio", 0.9, "boundary_ratio and transformer_2"),
        ("transformer", "nothing", "names no transformer"),
    ],
)
def test_another_pipeline_is_refused(copied, key, value, said):
    folder = copied("text")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {key: value}))
    message = refused(folder)
    assert "model_index.json" in message
    assert said in message


@pytest.mark.parametrize("text", [None, "", "{", "[]", '"words"'])
def test_a_folder_without_an_index_is_refused(copied, text):
    folder = copied("text")
    (folder / "model_index.json").unlink()
    if text is not None:
        (folder / "model_index.json").write_text(text)
    assert "model_index.json" in refused(folder)


@pytest.mark.parametrize(
    "part", ["vae", "transformer", "scheduler", "tokenizer", "image_encoder", "image_processor"]
)
def test_a_missing_folder_is_refused_by_name(copied, part):
    folder = copied("image")
    shutil.rmtree(folder / part)
    assert f"{part}/" in refused(folder)


@pytest.mark.parametrize(("part", "config"), [("transformer", {"num_layers": "two"}), ("vae", {"dim_mult": 4})])
def test_a_config_that_means_nothing_is_refused(copied, part, config):
    folder = copied("text")
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    assert part in refused(folder)


def test_an_image_model_without_its_image_encoder_is_refused(copied):
    folder = copied("image")
    index = json.loads((folder / "model_index.json").read_text())
    index["image_encoder"] = index["image_processor"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert "names no image_encoder" in refused(folder)


def test_weights_in_pickles_are_refused(copied):
    folder = copied("text")
    file = weights_file(folder, "vae")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    assert "vae/diffusion_pytorch_model.safetensors is missing" in refused(folder)


# -- memory ---------------------------------------------------------------------------------------------------------
def fails(times: int, at: str) -> Callable[[str], None]:
    """Memory runs out where ``at`` is about to be loaded, as often as this."""
    left = [times]

    def tell(text: str) -> None:
        if text == at and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return tell


PLENTY = 2**50


@pytest.mark.parametrize(("times", "placement"), [(0, "RESIDENT"), (1, "TEXT_WAITS"), (2, "OFFLOAD")])
def test_memory_that_runs_out_while_loading_makes_it_ask_for_less(tiny, times, placement):
    folder = tiny("text-two-experts")
    loaded = loaded_from(folder, tell=fails(times, "loading the second transformer"), free=PLENTY)
    assert Placement[placement] == loaded.placement
    assert same(weights_of(stock(folder).transformer_2), weights_of(loaded.pipe.transformer_2))


@pytest.mark.parametrize(("times", "free"), [(3, PLENTY), (1, None), (1, 0)])
def test_where_nothing_less_can_be_asked_for_the_process_is_replaced(tiny, times, free):
    with pytest.raises(EngineError) as caught:
        loaded_from(tiny("text"), tell=fails(times, "putting the pipeline together"), free=free)
    assert ("out_of_memory", True, False) == (caught.value.reason, caught.value.replace, caught.value.retryable)


def test_what_is_no_lack_of_memory_passes_unchanged(tiny):
    def tell(text: str) -> None:
        raise ZeroDivisionError(text)

    with pytest.raises(ZeroDivisionError, match="checking"):
        loaded_from(tiny("text"), tell=tell, free=PLENTY)


@pytest.mark.parametrize(("beside", "placement"), [(0, "RESIDENT"), (-1, "TEXT_WAITS")])
def test_what_is_free_decides_where_the_weights_begin(tiny, beside, placement):
    folder = tiny("text-two-experts")
    pipe = stock(folder)
    parts = (pipe.transformer, pipe.transformer_2, pipe.vae, pipe.text_encoder)
    weights = sum(one.nbytes for part in parts for one in part.parameters())
    assert Placement[placement] == loaded_from(folder, free=WORKSPACE + weights + beside).placement
    assert Placement.OFFLOAD == loaded_from(folder, free=WORKSPACE).placement


@pytest.mark.parametrize(("placement", "bytes_"), [("TEXT_WAITS", "text"), ("OFFLOAD", "text and transformer")])
def test_what_main_memory_cannot_take_is_not_read(tiny, monkeypatch, placement, bytes_):
    folder, told = tiny("text"), list[str]()
    pipe = stock(folder)
    parts = {"text": (pipe.text_encoder,), "text and transformer": (pipe.text_encoder, pipe.transformer)}
    needed = sum(one.nbytes for part in parts[bytes_] for one in part.parameters())
    free = WORKSPACE + (sum(one.nbytes for part in (pipe.transformer, pipe.vae) for one in part.parameters()))
    free -= 0 if placement == "TEXT_WAITS" else 1

    monkeypatch.setattr(main_memory, "available", lambda: needed - 1)
    with pytest.raises(EngineError, match="of main memory") as caught:
        loaded_from(folder, tell=told.append, free=free)
    assert ("out_of_memory", True) == (caught.value.reason, caught.value.replace)
    assert ["checking the weights"] == told
    monkeypatch.setattr(main_memory, "available", lambda: needed)
    assert Placement[placement] == loaded_from(folder, free=free).placement
