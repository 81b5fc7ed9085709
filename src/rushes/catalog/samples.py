"""The sample pictures that inputs may name by their bare file name, as the seeds do."""

from functools import cache
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent / "samples"
_MEDIA: Final = frozenset({".png", ".jpg", ".jpeg", ".webp", ".mp4", ".webm"})


@cache
def _files() -> dict[str, Path]:
    if not FOLDER.is_dir():
        return {}
    return {path.name: path for path in sorted(FOLDER.iterdir()) if path.suffix in _MEDIA}


def sample_names() -> tuple[str, ...]:
    """Every name that :func:`sample_path` knows, sorted."""
    return tuple(_files())


def sample_path(name: str) -> Path | None:
    """The file of a sample, or None where there is none of that name.

    Only names of files in the folder are known, so that no name leads out of it.
    """
    return _files().get(name)
