"""What keeps a process from outliving the one that started it."""

import ctypes
import os
import signal
import sys
import threading
import time
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_LOOK_SECONDS: Final = 1.0
SUPERVISOR: Final = "RUSHES_SUPERVISOR"
"""Names the process that the supervisor is, so that its end cannot slip by before we ask the kernel."""


def die_with_parent(parent: int | None = None) -> None:
    """End this process at once when its parent ends: by the kernel on Linux, elsewhere by looking.

    ``parent`` is the parent's process id, from whoever started us; by default what RUSHES_SUPERVISOR says.
    """
    if parent is None:
        parent = int(os.environ.get(SUPERVISOR, os.getppid()))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), name="rushes-guard", daemon=True).start()
    if os.getppid() != parent:
        os._exit(0)  # it ended before we could ask


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(0)
