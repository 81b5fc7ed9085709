"""The other cards of a slot: a process for each (``rank.py``), and what the slot's own, rank 0, does with them.

Orders go by pipes, and tensors through the group. Rank 0 says before each block of a transformer that all go on, or
that all stop there, so that an ended job leaves the ranks in step for the next one. Everything else that goes wrong
between the beginning and the end of a pass leaves them out of step, with work on the cards that never ends: the ranks
are ended then, the request fails, and the slot's process is replaced.
"""

import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import torch

from rushes import log
from rushes.engines.wan import layout
from rushes.engines.wan.denoise import Stop
from rushes.engines.wan.memory import is_out_of_memory
from rushes.engines.wan.plan import FRAMES_PER_LATENT, GRID, Plan
from rushes.engines.wan.profiles import SAME_MATHS
from rushes.engines.wan.spreading import (
    GO,
    STOP,
    Answer,
    Begin,
    Done,
    End,
    Failed,
    Group,
    Join,
    Loaded,
    Order,
    Pass,
    Setup,
    line,
    read_answer,
    takes_heads,
)
from rushes.engines.wan.trials import ELSEWHERE, ON_CARD, Trial
from rushes.errors import EngineError

if TYPE_CHECKING:
    from rushes.engines.wan.load import Loaded as Model
    from rushes.engines.wan.profiles import Applied
    from rushes.engines.wan.weights import Local

COMMAND: Final = (sys.executable, "-m", "rushes.engines.wan.rank")
_VERDICT_SECONDS: Final = 2.0
"""How long an error of ours waits for a rank to say that it was the first to fail."""
_LAST_SECONDS: Final = 20.0
"""After a rank is lost, how long rank 0 may stay in the work that it shared with it before its process is ended."""
_LOOK_SECONDS: Final = 0.2
_END_SECONDS: Final = 10.0


def start(
    local: "Local",
    *,
    size: int,
    turbo: bool,
    profile: str,
    device: str,
    loras_dir: Path | None,
    command: Sequence[str] = COMMAND,
) -> "Ranks | None":
    """The ranks of ``size`` cards, which begin to load; None where one card does it all: where no more are wanted, or
    this kind of model can use no more, which the log says.
    """
    if size == 1:
        return None
    why = layout.not_spread(local.folder) if sys.platform == "linux" else "several need Linux"
    if why:
        log.event("wan cards", used=1, of=size, why=why)
        return None
    # By it the group finds together. In memory: nothing of it is left when this process is killed. Never closed:
    # torch looks for it once more when it lets go of it, and the number could be another file's by then.
    file = os.memfd_create("rushes-group")
    setups = [
        Setup(
            rank=rank,
            size=size,
            store=Path(f"/proc/{os.getpid()}/fd/{file}"),
            local=local,
            turbo=turbo,
            profile=profile,
            device=f"{device}:{rank}" if device == "cuda" else device,
            loras_dir=loras_dir,
            threads=torch.get_num_threads(),
        )
        for rank in range(1, size)
    ]
    return Ranks(setups, command)


