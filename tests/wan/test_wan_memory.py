"""Where the weights lie, and the ladder: on a processor, where group offloading does all but use another memory."""

import errno
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra: pip install 'rushes[wan]'")

import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from PIL import Image

from rushes.catalog.wan import WanModel
from rushes.engines.wan import main_memory, memory
from rushes.engines.wan.load import Loaded, load
from rushes.engines.wan.memory import (
    WORKSPACE,
    Need,
    Placement,
    Rung,
    bytes_of,
    bytes_to_stream,
    climb,
    is_out_of_memory,
    locked_bytes_of,
    mend,
    place,
    waiting,
)
from rushes.engines.wan.weights import Local
from rushes.errors import EngineError

GIB = 2**30
A14B = Need(transformers=57 * GIB, text_encoder=11 * GIB, rest=GIB)
I2V14B = Need(transformers=31 * GIB, text_encoder=11 * GIB, rest=3 * GIB)
T2V1B = Need(transformers=3 * GIB, text_encoder=11 * GIB, rest=GIB)


def loaded_from(folder: Path) -> Loaded:
    return load(
        Local(folder=folder), WanModel(weights="./weights"), turbo=False, device="cpu", tell=lambda _text: None
    )


def latents(loaded: Loaded, prompt: str = "a cat", size: int = 64, **more: Any) -> torch.Tensor:
    if loaded.kind == "image":
        more["image"] = Image.new("RGB", (size, size), (200, 30, 90))
    with loaded.text_on_card():
        embeddings, _ = loaded.pipe.encode_prompt(prompt, None, False, max_sequence_length=512)
    return loaded.pipe(
        prompt_embeds=embeddings,
        height=size,
        width=size,
        num_frames=5,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **more,
    ).frames


# -- decisions ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("need", "card", "placement"),
    [
        (A14B, 140, Placement.RESIDENT),
        (A14B, 79, Placement.TEXT_WAITS),
        (A14B, 47, Placement.OFFLOAD),
        (I2V14B, 79, Placement.RESIDENT),
        (I2V14B, 60, Placement.TEXT_WAITS),
        (I2V14B, 47, Placement.OFFLOAD),
        (T2V1B, 47, Placement.RESIDENT),
        (T2V1B, 31, Placement.TEXT_WAITS),
        (T2V1B, 23, Placement.OFFLOAD),
    ],
)
def test_what_fits_stays_on_the_card(need, card, placement):
    assert placement == place(need, card * GIB)


def test_the_bounds_are_the_weights_and_the_room_for_work():
    need = Need(transformers=40, text_encoder=20, rest=3)
    assert Placement.RESIDENT == place(need, WORKSPACE + 63)
    assert Placement.TEXT_WAITS == place(need, WORKSPACE + 62)
    assert Placement.TEXT_WAITS == place(need, WORKSPACE + 43)
    assert Placement.OFFLOAD == place(need, WORKSPACE + 42)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_lack_of_memory_is_known_in_all_its_forms(error):
    assert is_out_of_memory(error)
    wrapped = ValueError("the pipeline failed")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (4) must match the size of tensor b (5)"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("out of memory"),
        EngineError("aborted", "The request was ended."),
    ],
)
def test_other_errors_are_none(error):
    assert not is_out_of_memory(error)


def test_an_error_met_while_memory_was_being_freed_is_its_own():
    error = KeyError("a mistake")
    error.__context__ = torch.OutOfMemoryError("CUDA out of memory.")
    assert not is_out_of_memory(error)


def test_torch_s_own_failure_to_allocate_is_lack_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("placement", "bytes_"), [(Placement.RESIDENT, 0), (Placement.TEXT_WAITS, 20), (Placement.OFFLOAD, 60)]
)
def test_what_waits_does_so_in_main_memory(placement, bytes_):
    assert bytes_ == waiting(Need(transformers=40, text_encoder=20, rest=3), placement)


def test_locked_pages_are_counted_by_powers_of_two():
    module = torch.nn.Linear(5, 3)  # 60 and 12 bytes
    module.register_buffer("whole", torch.zeros(8, dtype=torch.float64))
    module.register_buffer("empty", torch.zeros(0))
    assert 64 + 16 + 64 == locked_bytes_of(module)


def test_weights_that_cannot_be_locked_wait_as_they_are(monkeypatch, capfd):
    """Without a card nothing can be locked, and with too little main memory nothing is tried."""
    module = torch.nn.Linear(5, 3)
    before = module.weight.clone()
    monkeypatch.setattr(main_memory, "available", lambda: 2**30)
    memory._lock(module)
    assert not capfd.readouterr().err
    monkeypatch.setattr(main_memory, "available", lambda: 2**40)
    memory._lock(module)
    assert module.weight.is_pinned() or "weights not locked in memory" in capfd.readouterr().err
    assert torch.equal(before, module.weight)


def test_to_stream_takes_the_locked_pages_beside_one_expert_at_a_time(tiny):
    """The device ``meta`` stands for a card: what comes from there lay in no main memory."""
    experts = loaded_from(tiny("text-two-experts")).experts
    locked, plain = locked_bytes_of(experts[0]), bytes_of(experts[0])
    assert plain < locked
    assert 2 * locked - plain == bytes_to_stream(experts)
    for expert in experts:
        expert.to("meta")
    assert 2 * locked == bytes_to_stream(experts)
    assert locked == bytes_to_stream(experts[:1])


