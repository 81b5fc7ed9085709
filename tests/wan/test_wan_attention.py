"""The attention kernels of each card, and cuDNN's, which is preferred for the whole process: it must harm nobody."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support import tiny_diffusers
from support.wan_running import fresh

torch = pytest.importorskip("torch", reason="needs the extra: pip install 'rushes[wan]'")
pytest.importorskip("diffusers", reason="needs the extra: pip install 'rushes[wan]'")

from diffusers.models.attention_dispatch import AttentionBackendName  # noqa: E402
from torch.nn.attention import SDPBackend  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from rushes.engines.wan import attention, profiles  # noqa: E402
from rushes.engines.wan.attention import CUDNN, CUDNN_VERSION, exact_kernels, fast_kernels  # noqa: E402
from rushes.engines.wan.profiles import Means  # noqa: E402
from rushes.engines.wan.trials import Trial  # noqa: E402

Tiny = Callable[[tiny_diffusers.Kind], Path]
CARDS = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]


@pytest.fixture(autouse=True)
def own_order() -> Iterator[None]:
    before = order()
    yield
    attention.reset_attention(())
    assert before == order()


def order() -> list[int]:
    return torch._C._get_sdp_priority_order()


def in_another_thread(work: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


# -- which --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("capability", "exact", "fast"),
    [
        (None, (), ()),
        ((7, 5), (), ()),
        ((8, 6), (), ("_sage_qk_int8_pv_fp16_cuda", "sage_hub")),
        ((8, 9), (), ("_sage_qk_int8_pv_fp8_cuda", "sage_hub")),
        (
            (9, 0),
            ("_flash_3", "_flash_3_hub", "cudnn"),
            ("_sage_qk_int8_pv_fp8_cuda_sm90", "sage_hub", "_flash_3", "_flash_3_hub", "cudnn"),
        ),
        (
            (10, 0),
            ("flash_4_hub", "cudnn"),
            ("_sage_qk_int8_pv_fp8_cuda", "sage_hub", "flash_4_hub", "cudnn"),
        ),
        ((12, 0), ("flash_4_hub",), ("_sage_qk_int8_pv_fp8_cuda", "sage_hub", "flash_4_hub")),
    ],
)
def test_kernels_fit_the_card(
    capability: tuple[int, int] | None, exact: tuple[str, ...], fast: tuple[str, ...]
) -> None:
    assert exact == exact_kernels(capability)
    assert fast == fast_kernels(capability)


def test_diffusers_knows_every_kernel_and_none_switches_others_off() -> None:
    known = {name.value for name in AttentionBackendName} | {CUDNN}
    named = {kernel for card in CARDS for kernel in fast_kernels(card)}
    assert named <= known
    assert not [kernel for kernel in named if kernel.startswith("_native")]


# -- cuDNN --------------------------------------------------------------------------------------------------------
def with_cudnn(loaded: Any, monkeypatch: pytest.MonkeyPatch, version: int | None = 91900) -> profiles.Part:
    monkeypatch.setattr(profiles, "exact_kernels", lambda _capability: (CUDNN,))
    applied = profiles.apply(loaded, "exact", Means((9, 0), None, None, cudnn=version))
    return applied.part("attention")


def test_cudnn_is_asked_first_by_every_thread(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = fresh(tiny("text"))
    part = with_cudnn(loaded, monkeypatch)

    assert part.done
    assert part.words.startswith("cudnn, deviation ")
    wanted = ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]
    assert wanted == [SDPBackend(one).name for one in in_another_thread(order)][:4]
    switches = (
        torch.backends.cuda.cudnn_sdp_enabled,
        torch.backends.cuda.flash_sdp_enabled,
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.math_sdp_enabled,
    )
    assert [True] * 4 == in_another_thread(lambda: [switch() for switch in switches])
    assert loaded.experts[0].blocks[0].attn1.processor._attention_backend is None


class Meeting(TorchFunctionMode):
    """In the middle of each attention of this thread, ``other`` is called in another one."""

    def __init__(self, other: Callable[[], Any]) -> None:
        super().__init__()
        self.other, self.met = other, list[Any]()

    def __torch_function__(
        self, function: Any, _types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.met.append(in_another_thread(self.other))
        return function(*args, **(kwargs or {}))


def decode() -> Any:
    """Attention 384 wide and in 32 bits, as Wan's VAE has it: cuDNN does not take it. Or torch's words for that."""
    given = torch.randn(1, 1, 16, 384, generator=torch.Generator().manual_seed(0))
    try:
        return torch.nn.functional.scaled_dot_product_attention(given, given, given)
    except RuntimeError as error:
        return str(error)


def test_the_vae_of_the_other_lane_finds_a_kernel_at_any_time(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = fresh(tiny("text"))
    assert with_cudnn(loaded, monkeypatch).done
    expected = decode()
    with Meeting(decode) as meeting:
        Trial(loaded, loaded.experts[0])
    assert len(meeting.met) >= 2 * len(loaded.experts[0].blocks)
    assert all(isinstance(one, torch.Tensor) and torch.equal(expected, one) for one in meeting.met)


def test_diffusers_own_way_to_cudnn_would_take_it_from_the_other_lane() -> None:
    """What ``_native_cudnn`` does around each call, and why it is not used."""
    with torch.nn.attention.sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        assert "No viable backend" in in_another_thread(decode)
    assert isinstance(in_another_thread(decode), torch.Tensor)


@pytest.mark.parametrize(
    ("version", "why"),
    [
        (None, "there is no cuDNN"),
        (CUDNN_VERSION - 1, f"cuDNN {CUDNN_VERSION - 1} is older than {CUDNN_VERSION}"),
    ],
)
def test_a_cudnn_that_cannot_be_trusted_is_left_out(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, version: int | None, why: str
) -> None:
    before = order()
    part = with_cudnn(fresh(tiny("text")), monkeypatch, version)

    assert f"PyTorch's own, as stock has it (not cudnn: {why})" == part.words
    assert not part.done
    assert before == order()


def test_where_it_changes_too_much_pytorch_has_its_order_again(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = order()
    monkeypatch.setattr(profiles, "SAME_MATHS", -1.0)  # nothing is good enough
    part = with_cudnn(fresh(tiny("text")), monkeypatch)

    assert "the prediction changed by 0, more than -1.0" in part.words
    assert before == order()


def test_a_second_model_in_the_process_changes_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    before = order()
    for _ in range(2):
        with_cudnn(fresh(tiny("text")), monkeypatch)
    attention.reset_attention(())
    assert before == order()
