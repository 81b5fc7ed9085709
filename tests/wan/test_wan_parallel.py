"""One video made by two processes together, on the CPU with gloo: what several cards of a slot do.

Their latents are held to those of one process within :data:`SAME`.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import msgspec
import pytest

from support import tiny_diffusers, wan_rank_faults
from support.wan_engine import Heard, before, job, local, model
from support.wan_parallel import Together, await_end, is_running
from support.wan_running import SMALL, fresh, picture, stock_latents
from support.wan_serving import add_plain

torch = pytest.importorskip("torch", reason="needs the extra: pip install 'rushes[wan]'")
diffusers = pytest.importorskip("diffusers", reason="needs the extra: pip install 'rushes[wan]'")

from PIL import Image  # noqa: E402 - after the check for the extra

from rushes.cli.wan import _models  # noqa: E402
from rushes.engines.wan import layout, parts, profiles, ranks  # noqa: E402
from rushes.engines.wan.attention import CUDNN, fast_kernels, spread_kernels  # noqa: E402
from rushes.engines.wan.compiling import compile_blocks  # noqa: E402
from rushes.engines.wan.denoise import Stop  # noqa: E402
from rushes.engines.wan.engine import WanEngine  # noqa: E402
from rushes.engines.wan.memory import Rung, climb  # noqa: E402
from rushes.engines.wan.profiles import Means  # noqa: E402
from rushes.engines.wan.spreading import takes_heads  # noqa: E402
from rushes.errors import EngineError  # noqa: E402
from rushes.settings import Settings  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes where Linux has them")

Tiny = Callable[[tiny_diffusers.Kind], Path]
SAME: Final = {"rtol": 0.0, "atol": 1e-5}
"""Of latents that reach from about -7 to 7: sums over other shapes may round otherwise."""
UNEVEN = msgspec.structs.replace(SMALL, width=48, padded_width=48)
"""27 tokens, of which one process has 14."""


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LoRA that touches the last layer too, behind which the shares are put together."""
    folder = tmp_path_factory.mktemp("parallel-loras")
    tiny_diffusers.save_lora(folder / "tiny.safetensors")
    from safetensors.torch import load_file, save_file

    last = {
        "transformer.proj_out.lora_A.weight": torch.full((4, 24), 0.05),
        "transformer.proj_out.lora_B.weight": torch.full((64, 4), 0.05),
    }
    save_file(load_file(folder / "tiny.safetensors") | last, folder / "tiny.safetensors")
    return folder


@pytest.fixture(scope="class")
def text(tiny: Tiny, loras: Path) -> Iterator[Together]:
    made = Together(tiny("text"), loras_dir=loras)
    yield made
    made.close()