class Ranks:
    """All ranks but the first. For one job at a time; end them with :meth:`close`, or with this process."""

    def __init__(self, setups: Sequence[Setup], command: Sequence[str]) -> None:
        self._command = command
        self._size, self._store = setups[0].size, setups[0].store
        self._news = threading.Condition()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._answers: dict[int, list[Answer]] = {setup.rank: [] for setup in setups}
        self._lost: Failed | None = None
        """Why the group is of no use any more."""
        self._closing = False
        self._group: Group | None = None
        self._model: Model | None = None
        self._busy = False
        self._last_resort: threading.Timer | None = None
        self._passing = False
        self._looked = False
        self._keepers = [
            threading.Thread(target=self._keep, args=(setup,), name=f"rushes-rank-{setup.rank}", daemon=True)
            for setup in setups
        ]
        for keeper in self._keepers:
            keeper.start()

    # -- processes ---------------------------------------------------------------------------------------------
    def _keep(self, setup: Setup) -> None:
        """Start a rank, hear it, and notice its end. In a thread of its own, which lives as long as the rank: on
        Linux a process that is to die with its parent dies with the thread that started it.
        """
        try:
            process = subprocess.Popen(
                [*self._command, str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
            )
        except OSError as error:
            self._lose(Failed("", f"cannot be started: {error}"))
            return
        with self._news:
            self._processes[setup.rank] = process
            closing = self._closing
        if closing:
            process.kill()
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):
            process.stdin.write(line(setup))
        last = None
        for text in iter(process.stdout.readline, b""):
            last = read_answer(text)
            with self._news:
                self._answers[setup.rank].append(last)
                self._news.notify_all()
            if isinstance(last, Failed):
                self._lose(last)
        status = process.wait()
        process.stdin.close()
        process.stdout.close()
        if not isinstance(last, Failed):
            self._lose(Failed("", f"the process of card {setup.rank + 1} ended with status {status}"))

    def _lose(self, why: Failed) -> None:
        """The group is of no use any more; what rank 0 does in it is to end."""
        with self._news:
            if self._closing or self._lost is not None:
                return
            self._lost = why
            busy = self._busy
            if busy:
                self._last_resort = threading.Timer(_LAST_SECONDS, _give_up)
                self._last_resort.daemon = True
                self._last_resort.start()
            self._news.notify_all()
        log.event("wan cards lost", reason=why.reason, error=why.text, busy=busy)
        self._kill()
        if self._group is not None and self._model is not None and self._model.device.type == "cuda":
            # Its work on our card waits for the lost one, and would for ever. Elsewhere the connection is closed.
            try:
                self._group.leave()
            except Exception:
                traceback.print_exc()  # the last resort comes

    def _kill(self) -> None:
        with self._news:
            processes = list(self._processes.values())
        for process in processes:
            process.kill()

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes that run."""
        with self._news:
            return tuple(one.pid for one in self._processes.values() if one.poll() is None)

    def close(self) -> None:
        """End the ranks and the group. Nothing may be under way."""
        with self._news:
            self._closing = True
        self._kill()
        for keeper in self._keepers:
            keeper.join(_END_SECONDS)
        if self._group is not None:
            self._group.leave()

    # -- words -------------------------------------------------------------------------------------------------
    def _order(self, order: Order | bytes) -> None:
        data = order if isinstance(order, bytes) else line(order)
        self._check()
        for process in self._processes.values():
            assert process.stdin is not None
            try:
                process.stdin.write(data)
            except (OSError, ValueError):  # it has ended, and its thread says so or has closed the pipe
                self._wait_for_verdict()
                self._check()
                raise

    def _hear(self, what: type[Answer]) -> list[Any]:
        """The next answer of each; raises :class:`_Lost`."""
        found = []
        for answers in self._answers.values():
            with self._news:
                while not answers and self._lost is None:
                    self._news.wait(_LOOK_SECONDS)
                self._check()
                found.append(answers.pop(0))
        assert all(isinstance(answer, what) for answer in found), found
        return found

    def _check(self) -> None:
        if self._lost is not None:
            raise _Lost

    def _wait_for_verdict(self) -> None:
        with self._news:
            self._news.wait_for(lambda: self._lost is not None, _VERDICT_SECONDS)

    # -- beginning ---------------------------------------------------------------------------------------------
    def join(self, model: "Model", applied: "Applied") -> float:
        """Wait for the ranks to have loaded, and compute something with them: the deviation from what one card
        computes alone (root mean square of the difference over that of the prediction).

        Raises EngineError, with ``replace``: ``out_of_memory``, ``model_unusable`` where they cannot compute this
        model together or come to something else, and what the ranks' loading raised.
        """
        heads = {expert.config.num_attention_heads for expert in model.experts}
        for number in heads:
            if not takes_heads(number, self._size):
                raise _unusable(f"{number} attention heads cannot be dealt out to {self._size} cards")
        sizes = (*(ON_CARD if model.device.type == "cuda" else ()), *ELSEWHERE)
        with self._shared(lambda: False):
            for answer in self._hear(Loaded):
                if answer.parts != applied.kinds:
                    raise _unusable(f"the profile is {applied.kinds} on one and {answer.parts} on another")
            trials = [Trial(model, expert, sizes) for expert in model.experts]
            self._model = model
            self._order(Join())
            self._group = Group(self._store, 0, self._size, model.device)
            self._hear(Done)
            with self._together((), looked=False):
                deviation = max(trial.deviation() for trial in trials)
        if not deviation <= SAME_MATHS:
            raise _unusable(f"the prediction changed by {deviation:.3g}, more than {SAME_MATHS}")
        log.event("wan cards", used=self._size, of=self._size, deviation=deviation)
        return deviation

    # -- jobs --------------------------------------------------------------------------------------------------
    @contextmanager
    def spread(self, plan: Plan, stop: Stop, crowded: Callable[[], bool]) -> Iterator[Stop]:
        """Within, all cards denoise; what is given is to be asked in the place of ``stop``. ``crowded`` says
        whether another job is at work on this card: then it may go well another time where memory ran out.

        A job with fewer tokens than there are cards stays on this one. Raises EngineError with ``replace`` where a
        rank or the group failed, before or meanwhile; what else is raised within comes out as it is.
        """
        latents = (plan.generated_frames - 1) // FRAMES_PER_LATENT + 1
        if latents * (plan.padded_width // GRID) * (plan.padded_height // GRID) < self._size:
            log.event("wan cards", used=1, of=self._size, why="the video is too small to be spread")
            yield stop
            return
        if self._lost is not None:
            text = "A card was lost; the engine starts anew."
            raise EngineError("engine_error", text, retryable=True, began=False, replace=True)
        with self._shared(crowded), self._together(plan.loras, looked=True):
            yield _Watch(stop, self)

    @contextmanager
    def _shared(self, crowded: Callable[[], bool]) -> Iterator[None]:
        """Within, a rank that is lost costs the group, and with it this process."""
        with self._news:
            self._busy = True
        try:
            yield
        except BaseException as error:
            if self._passing:
                self._break(error)
            if self._lost is None:
                raise
            raise self._failure(error, crowded=crowded()) from None
        finally:
            with self._news:
                self._busy = False
                if self._last_resort is not None:
                    self._last_resort.cancel()

    @contextmanager
    def _together(self, loras: tuple[tuple[str, float], ...], *, looked: bool) -> Iterator[None]:
        assert self._group is not None
        assert self._model is not None
        self._looked = looked
        self._order(Begin(loras))
        self._hear(Done)
        try:
            with self._group.spread(self._model.experts), ExitStack() as hooks:
                for number, expert in enumerate(self._model.experts):
                    begin, end = self._pass_of(number, expert)
                    hooks.callback(expert.register_forward_pre_hook(begin, with_kwargs=True).remove)
                    hooks.callback(expert.register_forward_hook(end, always_call=True).remove)
                yield
        finally:
            if self._lost is None and not self._passing:
                self._order(End())
                self._hear(Done)

    def _pass_of(self, number: int, expert: Any) -> tuple[Callable[..., None], Callable[..., None]]:
        """What comes before and after each pass of this expert."""

        def begin(_module: Any, args: Any, given: dict[str, Any]) -> None:
            assert self._group is not None
            assert not args, "the pipelines name what they give"
            tensors = {name: one for name, one in given.items() if isinstance(one, torch.Tensor)}
            rest = {name for name, one in given.items() if one is not None and name not in tensors}
            assert rest <= {"return_dict"}, rest
            said = {
                name: (tuple(one.shape), str(one.dtype).removeprefix("torch.")) for name, one in tensors.items()
            }
            self._group.begin(expert, tensors["hidden_states"].shape)
            self._check()
            self._passing = True
            self._order(Pass(number, said, self._looked))
            for tensor in tensors.values():
                self._group.send(tensor)

        def end(_module: Any, _args: Any, output: Any) -> None:
            if self._passing and output is None:
                # Now, not where the error is dealt with: on its way there somebody may wait for the card.
                self._break(sys.exc_info()[1])
            self._passing = False
            if output is not None:
                self._check()

        return begin, end

    def look(self, stop: Stop) -> None:
        """Before a block: all go on, or all stop here. Raises what ``stop`` raises."""
        if not self._passing:
            stop.check()
            return
        try:
            stop.check()
        except BaseException:
            self._order(STOP)
            self._passing = False
            raise
        self._order(GO)

    # -- failing -----------------------------------------------------------------------------------------------
    def _break(self, error: BaseException | None) -> None:
        """A pass has failed here, or because it failed elsewhere."""
        self._passing = False
        if error is None or not is_out_of_memory(error):
            self._wait_for_verdict()
        reason = "out_of_memory" if error is not None and is_out_of_memory(error) else ""
        self._lose(Failed(reason, f"{type(error).__name__}: {error}"))

    def _failure(self, error: BaseException, *, crowded: bool) -> EngineError:
        """What to say of a group that is lost."""
        assert self._lost is not None
        reason = self._lost.reason
        if not isinstance(error, _Lost):
            traceback.print_exception(error)
        traceback.clear_frames(error.__traceback__)
        if reason == "out_of_memory":
            text = (
                "There is too little memory on the cards for this: ask for a smaller size or for fewer frames."
            )
            return EngineError(reason, text, retryable=crowded, replace=True)
        if reason:
            text = "One of the cards could not load this model. Its operator finds the reason in the log."
            return EngineError(reason, text, replace=True)
        text = "One of the cards that the video was spread over was lost."
        return EngineError("engine_error", text, retryable=True, replace=True)


class _Lost(Exception):
    """The group is of no use any more; :attr:`Ranks._lost` says why."""


class _Watch(Stop):
    """A job's stop, heard by all ranks."""

    def __init__(self, stop: Stop, ranks: Ranks) -> None:
        super().__init__()
        self._stop, self._ranks = stop, ranks

    def set(self) -> None:
        self._stop.set()

    def check(self) -> None:
        self._ranks.look(self._stop)


def _unusable(why: str) -> EngineError:
    log.event("wan cards unusable", why=why)
    text = "The server's cards cannot make this video together. Its operator finds the reason in the log."
    return EngineError("model_unusable", text, replace=True)


def _give_up() -> NoReturn:
    """The slot's process ends, and is replaced."""
    print("wan: rank 0 does not come back from a lost group", file=sys.stderr, flush=True)
    os._exit(4)
