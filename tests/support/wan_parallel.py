"""A model of the Wan engine that two processes compute together on the CPU, as a slot has it with two cards."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from rushes.engines.wan.plan import Plan
from support.wan_running import fresh

SECONDS: Final = 60.0


class Together:
    """This process is the first of two; the other one is started here and ends with :meth:`close`."""

    def __init__(
        self, folder: Path, *, loras_dir: Path | None = None, command: Sequence[str] = (), means: Any = None
    ) -> None:
        from rushes.engines.wan import profiles, ranks
        from rushes.engines.wan.denoise import Denoiser
        from rushes.engines.wan.prompts import Embeddings
        from rushes.engines.wan.weights import Local

        found = ranks.start(
            Local(folder=folder),
            size=2,
            turbo=False,
            profile="exact",
            device="cpu",
            loras_dir=loras_dir,
            command=command or ranks.COMMAND,
        )
        assert found is not None
        self.ranks, self._loras_dir = found, loras_dir
        try:
            self.loaded = fresh(folder)
            self.applied = profiles.apply(self.loaded, "exact", means, spread=True)
            self.deviation = self.ranks.join(self.loaded, self.applied)
        except BaseException:
            self.ranks.close()
            raise
        self._denoiser = Denoiser(self.loaded, Embeddings())

    def run(
        self,
        plan: Plan,
        stop: Any = None,
        on_step: Callable[..., None] = lambda *_: None,
        *,
        crowded: bool = False,
    ) -> Any:
        """Latents, made by both."""
        from rushes.engines.wan.denoise import Stop
        from rushes.engines.wan.loras import added

        with (
            added(self.loaded, plan.loras, self._loras_dir),
            self.ranks.spread(plan, stop or Stop(), lambda: crowded) as heard,
        ):
            return self._denoiser.run(plan, heard, on_step)

    def alone(self, plan: Plan) -> Any:
        """Latents, made by this process with the same objects."""
        from rushes.engines.wan.denoise import Stop
        from rushes.engines.wan.loras import added

        with added(self.loaded, plan.loras, self._loras_dir):
            return self._denoiser.run(plan, Stop(), lambda *_: None)

    def close(self) -> None:
        self.ranks.close()


def is_running(pid: int) -> bool:
    """Not ended, nor ended and waiting to be collected."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def await_end(pids: Sequence[int]) -> None:
    until = time.monotonic() + SECONDS
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < until, f"run on: {[pid for pid in pids if is_running(pid)]}"
        time.sleep(0.02)
