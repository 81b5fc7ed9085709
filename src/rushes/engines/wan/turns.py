"""Who has the card: one job denoises, one decodes, and where memory is short one does both while the others wait."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rushes.engines.wan.denoise import Stop

_LOOK_SECONDS: Final = 0.05
"""How often a waiting job looks whether it is to end."""


class Turns:
    """For the jobs of one engine, each in a thread of its own."""

    def __init__(self) -> None:
        self._denoising, self._decoding = threading.Lock(), threading.Lock()

    def turn(self, stop: "Stop", waiting: Callable[[], None]) -> "Turn":
        """A job's; ``waiting`` is called when it has to wait, ``stop`` ends that."""
        return Turn(self._denoising, self._decoding, stop, waiting)


class Turn:
    """What one job holds of the card. For one thread at a time, which must :meth:`leave` in the end.

    Never deadlocks: whoever takes both parts takes the denoising first, and whoever goes on from the one to the other
    lets go first.
    """

    def __init__(
        self, denoising: threading.Lock, decoding: threading.Lock, stop: "Stop", waiting: Callable[[], None]
    ) -> None:
        self._denoising, self._decoding = denoising, decoding
        self._stop, self._waiting = stop, waiting
        self._held: list[threading.Lock] = []

    @property
    def alone(self) -> bool:
        """This job has all of the card."""
        return len(self._held) == 2

    @property
    def crowded(self) -> bool:
        """Another job is at work on the card."""
        return any(part.locked() and part not in self._held for part in (self._denoising, self._decoding))

    def denoise(self, *, alone: bool) -> None:
        """Wait until nobody denoises, and where ``alone`` until nobody decodes either. Raises what the stop raises;
        what is held already stays so.
        """
        self._take(self._denoising)
        if alone:
            self._take(self._decoding)

    def denoised(self) -> None:
        """Let another job denoise, but where this one is alone."""
        if not self.alone:
            self._let_go(self._denoising)

    def decode(self) -> None:
        """Wait until nobody decodes."""
        self._take(self._decoding)

    def leave(self) -> None:
        """Let go of everything."""
        for part in tuple(self._held):
            self._let_go(part)

    def _take(self, part: threading.Lock) -> None:
        if part in self._held:
            return
        if not part.acquire(blocking=False):
            self._waiting()
            while not part.acquire(timeout=_LOOK_SECONDS):
                self._stop.check()
        self._held.append(part)

    def _let_go(self, part: threading.Lock) -> None:
        self._held.remove(part)
        part.release()
