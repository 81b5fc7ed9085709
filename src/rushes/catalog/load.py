"""The catalog: every model that this server knows, the ones that come with it and the user's own.

Reads folders; knows no HTTP, no engine and no store. A broken folder never takes another model down.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from rushes.catalog.bindings import check_workflows
from rushes.catalog.manifest import MOST_SEGMENTS, read_manifest
from rushes.catalog.model import Model
from rushes.catalog.paths import MANIFEST, SAMPLE, shown
from rushes.catalog.remotes import check_remotes
from rushes.catalog.schema import enforced_schema, output_schema, seed_schema
from rushes.catalog.validate import Validator
from rushes.catalog.wan import has_wan, wan_of
from rushes.errors import InvalidInput, ManifestError

BUILTIN: Final = Path(__file__).parent / "models"
DEFAULT_LIMIT: Final = 50
MAX_LIMIT: Final = 200
"""Models on one page of a search, for those who put it on a wire."""


class Entry(NamedTuple):
    """A model with everything that is derived from it, built once."""

    model: Model
    validator: Validator
    input_schema: dict[str, Any]
    """In the seeds' dialect; see :func:`rushes.catalog.schema.seed_schema`."""
    standard_schema: dict[str, Any]
    """Standard JSON Schema, as enforced; see :func:`rushes.catalog.schema.enforced_schema`."""
    output_schema: dict[str, Any]
    haystack: str
    """What a search looks through, in lower case."""


def load_entry(folder: Path, root: Path) -> Entry:
    """Read, check and compile the model in ``folder``; its id is the path below ``root``.

    Raises ManifestError, also where the sample does not fit the schema, and whatever else goes wrong: a folder
    is somebody's to edit, and must not end a server.
    """
    file = folder / MANIFEST
    try:
        model = read_manifest(folder, root)
        validator = Validator(model)
        file = folder / SAMPLE
        complete = validator.validate_input(model.sample).input
        file = folder / MANIFEST
        check_workflows(model, complete)
        if has_wan(model):
            wan_of(model)
        check_remotes(model, complete)
        return _entry(model, validator)
    except ManifestError:
        raise
    except InvalidInput as error:
        first = (error.detail or [{}])[0]
        key = str((first.get("loc") or [""])[0])
        raise ManifestError(shown(file), key, str(first.get("msg", error.message))) from None
    except Exception as error:
        problem = f"cannot be used: {type(error).__name__}: {str(error)[:500]}"
        raise ManifestError(shown(file), "", problem) from error


def _entry(model: Model, validator: Validator) -> Entry:
    words = (model.id, model.name, model.description, *model.categories)
    return Entry(
        model=model,
        validator=validator,
        input_schema=seed_schema(model),
        standard_schema=enforced_schema(model),
        output_schema=output_schema(),
        haystack="\n".join(words).lower(),
    )


def load_model(folder: Path, root: Path) -> Model:
    """The model in ``folder``, fully checked. Raises ManifestError."""
    return load_entry(folder, root).model


_Signature = tuple[tuple[str, int, int, int, int], ...]
"""Of each file in a model's folder: name, size, times of change and inode."""


class _Loaded(NamedTuple):
    signature: _Signature
    entry: Entry | None
    error: ManifestError | None


