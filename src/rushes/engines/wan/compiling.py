"""The blocks of Wan's transformers, compiled: once for all blocks, experts and sizes. Imports torch in its functions.

Unlike diffusers' ``compile_repeated_blocks`` only ``forward`` is compiled: what hooks into a module, to end a job or
to skip a block, stays outside and compiles nothing anew. And no tensor is given that is a view: compiled code asks
for the strides of what a view is of, so that each new height would compile again, in the middle of a request.
"""

import functools
from collections.abc import Callable
from typing import Any, Final

BLOCKS: Final = ("blocks", "vace_blocks")
"""The lists of layers of Wan's transformers, by their names in diffusers."""


def offloaded(expert: Any) -> bool:
    """Whether diffusers moves the weights in and out of the card as they are needed."""
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    return bool(_is_group_offload_enabled(expert))


def compile_blocks(
    experts: tuple[Any, ...], backend: str | Callable[..., Any], options: dict[str, Any]
) -> list[Callable[[], None]]:
    """Compile the layers of all experts, when they are first called; returns what undoes it, to be called all."""
    import torch

    settings = {"options": options} if options else {}
    undo: list[Callable[[], None]] = []
    made: dict[type, Any] = {}
    for expert in experts:
        way = _Way(expert)
        undo.append(expert.register_forward_pre_hook(way.look).remove)
        undo.append(expert.rope.register_forward_hook(_own_storage).remove)
        for name in BLOCKS:
            for block in getattr(expert, name, ()):
                kind = type(block)
                if kind not in made:
                    made[kind] = torch.compile(kind.forward, backend=backend, dynamic=True, **settings)
                block.forward = way.forward(block, made[kind])
                undo.append(functools.partial(_plain, block))
    return undo


def _plain(block: Any) -> None:
    del block.forward


def _own_storage(_module: Any, _given: Any, tables: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_own(table) for table in tables)


def _own(tensor: Any) -> Any:
    """The same numbers in a tensor that is no view: compiled code asks for the strides of what a view is of."""
    import torch

    # diffusers' VACE transformer gives its first block the patches as the convolution left them
    return tensor if tensor._base is None else tensor.clone(memory_format=torch.contiguous_format)  # noqa: SLF001


class _Way:
    """Whether the next call of an expert goes through its compiled blocks."""

    def __init__(self, expert: Any) -> None:
        self._expert = expert
        self._compiled = True

    def look(self, *_: Any) -> None:
        """Moved weights and a LoRA beside them change the modules inside a block: both would compile it again."""
        lora = getattr(self._expert, "_hf_peft_config_loaded", False)
        self._compiled = not (lora or offloaded(self._expert))

    @property
    def _uneven(self) -> bool:
        """The way in which diffusers deals out to several cards what does not divide cannot be compiled. Asked anew
        for each block: whether a pass is of that kind is decided after :meth:`look`.
        """
        config = getattr(self._expert, "_parallel_config", None)
        return config is not None and bool(config.context_parallel_config.ulysses_anything)

    def forward(self, block: Any, compiled: Any) -> Callable[..., Any]:
        plain = type(block).forward

        def forward(tokens: Any, *args: Any, **kwargs: Any) -> Any:
            if self._uneven or not self._compiled:
                return plain(block, tokens, *args, **kwargs)
            return compiled(block, _own(tokens), *args, **kwargs)

        return forward


def options_of(backend: str | Callable[..., Any], *, exact: bool) -> dict[str, Any]:
    """Of torch's own compiler. Raises LookupError where it cannot round as ``exact`` promises."""
    if backend != "inductor":
        return {}
    import torch

    known = set(torch._inductor.list_options())  # noqa: SLF001 - the public name of it
    wanted: dict[str, Any] = {"deterministic": True}
    if exact:
        if "emulate_precision_casts" not in known:
            raise LookupError(f"the compiler of torch {torch.__version__} cannot round as stock does")
        wanted |= {"emulate_precision_casts": True, "eager_numerics.division_rounding": True}
    return {name: value for name, value in wanted.items() if name in known}
