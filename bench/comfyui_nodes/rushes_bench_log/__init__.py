"""Loaded by the real ComfyUI as a node pack: writes down when each prompt begins and ends, by ComfyUI's own clock.

A prompt's history has these times, too, but only until somebody deletes it.
"""

import os
import time
from typing import Any

import execution

NODE_CLASS_MAPPINGS: dict[str, type] = {}
EVENTS = ("execution_start", "execution_success", "execution_error", "execution_interrupted")

_tell = execution.PromptExecutor.add_message
_log = open(os.environ["BENCH_COMFYUI_LOG"], "a", buffering=1, encoding="utf-8")  # noqa: SIM115, PTH123


def add_message(self: Any, event: str, data: dict[str, Any], broadcast: bool) -> None:
    now = time.time()
    _tell(self, event, data, broadcast)
    if event in EVENTS:
        _log.write(f"{event} {data['prompt_id']} {now:.6f}\n")


execution.PromptExecutor.add_message = add_message