class Catalog:
    """Models by id. Reading it is safe from any thread while one thread refreshes it."""

    def __init__(self, user_dir: Path | None = None, builtin_dir: Path = BUILTIN) -> None:
        self._builtin_dir, self._user_dir = builtin_dir, user_dir
        self._builtin = {f: _load(f, builtin_dir, s) for f, s in _scan(builtin_dir).items()}
        self._user: dict[Path, _Loaded] = {}
        self._missing = False
        self._checked_at: float | None = None
        self.version = 0
        """Grows with every change, so that others can tell when what they derived is out of date."""
        self._entries: dict[str, Entry] = {}
        self._broken: tuple[ManifestError, ...] = ()
        self._combine()
        self.refresh()

    @classmethod
    def load(cls, user_dir: Path | None = None) -> "Catalog":
        """The models that come with Rushes and those in ``user_dir``, which win where ids are the same."""
        return cls(user_dir)

    @property
    def broken(self) -> tuple[ManifestError, ...]:
        """What is wrong with which folders. Their models are absent, or still as they last were right."""
        return self._broken

    def get(self, id_: str) -> Entry | None:
        return self._entries.get(id_)

    def entries(self) -> tuple[Entry, ...]:
        """Every usable model, by id."""
        return tuple(self._entries.values())

    def categories(self) -> list[str]:
        return sorted({category for entry in self.entries() for category in entry.model.categories})

    def search(
        self,
        text: str = "",
        category: str = "",
        limit: int = DEFAULT_LIMIT,
        offset: int = 0,
        *,
        kind: str = "",
    ) -> tuple[list[Entry], int]:
        """One page of the models that hold every word of ``text``, and the number of all of them.

        ``kind`` is "image" or "video", what the model makes; empty arguments take every model.
        """
        words = text.lower().split()
        found = [
            entry
            for entry in self.entries()
            if all(word in entry.haystack for word in words)
            and (not category or category in entry.model.categories)
            and (not kind or kind == entry.model.output)
        ]
        return found[offset : offset + limit], len(found)

    def refresh_if_due(self, now: float, every: float = 1.0) -> bool:
        """:meth:`refresh`, but at most once in ``every`` seconds of the caller's clock ``now``."""
        if self._user_dir is None or (self._checked_at is not None and now - self._checked_at < every):
            return False
        self._checked_at = now
        return self.refresh()

    def refresh(self) -> bool:
        """Take over what changed in the user's folder; whether anything did.

        Unchanged folders cost a few `stat` calls each. A model that was right and is now broken stays as it
        last was, and :attr:`broken` says so.
        """
        root = self._user_dir
        if root is None:
            return False
        found = _scan(root)
        missing = not os.path.isdir(root)  # noqa: PTH112 - unlike Path's, never raises
        same = found.keys() == self._user.keys() and all(
            self._user[folder].signature == signature for folder, signature in found.items()
        )
        if same and missing == self._missing:
            return False
        self._missing = missing
        self._user = {
            folder: _load(folder, root, signature, self._user.get(folder))
            for folder, signature in found.items()
        }
        self._combine()
        return True

    def _combine(self) -> None:
        loaded = [*self._builtin.values(), *self._user.values()]
        entries = {one.entry.model.id: one.entry for one in loaded if one.entry}
        broken = [one.error for one in loaded if one.error]
        if self._missing and self._user_dir is not None:
            problem = "there is no such folder: create it, or unset models_dir"
            broken.append(ManifestError(shown(self._user_dir), "", problem))
        self._entries = dict(sorted(entries.items()))
        self._broken = tuple(broken)
        self.version += 1


def _load(folder: Path, root: Path, signature: _Signature, before: _Loaded | None = None) -> _Loaded:
    if before and before.signature == signature:
        return before
    try:
        return _Loaded(signature, load_entry(folder, root), None)
    except ManifestError as error:
        if before is None or before.entry is None:
            return _Loaded(signature, None, error)
        kept = f"{error.problem} (its last good version stays in use)"
        return _Loaded(signature, before.entry, ManifestError(error.file, error.key, kept))


def _scan(root: Path) -> dict[Path, _Signature]:
    """Every folder with a manifest below ``root``, in order, with its signature."""
    return dict(sorted(_walk(root, 0, frozenset())))


def _walk(folder: Path, depth: int, above: frozenset[tuple[int, int]]) -> Iterator[tuple[Path, _Signature]]:
    """Links are followed, hidden folders and those deeper than an id can be are not."""
    files: list[tuple[str, int, int, int, int]] = []
    folders: list[Path] = []
    try:
        place = folder.stat()
        with os.scandir(folder) as listing:
            for item in listing:
                try:
                    status = item.stat()
                except OSError:  # removed meanwhile, or a link to nothing or in a circle
                    if item.name == MANIFEST and item.is_symlink():
                        files.append((item.name, 0, 0, 0, 0))  # reading it will say what is wrong
                    continue
                if stat.S_ISDIR(status.st_mode) and item.name == MANIFEST:
                    files.append((item.name, 0, 0, 0, status.st_ino))
                elif stat.S_ISDIR(status.st_mode) and not item.name.startswith("."):
                    folders.append(Path(item.path))
                elif stat.S_ISREG(status.st_mode):
                    files.append(
                        (item.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
                    )
    except OSError:
        return
    identity = (place.st_dev, place.st_ino)
    if identity in above:
        return
    if depth and any(name == MANIFEST for name, *_ in files):
        yield folder, tuple(sorted(files))
    if depth <= MOST_SEGMENTS:
        for child in folders:
            yield from _walk(child, depth + 1, above | {identity})
