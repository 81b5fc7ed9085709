"""A job of the Wan engine that is ended, or fails, in the middle; and the next one on the same weights."""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra: pip install 'rushes[wan]'")

import msgspec
import torch
from diffusers import FirstBlockCacheConfig

from rushes.engines.wan.denoise import Denoiser, Stop
from rushes.engines.wan.memory import Rung, climb
from rushes.engines.wan.prompts import Embeddings
from rushes.errors import EngineError
from support.tiny_diffusers import Kind
from support.wan_running import SMALL, fresh, picture

Tiny = Callable[[Kind], Path]
Prepare = Callable[[Any], None]


def as_loaded(loaded: Any) -> None:
    pass


def with_cache(loaded: Any) -> None:
    for expert in loaded.experts:
        expert.enable_cache(FirstBlockCacheConfig(threshold=0.9))


def with_offload(loaded: Any) -> None:
    climb(loaded, Rung.OFFLOAD)


def compiled(loaded: Any) -> None:
    for expert in loaded.experts:
        expert.compile_repeated_blocks(backend="eager")


WAYS: list[tuple[Kind, Prepare]] = [
    ("text", as_loaded),
    ("text", with_cache),
    ("text", with_offload),
    ("text", compiled),
    ("vace-two-experts", as_loaded),
    ("vace-two-experts", with_offload),
]


@contextmanager
def counted(module: Any, act: Callable[[int], None]) -> Iterator[list[int]]:
    """Calls of ``module`` up to now; ``act`` is called before each, with its number from 1."""
    numbers: list[int] = []

    def before(*_: Any) -> None:
        numbers.append(len(numbers) + 1)
        act(len(numbers))

    handle = module.register_forward_pre_hook(before)
    try:
        yield numbers
    finally:
        handle.remove()


def aborted(denoiser: Denoiser, plan: Any, stop: Stop, on_step: Any = lambda *_: None) -> None:
    with pytest.raises(EngineError) as caught:
        denoiser.run(plan, stop, on_step)
    assert "aborted" == caught.value.reason


def test_before_it_begins(tiny: Tiny) -> None:
    loaded, stop = fresh(tiny("text")), Stop()
    stop.set()
    with counted(loaded.pipe.text_encoder, lambda _: None) as asked:
        aborted(Denoiser(loaded, Embeddings()), SMALL, stop)
    assert [] == asked


@pytest.mark.parametrize(("kind", "prepare"), WAYS)
def test_the_next_job_is_that_of_a_fresh_engine(
    kind: Kind, prepare: Prepare, tiny: Tiny, tmp_path: Path
) -> None:
    references = (picture(tmp_path / "a.png", 64, 48),) if kind.startswith("vace") else ()
    plan = msgspec.structs.replace(SMALL, reference_images=references)
    clean = fresh(tiny(kind))
    prepare(clean)
    expected = Denoiser(clean, Embeddings()).run(plan, Stop(), lambda *_: None)
    loaded = fresh(tiny(kind))
    prepare(loaded)
    denoiser = Denoiser(loaded, Embeddings())
    other = msgspec.structs.replace(plan, prompt="the golden sea", seed=1)

    stop = Stop()
    done: list[int] = []

    def after_the_second(step: int, *_: Any) -> None:
        done.append(step)
        if step == 2:
            stop.set()

    aborted(denoiser, other, stop, after_the_second)
    assert [1, 2] == done
    assert torch.equal(expected, denoiser.run(plan, Stop(), lambda *_: None))

    for when in (1, 3):  # in the first step, and in a later one
        stop = Stop()
        expert = loaded.experts[0]
        with (
            counted(
                expert, lambda number, when=when, stop=stop: stop.set() if number == when else None
            ) as asked,
            counted(expert.proj_out, lambda _: None) as ended,
        ):
            aborted(denoiser, other, stop)
        assert when == len(asked)
        assert when - 1 == len(ended)
        assert torch.equal(expected, denoiser.run(plan, Stop(), lambda *_: None))


def test_within_one_block_from_another_thread(tiny: Tiny) -> None:
    loaded, stop = fresh(tiny("text")), Stop()
    first, second = loaded.pipe.transformer.blocks[:2]

    def from_another_thread(number: int) -> None:
        if number == 2:
            thread = threading.Thread(target=stop.set)
            thread.start()
            thread.join()

    with (
        counted(first, from_another_thread) as begun,
        counted(first.attn1, lambda _: None) as worked,
        counted(second, lambda _: None) as next_ones,
    ):
        aborted(Denoiser(loaded, Embeddings()), SMALL, stop)

    assert [1, 2] == begun
    assert [1] == worked
    assert [1] == next_ones


