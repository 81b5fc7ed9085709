"""Which attention kernels there are for a card, the best first, and how a model is set to one. Imports torch in its
functions.
"""

import atexit
from contextlib import ExitStack
from typing import Any, Final

CUDNN: Final = "cudnn"
"""PyTorch's own attention, of which cuDNN's kernel is asked first. Not diffusers' ``_native_cudnn``, nor any other
of its ``_native_…``: around each call these switch PyTorch's other kernels off, for all threads, and the VAE that
decodes beside the denoising finds none for its wide heads in 32 bits."""
CUDNN_VERSION: Final = 91501
"""9.15.1: older ones go wrong where 128 does not divide the number of tokens, says PyTorch, which does not take them
by itself either (``check_prefer_cudnn_attention`` in ``sdp_utils.cpp``; pytorch issue 169849)."""
_held: Final = ExitStack()
atexit.register(_held.close)  # while torch is still whole


def exact_kernels(capability: tuple[int, int] | None) -> tuple[str, ...]:
    """Those with exact maths, by diffusers' names and :data:`CUDNN`; those that are not installed are passed over.

    The order is fixed and not by a measurement at the start, so that one machine gives the same bytes every time.
    Hub kernels are fetched only where their package, ``kernels``, is installed. cuDNN is named for the cards for
    which newer versions of PyTorch take it by themselves.
    """
    if capability is None or capability[0] < 9:
        return ()
    flash = ("_flash_3", "_flash_3_hub") if capability[0] == 9 else ("flash_4_hub",)
    return (*flash, CUDNN) if capability in ((9, 0), (10, 0), (10, 3)) else flash


def fast_kernels(capability: tuple[int, int] | None) -> tuple[str, ...]:
    """With 8-bit attention in front."""
    if capability is None or capability < (8, 0):
        return ()
    eight_bits = {
        (8, 0): "_sage_qk_int8_pv_fp16_cuda",
        (8, 6): "_sage_qk_int8_pv_fp16_cuda",
        (9, 0): "_sage_qk_int8_pv_fp8_cuda_sm90",
    }.get(capability, "_sage_qk_int8_pv_fp8_cuda")
    return (eight_bits, "sage_hub", *exact_kernels(capability))


def spread_kernels(kernels: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``kernels`` that diffusers can use on several cards at once; PyTorch's own, and so cuDNN's, is one."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    known = _AttentionBackendRegistry._supports_context_parallel  # noqa: SLF001
    return tuple(kernel for kernel in kernels if kernel == CUDNN or kernel in known)


def set_attention(experts: tuple[Any, ...], kernel: str, cudnn: int | None) -> None:
    """Set ``kernel`` for these models alone; diffusers would make it everybody's besides. :data:`CUDNN` is for the
    whole process: what its kernel does not take goes to PyTorch's others as before. ``cudnn`` is its version.

    Raises what says that the kernel is not here; :func:`reset_attention` makes that undone.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    if kernel == CUDNN:
        _prefer_cudnn(cudnn)
        return
    active, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        for expert in experts:
            expert.set_attention_backend(kernel)
    finally:
        _AttentionBackendRegistry.set_active_backend(active)


def reset_attention(experts: tuple[Any, ...]) -> None:
    """Back to PyTorch's own, in its own order."""
    _held.close()
    for expert in experts:
        expert.reset_attention_backend()


def _prefer_cudnn(version: int | None) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if version is None:
        raise LookupError("there is no cuDNN")
    if version < CUDNN_VERSION:
        raise LookupError(f"cuDNN {version} is older than {CUDNN_VERSION}")
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    # Order and switches are torch's, not a thread's. Entered once and held, so that nothing changes while it works.
    _held.close()
    _held.enter_context(sdpa_kernel(order, set_priority=True))
