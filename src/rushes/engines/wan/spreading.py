"""One denoising over several cards, by diffusers' own context parallelism: each process of a group has all the
weights on a card of its own and works on its share of the tokens; around attention they are exchanged for all tokens
of a share of the heads (Ulysses). Imports torch.

diffusers' parts are used, not its ``enable_parallelism``: that divides by the number of accelerators, of which a
machine without a card has none (``ModelMixin._resolve_parallel_config``), and it cannot be undone. The end of a pass
is ours: diffusers gathers unequal shares in a way for which gloo has no operation.

Also the words that pass between the slot's process, which is rank 0, and the other ranks (``rank.py``).
"""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
import torch.distributed as dist
from diffusers.hooks.context_parallel import apply_context_parallel, remove_context_parallel
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from torch.distributed.device_mesh import init_device_mesh

from rushes.engines.wan.weights import Local

SECONDS: Final = 600.0
"""How long one process waits for another in the middle of its work: blocks may be compiled there. One that has ended
is noticed at once, and a request's own time limit is mostly shorter."""
LOOPBACK: Final = "lo0" if sys.platform == "darwin" else "lo"
_LAST: Final = "proj_out"
"""The layer behind which the shares are put together; as in ``WanTransformer3DModel._cp_plan``."""


# -- words ----------------------------------------------------------------------------------------------------
class Setup(msgspec.Struct, frozen=True):
    """What a rank is; the first line that it reads."""

    rank: int
    size: int
    store: Path
    """A file by which the group finds together; empty before."""
    local: Local
    turbo: bool
    profile: str
    device: str
    loras_dir: Path | None
    threads: int
    """Of torch on a processor: as many as rank 0 has, so that all round alike."""


class Join(msgspec.Struct, frozen=True, tag="join"):
    """Be of the group; the others do the same now. Answered with :class:`Done`."""


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """Passes of one job come, with these LoRAs. Answered with :class:`Done`."""

    loras: tuple[tuple[str, float], ...]


class Pass(msgspec.Struct, frozen=True, tag="pass"):
    """Have an expert predict, together. Its tensors come from rank 0 by broadcast, in this order. Where ``looked``, a
    byte comes before each block: :data:`GO`, or :data:`STOP`, which ends the pass there. Not answered.
    """

    expert: int
    tensors: dict[str, tuple[tuple[int, ...], str]]
    looked: bool


class End(msgspec.Struct, frozen=True, tag="end"):
    """The job's passes are over. Answered with :class:`Done` when the card is through with them."""


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """The rank's model is there, with these parts of the profile."""

    parts: tuple[str, ...]