def test_an_ended_job_tells_of_no_further_step(tiny: Tiny) -> None:
    loaded, stop = fresh(tiny("text")), Stop()
    told: list[int] = []
    with counted(loaded.pipe.transformer.proj_out, lambda number: stop.set() if number == 4 else None):
        aborted(Denoiser(loaded, Embeddings()), SMALL, stop, lambda step, *_: told.append(step))
    assert [1] == told


@pytest.mark.parametrize("where", ["text_encoder", "vae"])
def test_in_the_encoders(where: str, tiny: Tiny, tmp_path: Path) -> None:
    plan = msgspec.structs.replace(SMALL, start_image=picture(tmp_path / "a.png", 64, 48))
    expected = Denoiser(fresh(tiny("image")), Embeddings()).run(plan, Stop(), lambda *_: None)
    loaded, stop = fresh(tiny("image")), Stop()
    denoiser = Denoiser(loaded, Embeddings())
    encoder = loaded.pipe.text_encoder.encoder.block[1] if where == "text_encoder" else loaded.pipe.vae.encoder

    with (
        counted(encoder, lambda number: stop.set() if number == 2 else None) as asked,
        counted(loaded.pipe.transformer, lambda _: None) as denoised,
    ):
        aborted(denoiser, plan, stop)

    assert [1, 2] == asked
    assert [] == denoised
    assert torch.equal(expected, denoiser.run(plan, Stop(), lambda *_: None))


def test_a_failure_on_a_step_leaves_nothing_behind(tiny: Tiny) -> None:
    loaded = fresh(tiny("text"))
    denoiser = Denoiser(loaded, Embeddings())
    expected = denoiser.run(SMALL, Stop(), lambda *_: None)
    before = dict(loaded.pipe.__dict__)
    seen: list[Any] = []

    def fails(step: int, _steps: int, latents: torch.Tensor) -> None:
        seen.append(weakref.ref(latents))
        if step == 2:
            raise RuntimeError("the preview's disk is full")

    with pytest.raises(RuntimeError, match="disk is full") as caught:
        denoiser.run(SMALL, Stop(), fails)

    assert caught.value.__traceback__ is not None
    assert [None, None] == [latents() for latents in seen]  # though the error is still held
    assert before == loaded.pipe.__dict__
    assert not any(module._forward_pre_hooks for part in loaded.experts for module in part.modules())
    assert torch.equal(expected, denoiser.run(SMALL, Stop(), lambda *_: None))


def test_the_stop_of_one_job_is_not_that_of_another_thread(tiny: Tiny) -> None:
    """While one job denoises, the other lane may read its prompt with the same text encoder."""
    loaded, embeddings = fresh(tiny("text")), Embeddings()
    found: list[torch.Tensor] = []
    stop = Stop()

    def other_lane(step: int, *_: Any) -> None:
        if step == 1:
            stop.set()
            thread = threading.Thread(
                target=lambda: found.append(embeddings.get(loaded, "the blue sea", None)[0])
            )
            thread.start()
            thread.join()

    aborted(Denoiser(loaded, embeddings), SMALL, stop, other_lane)

    assert torch.equal(Embeddings().get(loaded, "the blue sea", None)[0], found[0])


def test_compiled_blocks_are_not_compiled_anew_for_each_job(tiny: Tiny) -> None:
    loaded = fresh(tiny("text"))
    compiled(loaded)
    denoiser = Denoiser(loaded, Embeddings())
    seen: list[int] = []

    for seed in range(3):
        denoiser.run(msgspec.structs.replace(SMALL, seed=seed), Stop(), lambda *_: None)
        seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    assert 0 < seen[0]
    assert seen[0] == seen[1] == seen[2]


def test_a_transformer_that_is_compiled_as_a_whole_ends_within_one_call(tiny: Tiny) -> None:
    loaded, stop = fresh(tiny("text")), Stop()
    transformer = loaded.pipe.transformer
    transformer.compile(backend="eager")
    call = transformer._compiled_call_impl
    asked: list[bool] = []

    def ended_in_the_first(*args: Any, **named: Any) -> Any:
        asked.append(True)
        stop.set()
        return call(*args, **named)

    transformer._compiled_call_impl = ended_in_the_first
    aborted(Denoiser(loaded, Embeddings()), SMALL, stop)

    assert [True] == asked
    assert ended_in_the_first is transformer._compiled_call_impl
