"""The Wan engine as the wiring makes it, with faults inside of its transformers where a prompt orders them.

``RUSHES_ENGINE=support.wan_faults:make`` with ``tests`` on PYTHONPATH. Orders stand in brackets in the prompt and are
taken out of it, so that a request with them makes the very bytes of the one without:

``[oom-once]``
    the card's memory runs out in the middle of the second step, the first time;
``[oom-always]``
    and every time, whatever was done to save memory;
``[hold NAME]``
    the second step waits until the folder RUSHES_TEST_HOLDS has a file of that name;
``[hold-once NAME]``
    the same, but only in the request's first attempt.
"""

import os
import re
import threading
import time
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from rushes.catalog.model import Model
from rushes.engines.base import Job, Produced, Report
from rushes.wiring import CHILD_SETTINGS, decode_settings, make_engine

HOLDS: Final = "RUSHES_TEST_HOLDS"
_ORDER: Final = re.compile(r" ?\[([\w-]+) ?([^\]]*)\]")
_SECOND_STEP: Final = 3
"""The call of an expert with which it begins: with guidance each step has two."""


class _Orders:
    """Of one job, and how far it has come."""

    def __init__(self, job: Job) -> None:
        found = dict(_ORDER.findall(str(job.roles.get("prompt", ""))))
        self.oom: str = next((word for word in found if word.startswith("oom")), "")
        self.hold: str = found.get("hold", found.get("hold-once", "") if job.attempt == 1 else "")
        self.calls = 0

    def called(self) -> None:
        """An expert is in the middle of its work."""
        self.calls += 1
        if self.oom and self.calls == _SECOND_STEP:
            if self.oom == "oom-always":
                self.calls = 0  # the next try comes here again
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        if self.hold and self.calls == _SECOND_STEP:
            file = Path(os.environ[HOLDS]) / self.hold
            while not file.exists():
                time.sleep(0.02)


class FaultyWan:
    """Everything is the engine's own but what the orders say."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.name, self.lanes, self.one_model = engine.name, engine.lanes, engine.one_model
        self.models = engine.models
        self._orders: dict[int, _Orders] = {}
        """By the thread of the job."""
        self._hooking = threading.Lock()
        self._hooked = False

    def warm(self, model: Model) -> None:
        self._engine.warm(model)
        with self._hooking:
            if not self._hooked:
                self._hooked = True
                for expert in self._engine._ready.loaded.experts:
                    expert.blocks[-1].register_forward_pre_hook(self._called)

    def run(self, job: Job, report: Report) -> list[Produced]:
        self._orders[threading.get_ident()] = _Orders(job)
        prompt = _ORDER.sub("", str(job.roles["prompt"]))
        plain = msgspec.structs.replace(job, roles={**job.roles, "prompt": prompt})
        try:
            return list(self._engine.run(plain, report))
        finally:
            del self._orders[threading.get_ident()]

    def abort(self, request_id: str, attempt: int) -> None:
        self._engine.abort(request_id, attempt)

    def _called(self, *_: Any) -> None:
        orders = self._orders.get(threading.get_ident())
        if orders is not None:
            orders.called()


def make() -> FaultyWan:
    settings = decode_settings(os.environ[CHILD_SETTINGS])
    return FaultyWan(make_engine(msgspec.structs.replace(settings, engine="wan")))