class Done(msgspec.Struct, frozen=True, tag="done"):
    pass


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The rank's last word. ``reason`` is an EngineError's, or empty."""

    reason: str
    text: str


Order = Join | Begin | Pass | End
Answer = Loaded | Done | Failed
GO: Final = b"g"
STOP: Final = b"s"


def line(word: Setup | Order | Answer) -> bytes:
    return msgspec.json.encode(word, enc_hook=str) + b"\n"


def read_setup(text: bytes) -> Setup:
    return msgspec.json.decode(text, type=Setup, dec_hook=lambda type_, value: type_(value))


def read_order(text: bytes) -> Order:
    found: Order = msgspec.json.decode(text, type=Order)
    return found


def read_answer(text: bytes) -> Answer:
    found: Answer = msgspec.json.decode(text, type=Answer)
    return found


# -- work -----------------------------------------------------------------------------------------------------
def takes_heads(heads: int, size: int) -> bool:
    """Whether attention heads can be dealt out to so many. Where they do not divide, diffusers fills up with empty
    ones, all of which the last process must have room for (``_maybe_pad_qkv_head``).
    """
    empty = -heads % size
    return empty == 0 or empty < (heads + empty) // size


class Group:
    """The processes that compute together. One for each process, made in all of them at the same time: that waits for
    the others. Raises torch.distributed's errors, for those that do not come after :data:`SECONDS`.

    Everything else must be done by all in the same order.
    """

    def __init__(self, store: Path, rank: int, size: int, device: torch.device) -> None:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, LOOPBACK)  # all are on this machine, and nobody else may listen
        self._size, self._device = size, device
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.FileStore(str(store), size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=SECONDS),
        )
        mesh = init_device_mesh(device.type, (1, size), mesh_dim_names=("ring", "ulysses"))
        self._config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=size))
        self._config.setup(rank, size, device, mesh=mesh)
        self._tokens = 0

    @contextmanager
    def spread(self, experts: Sequence[Any]) -> Iterator[None]:
        """Within, every pass of these is one for the whole group, begun with :meth:`begin`."""
        with ExitStack() as undo:
            for expert in experts:
                self._spread(expert, undo)
            yield

    def _spread(self, expert: Any, undo: ExitStack) -> None:
        plan = {name: part for name, part in expert._cp_plan.items() if name != _LAST}  # noqa: SLF001
        # As `enable_parallelism` does it. Taken away again, not set to None: what was compiled looks for it.
        processors = [getattr(module, "processor", None) for module in expert.modules()]
        for one in (expert, *processors):
            if hasattr(one, "_parallel_config"):
                one._parallel_config = self._config  # noqa: SLF001
                undo.callback(delattr, one, "_parallel_config")
        undo.callback(remove_context_parallel, expert, plan)
        apply_context_parallel(expert, self._config.context_parallel_config, plan)
        undo.callback(expert.proj_out.register_forward_hook(self._gather).remove)

    def begin(self, expert: Any, shape: Sequence[int]) -> None:
        """Before each pass; ``shape`` is that of the latents, batch x channels x frames x height x width.

        Sequences and heads that do not divide take diffusers' slower way, which first asks how much each one has.
        """
        patches = zip(shape[2:], expert.config.patch_size, strict=True)
        self._tokens = math.prod(side // patch for side, patch in patches)
        heads = expert.config.num_attention_heads
        uneven = bool(self._tokens % self._size or heads % self._size)
        self._config.context_parallel_config.ulysses_anything = uneven

    def _gather(self, _module: Any, _given: Any, share: torch.Tensor) -> torch.Tensor:
        """All shares, in their order; filled up to the same size on their way."""
        each, more = divmod(self._tokens, self._size)  # as torch.tensor_split deals out
        lengths = [each + (rank < more) for rank in range(self._size)]
        sent = torch.nn.functional.pad(share, (0, 0, 0, max(lengths) - share.shape[1])).contiguous()
        made = sent.new_empty(self._size, *sent.shape)
        dist.all_gather_into_tensor(_bytes(made), _bytes(sent))
        return torch.cat([part[:, :length] for part, length in zip(made, lengths, strict=True)], dim=1)

    def send(self, tensor: torch.Tensor) -> None:
        """From rank 0 to all others, who :meth:`receive`."""
        own = tensor.clone(memory_format=torch.contiguous_format)  # some are one number, expanded
        dist.broadcast(_bytes(own), src=0)

    def receive(self, shape: Sequence[int], dtype: str) -> torch.Tensor:
        made = torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=self._device)
        dist.broadcast(_bytes(made), src=0)
        return made

    def wait(self) -> None:
        """Until the card is through with what it was asked for."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def leave(self) -> None:
        """The group is no more, whatever is under way in it: that ends with an error, or with wrong numbers. Another
        one may be made then, but on a card only by another process.
        """
        if not dist.is_initialized():
            return
        if self._device.type == "cuda":
            dist.distributed_c10d._abort_process_group()  # noqa: SLF001 - there is no other name for it
        else:
            dist.destroy_process_group()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory: gloo does not know every type of number."""
    return tensor.view(-1).view(torch.uint8)
