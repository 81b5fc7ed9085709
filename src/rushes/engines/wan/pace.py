"""How far a job is, and how long it will yet take. Pure: the clock is given.

Time is learned, by what it depends on: the size that is generated, the frames and whether a step is one pass of the
transformer or two. Work of a size that was never seen is estimated from the nearest one that was; where nothing was
seen yet, the first two steps tell of the steps and the first two latent frames of the decoding, and nothing is
claimed before.
"""

import statistics
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import pairwise
from typing import Final, NamedTuple

from rushes.engines.wan.plan import FRAMES_PER_LATENT
from rushes.requests.record import Progress

READING: Final = "reading the inputs"
DENOISING: Final = "denoising"
DECODING: Final = "decoding"
WAITING: Final = "waiting for the job before"
AGAIN: Final = "trying again with less memory"

_MOST: Final = 0.99
"""The fraction of a job that has not ended."""
_KEPT_RUNS: Final = 3
_KEPT_SHAPES: Final = 64
_STEP_GROWS: Final = 1.5
"""The power of the number of tokens by which a step's time is taken to grow: between the linear layers' 1 and
attention's 2. Only for sizes that were never seen.
"""
_DECODE_STEPS: Final = 1.0
"""How many steps decoding counts as, as long as nothing was learned of it."""
_MOSTLY_STEPS: Final = 10.0
"""Seconds of steps to come below which they say too little of the end, as long as nothing was learned of decoding:
few fast steps can come before a long decoding, and a job that seems to end has the worker hand in the next.
"""