# -- the ladder -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["text-two-experts", "image", "vace"])
def test_nothing_but_the_place_changes_when_the_weights_leave(tiny, kind):
    loaded = loaded_from(tiny(kind))
    plain = latents(loaded)
    before = {name: tensor.clone() for name, tensor in loaded.pipe.transformer.state_dict().items()}
    climb(loaded, Rung.OFFLOAD)
    assert (Placement.OFFLOAD, Rung.OFFLOAD) == (loaded.placement, loaded.rung)
    assert all(_is_group_offload_enabled(part) for part in (*loaded.experts, loaded.pipe.text_encoder))
    assert torch.equal(plain, latents(loaded))
    after = loaded.pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_rungs_are_climbed_one_by_one_and_never_down(tiny):
    loaded = loaded_from(tiny("text"))
    climb(loaded, Rung.PLAIN)
    assert (Rung.PLAIN, Placement.RESIDENT) == (loaded.rung, loaded.placement)
    assert not loaded.decoder.use_tiling
    climb(loaded, Rung.SAVING)
    assert (Rung.SAVING, Placement.TEXT_WAITS) == (loaded.rung, loaded.placement)
    assert loaded.decoder.use_tiling
    assert loaded.pipe.vae.use_tiling
    assert not _is_group_offload_enabled(loaded.pipe.transformer)
    for rung in (Rung.OFFLOAD, Rung.OFFLOAD, Rung.SAVING, Rung.PLAIN):
        climb(loaded, rung)
        assert (Rung.OFFLOAD, Placement.OFFLOAD) == (loaded.rung, loaded.placement)
        assert loaded.decoder.use_tiling


def test_the_rung_in_words_is_logged_once(tiny, capfd):
    loaded = loaded_from(tiny("text"))
    climb(loaded, Rung.SAVING)
    climb(loaded, Rung.SAVING)
    assert 1 == capfd.readouterr().err.count('"memory ladder climbed","rung":"saving"')


def test_a_job_that_was_ended_between_two_blocks_leaves_nothing_behind(tiny):
    loaded = loaded_from(tiny("text-two-experts"))
    plain = latents(loaded, "a blue cat")
    climb(loaded, Rung.OFFLOAD)

    def end(*_: Any) -> None:
        raise EngineError("aborted", "The request was ended.")

    handle = loaded.pipe.transformer.blocks[1].register_forward_pre_hook(end)
    with pytest.raises(EngineError):
        latents(loaded)
    handle.remove()
    mend(loaded)
    assert all(_is_group_offload_enabled(part) for part in (*loaded.experts, loaded.pipe.text_encoder))
    assert torch.equal(plain, latents(loaded, "a blue cat"))


def test_mending_a_model_on_the_card_changes_nothing(tiny):
    loaded = loaded_from(tiny("text"))
    mend(loaded)
    assert not _is_group_offload_enabled(loaded.pipe.transformer)


def test_the_text_encoder_comes_for_the_time_of_its_use(tiny):
    """Torch's device `meta` holds no numbers: what comes back is what was kept, and nothing was copied."""
    loaded = loaded_from(tiny("text"))
    before = {name: tensor.clone() for name, tensor in loaded.pipe.text_encoder.state_dict().items()}
    climb(loaded, Rung.SAVING)
    loaded.device = torch.device("meta")
    for fails in (False, True):
        try:
            with loaded.text_on_card():
                assert {"meta"} == {one.device.type for one in loaded.pipe.text_encoder.parameters()}
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            assert fails
        after = loaded.pipe.text_encoder.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
    tied = loaded.pipe.text_encoder
    assert tied.shared.weight is tied.encoder.embed_tokens.weight


@pytest.mark.parametrize("rung", [Rung.PLAIN, Rung.OFFLOAD])
def test_the_text_encoder_stays_where_it_is_otherwise(tiny, rung):
    loaded = loaded_from(tiny("text"))
    climb(loaded, rung)
    loaded.device = torch.device("meta")
    with loaded.text_on_card():
        assert {"cpu"} == {one.device.type for one in loaded.pipe.text_encoder.parameters()}


def test_weights_that_main_memory_cannot_take_stay_and_the_process_goes(tiny, monkeypatch):
    """The device ``meta`` stands for a card: nothing lies in main memory yet."""
    loaded = loaded_from(tiny("text"))
    loaded.pipe.text_encoder.to("meta")
    monkeypatch.setattr(main_memory, "available", lambda: 9)
    for rung in (Rung.SAVING, Rung.OFFLOAD):
        with pytest.raises(EngineError, match="GiB of main memory") as caught:
            climb(loaded, rung)
        assert ("out_of_memory", True) == (caught.value.reason, caught.value.replace)
    assert (Rung.PLAIN, Placement.RESIDENT) == (loaded.rung, loaded.placement)
    assert "meta" == loaded.pipe.text_encoder.device.type


def test_tiles_are_used_where_a_picture_is_larger_than_one(tiny):
    loaded = loaded_from(tiny("text"))
    given = torch.randn(1, 16, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = loaded.decoder.decode(given).sample
        climb(loaded, Rung.SAVING)
        tiled = loaded.decoder.decode(given).sample
        small = loaded.decoder.decode(given[..., :16, :16]).sample
    assert whole.shape == tiled.shape
    assert not torch.equal(whole, tiled)
    assert (1, 3, 1, 128, 128) == small.shape