@pytest.fixture(scope="module")
def ordered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file at which the other process of :func:`two_experts` runs out of memory."""
    return tmp_path_factory.mktemp("orders") / "oom"


@pytest.fixture(scope="class")
def two_experts(tiny: Tiny, ordered: Path) -> Iterator[Together]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(wan_rank_faults.ORDER, str(ordered))
        command = (sys.executable, wan_rank_faults.__file__)
        torch._dynamo.reset()
        made = Together(tiny("image-two-experts"), command=command, means=wan_rank_faults.COMPILING)
    yield made
    made.close()


def shares(together: Together, plan: Any) -> tuple[Any, set[int]]:
    """Latents, and how many tokens came to the first block of this process."""
    seen = set()
    hook = (
        together.loaded.experts[0]
        .blocks[1]
        .register_forward_pre_hook(lambda _module, given: seen.add(given[0].shape[1]))
    )
    try:
        return together.run(plan), seen
    finally:
        hook.remove()


class TestText:
    """A group of its own: a process can be of one at a time. The last test is its end."""

    @pytest.mark.parametrize(("plan", "share"), [(SMALL, 18), (UNEVEN, 14)], ids=["even", "uneven"])
    def test_text_to_video_by_two_is_that_of_stock(self, text, tiny, plan, share):
        made, seen = shares(text, plan)
        assert {share} == seen
        torch.testing.assert_close(made, stock_latents(tiny("text"), plan), **SAME)

    def test_the_trial_of_two_finds_no_deviation(self, text):
        assert text.deviation < 1e-5

    def test_a_lora_of_the_request_works_in_both(self, text):
        plan = msgspec.structs.replace(SMALL, loras=(("tiny.safetensors", 0.7),))
        expected = text.alone(plan)
        assert not torch.allclose(expected, text.alone(SMALL), **SAME)
        torch.testing.assert_close(text.run(plan), expected, **SAME)
        torch.testing.assert_close(text.run(SMALL), text.alone(SMALL), **SAME)

    def test_a_video_of_fewer_tokens_than_cards_is_made_by_one(self, text, capfd):
        plan = msgspec.structs.replace(SMALL, padded_width=16, padded_height=16, generated_frames=1)
        made, seen = shares(text, plan)
        assert {1} == seen
        torch.testing.assert_close(made, text.alone(plan), rtol=0, atol=0)
        assert "too small to be spread" in capfd.readouterr().err

    def test_a_job_that_is_ended_in_the_middle_of_a_pass_leaves_both_in_step(self, text):
        expected, pids, stop, calls = text.alone(SMALL), text.ranks.pids, Stop(), []

        def called() -> None:
            calls.append(1)
            if len(calls) == 3:
                stop.set()

        with before(text.loaded.experts[0].blocks[0], called), pytest.raises(EngineError) as caught:
            text.run(SMALL, stop)
        assert ("aborted", False, 3) == (caught.value.reason, caught.value.replace, len(calls))
        torch.testing.assert_close(text.run(SMALL), expected, **SAME)
        assert pids == text.ranks.pids

    def test_a_job_that_fails_between_passes_leaves_both_in_step(self, text):
        def failing(step: int, *_: Any) -> None:
            raise OSError(f"no room at step {step}")

        with pytest.raises(OSError, match="no room at step 1"):
            text.run(SMALL, on_step=failing)
        torch.testing.assert_close(text.run(SMALL), text.alone(SMALL), **SAME)

    def test_weights_that_leave_this_card_change_nothing(self, text):
        expected = text.alone(SMALL)
        climb(text.loaded, Rung.OFFLOAD)
        torch.testing.assert_close(text.run(SMALL), expected, **SAME)

    def test_a_rank_that_dies_in_the_middle_of_a_pass_fails_the_job(self, text):
        (pid,) = text.ranks.pids
        calls = []

        def called() -> None:
            calls.append(1)
            if len(calls) == 3:
                os.kill(pid, signal.SIGKILL)

        with before(text.loaded.experts[0].blocks[0], called), pytest.raises(EngineError) as caught:
            text.run(SMALL)
        error = caught.value
        assert ("engine_error", True, True, True) == (error.reason, error.retryable, error.began, error.replace)
        assert () == text.ranks.pids
        with pytest.raises(EngineError) as caught:
            text.run(SMALL)
        assert (False, True, True) == (caught.value.began, caught.value.retryable, caught.value.replace)


class TestTwoExperts:
    """The last test is the end of the group."""

    @pytest.mark.parametrize("frames", [9, 5], ids=["uneven", "even"])
    def test_first_last_frame_by_two_is_that_of_stock(self, two_experts, tiny, tmp_path, frames):
        """Both experts, each with guidance, and enough steps for both, on blocks that no size compiles again."""
        plan = msgspec.structs.replace(
            UNEVEN,
            generated_frames=frames,
            steps=4,
            start_image=picture(tmp_path / "first.png", 48, 48, 1),
            end_image=picture(tmp_path / "last.png", 48, 48, 2),
        )
        used = []
        hooks = [
            one.register_forward_pre_hook(lambda one, _: used.append(one)) for one in two_experts.loaded.experts
        ]
        assert two_experts.applied.part("compile").done
        with torch._dynamo.config.patch(error_on_recompile=True):
            made = two_experts.run(plan)
        for hook in hooks:
            hook.remove()
        assert set(two_experts.loaded.experts) == set(used)
        expected = stock_latents(
            tiny("image-two-experts"),
            plan,
            image=Image.open(plan.start_image),
            last_image=Image.open(plan.end_image),
        )
        torch.testing.assert_close(made, expected, **SAME)

    def test_a_rank_that_runs_out_of_memory_fails_the_job(self, two_experts, ordered, tmp_path):
        plan = msgspec.structs.replace(SMALL, start_image=picture(tmp_path / "first.png", 64, 48))
        pids = two_experts.ranks.pids
        ordered.touch()
        with pytest.raises(EngineError) as caught:
            two_experts.run(plan, crowded=True)
        assert ("out_of_memory", True, True) == (
            caught.value.reason,
            caught.value.retryable,
            caught.value.replace,
        )
        await_end(pids)


# -- the engine -----------------------------------------------------------------------------------------------
@pytest.fixture
def engine(tiny: Tiny) -> Iterator[WanEngine]:
    made = WanEngine(local, profile="exact", device="cpu", loras_dir=None, cards=2)
    yield made
    if made._ready is not None and made._ready.ranks is not None:
        made._ready.ranks.close()


def test_the_engine_makes_its_video_with_two_and_fails_without_memory(engine, tiny, tmp_path, capfd):
    """Wan 2.1's kind, whose picture has 257 tokens of its own."""
    wan = model("image", tiny("image"))
    roles = {"start_image": picture(tmp_path / "first.png", 32, 48)}
    (file,) = engine.run(job(wan, tmp_path, **roles), Heard())
    assert (48, 32, 5) == (file.height, file.width, file.frames)
    ranks_ = engine._ready.ranks
    assert 1 == len(ranks_.pids)
    assert '"wan cards","used":2,"of":2' in capfd.readouterr().err
    block = engine._ready.loaded.experts[0].blocks[1]

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    pids = ranks_.pids
    with before(block, fail), pytest.raises(EngineError) as caught:
        engine.run(job(wan, tmp_path, **roles), Heard())
    assert ("out_of_memory", False, True) == (caught.value.reason, caught.value.retryable, caught.value.replace)
    await_end(pids)