class Shape(NamedTuple):
    """What a step's time depends on: pixels, frames that are generated, and whether a step has a pass for the
    negative prompt too.
    """

    width: int
    height: int
    frames: int
    guided: bool

    @property
    def tokens(self) -> int:
        """In proportion to the length of the transformer's sequence."""
        return self.width * self.height * (1 + (self.frames - 1) // 4)


class Seconds(NamedTuple):
    """What a job of some shape takes: before its first step, for each step, and for all of its decoding."""

    setup: float
    step: float
    decode: float


class Paces:
    """What was learned of one loaded model. Not kept beyond the process. For several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: OrderedDict[Shape, deque[Seconds]] = OrderedDict()

    def learn(self, shape: Shape, seconds: Seconds) -> None:
        """Add a job that went well."""
        with self._lock:
            self._runs.setdefault(shape, deque(maxlen=_KEPT_RUNS)).append(seconds)
            self._runs.move_to_end(shape)
            while len(self._runs) > _KEPT_SHAPES:
                self._runs.popitem(last=False)

    def of(self, shape: Shape) -> Seconds | None:
        """What a job of this shape will take; None where nothing was learned at all.

        The lower median of the last runs: what the first one has of compiling goes after the second, and one slow
        run changes nothing.
        """
        with self._lock:
            if shape in self._runs:
                return _usual(self._runs[shape])
            if not self._runs:
                return None
            near = min(self._runs, key=lambda known: _distance(known, shape))
            return _scaled(_usual(self._runs[near]), near, shape)


def _usual(runs: deque[Seconds]) -> Seconds:
    return Seconds(*(statistics.median_low(part) for part in zip(*runs, strict=True)))


def _distance(known: Shape, shape: Shape) -> tuple[bool, float]:
    larger, smaller = max(known.tokens, shape.tokens), max(1, min(known.tokens, shape.tokens))
    return known.guided != shape.guided, larger / smaller


def _scaled(seconds: Seconds, known: Shape, shape: Shape) -> Seconds:
    ratio = shape.tokens / max(1, known.tokens)
    passes = (1 + shape.guided) / (1 + known.guided)
    return Seconds(seconds.setup, seconds.step * passes * ratio**_STEP_GROWS, seconds.decode * ratio)


class Meter:
    """Follows one job, from the moment that it has the card to itself. For one thread at a time.

    The fraction never falls, but for :meth:`again`. ``now`` answers monotonic seconds.
    """

    def __init__(self, paces: Paces, shape: Shape, steps: int, now: Callable[[], float]) -> None:
        self._paces, self._shape, self._steps, self._now = paces, shape, max(1, steps), now
        self._known = paces.of(shape)
        self._since = now()
        """When the current part began: the denoising with what comes before it, or the decoding."""
        self._stepped: list[float] = []
        """When each step ended."""
        self._decoded: list[float] = []
        """When each latent frame was decoded, and its frames taken."""
        self._latents = self._latent_frames(shape.frames)
        """How many there are to decode."""
        self._setup = 0.0
        self._step: float | None = None
        """Seconds of a step of this job, once it has denoised."""
        self._shown = 0.0

    def waiting(self) -> Progress:
        """Another job has the card."""
        return Progress(round(self._shown, 4), WAITING)

    def begin(self) -> Progress:
        """The job has the card: the prompt and the pictures are read first."""
        self._known = self._paces.of(self._shape)
        self._since = self._now()
        self._stepped, self._decoded, self._step = [], [], None
        return self._told(READING)

    def step(self, done: int) -> Progress:
        """So many steps are done, of all; called after each."""
        self._stepped.append(self._now())
        return self._told(DENOISING, done, self._steps)

    def denoised(self) -> Progress:
        """Decoding begins."""
        if self._stepped and self._step is None:
            self._step = self._own_step() or (self._stepped[-1] - self._since) / len(self._stepped)
            self._setup = max(0.0, self._stepped[0] - self._since - self._step)
        self._since, self._decoded = self._now(), []
        return self._told(DECODING)

    def decoded(self, frames: int, of: int) -> Progress:
        """So many frames are decoded and taken, ``of`` all that were asked for; called after each."""
        self._latents = self._latent_frames(of)
        done = self._latents if frames >= of else 1 + (frames - 1) // FRAMES_PER_LATENT
        self._decoded += [self._now()] * (done - len(self._decoded))
        return self._told(DECODING)

    def again(self, *, denoised: bool) -> Progress:
        """The job begins once more, or its decoding does where ``denoised``."""
        self._decoded = []
        if not denoised:
            self._stepped, self._step = [], None
        self._since, self._shown = self._now(), 0.0
        return self._told(AGAIN)

    def ended(self) -> Progress:
        """Every frame is on the disk: learn from it. A job that had to begin again teaches its last try."""
        if self._step is not None:
            self._paces.learn(self._shape, Seconds(self._setup, self._step, self._now() - self._since))
        self._shown = 1.0
        return Progress(1.0, DECODING, eta=0.0)

    # -- how far, how long -------------------------------------------------------------------------------------
    def _told(self, stage: str, step: int | None = None, steps: int | None = None) -> Progress:
        self._shown = max(self._shown, min(_MOST, self._fraction()))
        left = self._left()
        eta = None if left is None else round(max(0.0, left), 2)
        return Progress(round(self._shown, 4), stage, step, steps, eta)

    def _fraction(self) -> float:
        each = self._each() or 1.0
        decode = self._known.decode if self._known else each * _DECODE_STEPS
        done = self._steps if self._step is not None else len(self._stepped)
        whole = each * self._steps + decode
        return (each * done + decode * len(self._decoded) / self._latents) / whole

    def _left(self) -> float | None:
        """Seconds until the end; None where too little was learned and seen."""
        each = self._each()
        if self._step is not None:
            return self._decode_left()
        done = len(self._stepped)
        if each is None:
            return None
        to_come = each * max(0, self._steps - done)
        if not self._known and to_come < _MOSTLY_STEPS:
            return None
        decode = self._known.decode if self._known else each * _DECODE_STEPS
        begun = self._stepped[-1] if self._stepped else self._since
        setup = self._known.setup if self._known and not self._stepped else 0.0
        spent = min(self._now() - begun, each + setup)
        return setup + to_come + decode - spent

    def _decode_left(self) -> float | None:
        """By what was learned rather than by what is seen; else by what each latent frame took after the first, which
        has fewer frames, and what is compiled, in it.
        """
        done = len(self._decoded)
        left = self._latents - done
        if self._known:
            return self._known.decode * left / self._latents
        if left <= 0:
            return 0.0
        if done < 2:
            return None
        each = (self._decoded[-1] - self._decoded[0]) / (done - 1)
        return each * left - min(self._now() - self._decoded[-1], each)

    @staticmethod
    def _latent_frames(frames: int) -> int:
        """How many are decoded for so many frames: the first one gives a single frame."""
        return 1 - (1 - frames) // FRAMES_PER_LATENT

    def _each(self) -> float | None:
        """Seconds of one step: of this job's own where two are done, else of the ones before."""
        if self._step is not None:
            return self._step
        own = self._own_step()
        return self._known.step if own is None and self._known else own

    def _own_step(self) -> float | None:
        """The first step has the prompt, and what is compiled, in it: it says nothing of the others."""
        if len(self._stepped) < 2:
            return None
        return statistics.median_low(later - earlier for earlier, later in pairwise(self._stepped))
