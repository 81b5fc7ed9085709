"""Where downloads go: safe names, a temporary name while they grow, and never over another file."""

import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final
from urllib.parse import urlsplit

from rushes.client.types import MEDIA_TYPES

ENDINGS: Final = {"image/jpeg": "jpg", **{kind: ending for ending, kind in reversed(MEDIA_TYPES.items())}}
UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]+")


def stem(request_id: str, number: int) -> str:
    """``{request_id}-{number}`` with nothing in it that could lead out of a folder or hide the file."""
    safe = UNSAFE.sub("_", request_id)[:100].strip("._-")
    return f"{safe or 'output'}-{number}"


def ending(url: str, content_type: str | None) -> str:
    """The file name ending without its dot: from the address, else from the content type, else ``bin``.

    Only endings of known media are taken from an address, so that no server chooses another one.
    """
    named = PurePosixPath(urlsplit(url).path).suffix.lstrip(".").lower()
    return named if named in MEDIA_TYPES else ENDINGS.get(content_type or "", "bin")


@dataclass
class Part:
    """A download in the making: an open file under a temporary name beside its final place."""

    sink: BinaryIO
    path: Path

    def keep(self, target: Path, *, overwrite: bool) -> Path:
        """Move it to its final name in one step. Raises FileExistsError where another file is."""
        self.sink.close()
        if overwrite:
            self.path.replace(target)
            return target
        try:
            os.link(self.path, target)  # a hard link, unlike a rename, refuses to replace
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with target.open("xb"):
                pass
            self.path.replace(target)
        return target

    def keep_beside(self, choose: Callable[[int], Path]) -> Path:
        """Move it to the first of ``choose(1)``, ``choose(2)`` … that is free."""
        number = 1
        while True:
            with suppress(FileExistsError):
                return self.keep(choose(number), overwrite=False)
            number += 1


@contextmanager
def part(folder: Path, name: str) -> Iterator[Part]:
    """A :class:`Part` in ``folder``, which is made where it lacks; what is not kept is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{name[:100]}.{secrets.token_hex(4)}.part"
    with path.open("xb") as sink:
        try:
            yield Part(sink, path)
        finally:
            sink.close()
            path.unlink(missing_ok=True)


def numbered(folder: Path, base: str, suffix: str) -> Callable[[int], Path]:
    """The names to try in turn: ``base.suffix``, then ``base_2.suffix`` and so on."""
    return lambda number: folder / (f"{base}.{suffix}" if number == 1 else f"{base}_{number}.{suffix}")