def test_a_model_that_cannot_be_spread_uses_one_card_and_says_so(engine, tiny, tmp_path, capfd):
    (file,) = engine.run(job(model("vace", tiny("vace")), tmp_path), Heard())
    assert 5 == file.frames
    assert engine._ready.ranks is None
    assert '"used":1,"of":2,"why":"diffusers cannot spread VACE models"' in capfd.readouterr().err


def test_a_rank_ends_with_the_process_that_started_it():
    """Killed, so that nothing can be done in its last moment."""
    program = (
        "import os, subprocess, sys, time\n"
        f"rank = subprocess.Popen([*{ranks.COMMAND!r}, str(os.getpid())], stdin=subprocess.PIPE)\n"
        "print(rank.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    await_end([pid])


# -- what is decided without a group --------------------------------------------------------------------------
def test_the_kinds_that_can_be_spread_are_those_for_which_diffusers_has_a_plan():
    planned = {
        kind: getattr(diffusers, parts.classes(kind)["transformer"])._cp_plan
        for kind in ("text", "image", "vace")
    }
    assert {kind for kind, plan in planned.items() if plan is not None} == set(layout.SPREAD)


def test_doctor_tells_which_models_use_one_card(tiny, tmp_path):
    for kind in ("text", "vace"):
        add_plain(f"tiny/{kind}", tmp_path, tiny(kind), 60)
    settings = Settings(engine="wan", wan_device="cpu", wan_cards=2, models_dir=tmp_path, models="tiny/*")
    notes = [found for found in _models(settings) if found[0] == "note"]
    assert [
        ("note", "tiny/vace", "uses one of its slot's 2 cards: diffusers cannot spread VACE models")
    ] == notes


@pytest.mark.parametrize(
    ("heads", "size", "takes"),
    [(40, 2, True), (40, 8, True), (40, 3, True), (40, 16, False), (2, 3, False), (2, 2, True)],
)
def test_heads_that_can_be_dealt_out(heads, size, takes):
    assert takes is takes_heads(heads, size)


def test_cards_that_the_heads_cannot_be_dealt_out_to_are_refused(tiny, tmp_path, capfd):
    engine = WanEngine(local, profile="exact", device="cpu", loras_dir=None, cards=3)
    running = threading.active_count()
    with pytest.raises(EngineError) as caught:
        engine.run(job(model("text", tiny("text")), tmp_path), Heard())
    assert ("model_unusable", True) == (caught.value.reason, caught.value.replace)
    assert "2 attention heads cannot be dealt out to 3 cards" in capfd.readouterr().err
    assert running == threading.active_count()


def test_attention_kernels_that_cannot_be_spread_are_passed_over():
    assert ("sage_hub", "_flash_3_hub", CUDNN) == spread_kernels(fast_kernels((9, 0)))


def test_no_cache_where_each_card_would_decide_for_itself(tiny):
    applied = profiles.apply(fresh(tiny("text")), "fast", Means(None, None, None, "none"), spread=True)
    assert "each card sees its own share" in applied.part("cache").words
    assert () == applied.kinds


def test_shares_that_differ_are_computed_uncompiled(tiny):
    from diffusers.models._modeling_parallel import ContextParallelConfig

    expert = fresh(tiny("text")).experts[0]
    calls = []

    def counting(graph: Any, _inputs: Any) -> Any:
        def run(*given: Any) -> Any:
            calls.append(1)
            return graph(*given)

        return run

    given = {
        "hidden_states": torch.randn(1, 16, 2, 4, 6),
        "encoder_hidden_states": torch.randn(1, 512, expert.config.text_dim),
        "timestep": torch.tensor([700.0]),
    }
    torch._dynamo.reset()
    compile_blocks((expert,), counting, {})
    found = []
    for uneven in (False, True):
        config = ContextParallelConfig(ulysses_degree=2, ulysses_anything=uneven)
        expert._parallel_config = SimpleNamespace(context_parallel_config=config)
        with torch.no_grad():
            expert(**given)
        found.append(len(calls))
    assert found[0] > 0
    assert found[0] == found[1]
