"""A process that computes its share of a slot's videos on a card of its own: ``python -m rushes.engines.wan.rank
PARENT``, started by :class:`rushes.engines.wan.ranks.Ranks` and ended with it.

It has the transformers and nothing else of a model, follows rank 0 from pass to pass, and decides nothing. What it
cannot do ends it: a group that is out of step could only wait for ever.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from rushes import log
from rushes.errors import EngineError
from rushes.guard import die_with_parent

if TYPE_CHECKING:
    from rushes.engines.wan.spreading import Answer, Pass, Setup


def main() -> NoReturn:
    """Follow the orders on standard input until it ends. Whatever is printed goes to standard error."""
    die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is the supervisor's to handle
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    log.configure()
    # After the guard: torch takes seconds.
    from rushes.engines.wan.spreading import Failed, line, read_setup

    def say(answer: "Answer") -> None:
        answers.write(line(answer))

    try:
        orders = sys.stdin.buffer
        _Rank(read_setup(_line(orders)), orders, say).follow()
    except BaseException as error:
        from rushes.engines.wan.memory import is_out_of_memory

        reason = error.reason if isinstance(error, EngineError) else ""
        traceback.print_exc()
        sys.stderr.flush()
        say(Failed("out_of_memory" if is_out_of_memory(error) else reason, f"{type(error).__name__}: {error}"))
    os._exit(1)  # at once: what is under way in the group would be waited for


def _line(orders: BinaryIO) -> bytes:
    return orders.readline() or _leave()


def _leave() -> NoReturn:
    """There is nobody any more to follow."""
    os._exit(0)


class _Stopped(Exception):
    """The pass ends here, for all."""


class _Rank:
    def __init__(self, setup: "Setup", orders: BinaryIO, say: Callable[["Answer"], None]) -> None:
        import torch

        from rushes.engines.wan import load, profiles
        from rushes.engines.wan.spreading import Loaded

        self._setup, self._orders, self._say = setup, orders, say
        torch.set_num_threads(setup.threads)
        self._device = torch.device(setup.device)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self._loaded = load.load_experts(setup.local, turbo=setup.turbo, device=setup.device)
        applied = profiles.apply(self._loaded, setup.profile, spread=True)
        self._group: Any = None
        self._job = ExitStack()
        say(Loaded(tuple(applied.kinds)))

    def follow(self) -> NoReturn:
        from rushes.engines.wan.spreading import Begin, Done, End, Group, Join, Pass, read_order

        setup = self._setup
        while True:
            match read_order(_line(self._orders)):
                case Pass() as order:
                    self._pass(order)
                    continue
                case Join():
                    self._group = Group(setup.store, setup.rank, setup.size, self._device)
                case Begin(loras):
                    self._begin(loras)
                case End():
                    self._group.wait()
                    self._job.close()
            self._say(Done())

    def _begin(self, loras: tuple[tuple[str, float], ...]) -> None:
        from rushes.engines.wan.loras import added

        self._job.enter_context(added(self._loaded, loras, self._setup.loras_dir))
        self._job.enter_context(self._group.spread(self._loaded.experts))

    def _pass(self, order: "Pass") -> None:
        import torch

        expert = self._loaded.experts[order.expert]
        given = {name: self._group.receive(shape, dtype) for name, (shape, dtype) in order.tensors.items()}
        self._group.begin(expert, given["hidden_states"].shape)
        try:
            with torch.no_grad(), expert.cache_context("cond"), self._looking(expert, looked=order.looked):
                expert(**given, return_dict=False)
        except _Stopped:
            return

    @contextmanager
    def _looking(self, expert: Any, *, looked: bool) -> Iterator[None]:
        """Where ``looked``, each block waits for its byte."""
        hooks = [block.register_forward_pre_hook(self._look) for block in expert.blocks] if looked else []
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _look(self, *_: Any) -> None:
        from rushes.engines.wan.spreading import GO

        byte = self._orders.read(1) or _leave()
        if byte != GO:
            raise _Stopped


if __name__ == "__main__":
    main()
