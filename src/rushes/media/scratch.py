"""Folders for files on their way, one for each process; what a process that is gone has left is known by its lock."""

import contextlib
import fcntl
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from rushes.settings import Settings


def scratch_root(settings: Settings) -> Path:
    root = settings.data_dir / "scratch"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    return root


@contextlib.contextmanager
def scratch_folder(settings: Settings) -> Iterator[Path]:
    """A folder for files on their way; gone when the process ends in an orderly way."""
    folder = scratch_root(settings).resolve() / f"work-{secrets.token_hex(6)}"
    lock_path = folder.with_suffix(".lock")
    with lock_path.open("w") as lock:
        # Before there is a folder, so that nobody finds one without its lock.
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock_path.unlink(missing_ok=True)


def clean_scratch(settings: Settings) -> None:
    """Remove what processes that are gone have left behind; the lock tells them from those that live."""
    for folder in scratch_root(settings).glob("work-*"):
        if folder.suffix == ".lock":
            continue
        lock_path = folder.with_suffix(".lock")
        with contextlib.suppress(OSError):
            if lock_path.exists():
                with lock_path.open("a") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            lock_path.unlink(missing_ok=True)
