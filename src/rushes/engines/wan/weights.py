"""Where a model's weights lie on this machine: found without a network, or fetched from the hub.

A branch moves; a model must not. The commit that the first download meets is kept, with what it holds, in a file of
the data directory, and what is found or fetched later is that commit, until the manifest names another.

Imports neither torch nor diffusers: the command line and the worker ask here, too.
"""

import contextlib
import fcntl
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

import msgspec

from rushes import log
from rushes.catalog.load import Catalog
from rushes.catalog.model import Model
from rushes.catalog.wan import WanLora, WanModel, has_wan, local_folder, wan_of
from rushes.engines.wan import hub, layout
from rushes.errors import EngineError, ManifestError, SettingsError
from rushes.settings import Settings

PINS: Final = "wan/revisions.json"
"""In the data directory."""
ANY: Final = "*"
"""RUSHES_MODELS where nobody has set it."""
_TURN_SECONDS: Final = 2.0
_TELL_SECONDS: Final = 1.0
_LACKED: Final = "the repository lacks it: name another, or mend `weights`"

Told = Callable[[str, int, int | None], None]
"""Hears what is fetched, the bytes that have come, and how many they will be. Called in one thread at a time."""


class Local(msgspec.Struct, frozen=True):
    """A model's weights, whole, on this disk."""

    folder: Path
    """A pipeline in the layout of diffusers."""
    loras: tuple[tuple[Path, WanLora], ...] = ()
    turbo_loras: tuple[tuple[Path, WanLora], ...] = ()
    bytes: int = 0
    """Of all files that are loaded."""


class Missing(msgspec.Struct, frozen=True):
    """What of a model's weights is not here, or not whole."""

    text: str
    """For the operator, with what to do."""
    files: tuple[tuple[str, str], ...]
    """Which (a repository, or a file in one), and what is wrong with it."""
    bytes: int | None
    """What is yet to be fetched; None where nobody knows before the hub is asked."""
    begun: bool
    """Some of it is here: a download that has not come to its end, or a file that was harmed."""
    fetchable: bool
    """Whether :meth:`Weights.fetch` can help; a folder of the operator's own it leaves alone."""
    what: str
    """The text without what to do."""
    reason: str = "weights_incomplete"
    """Of the error that :meth:`Weights.fetch` raises where it cannot help."""


class _Source(msgspec.Struct, frozen=True):
    """A repository or a folder, and what of it is needed: a pipeline, or one file."""

    folder: Path | None
    repository: str = ""
    revision: str = ""
    file: str = ""
    """Empty: a pipeline."""
    bytes: int | None = None
    """As the manifest says it."""

    @property
    def key(self) -> str:
        """What its commit is kept under."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{revision}" + (f":{self.file}" if self.file else "")


class _Pin(msgspec.Struct):
    """What was met of a repository: the commit, and the bytes of those of its files that are needed, by name."""

    commit: str
    files: dict[str, int] = {}


class _Look(msgspec.Struct, frozen=True):
    """What is there of a source."""

    source: _Source
    folder: Path
    wrong: dict[str, str]
    """What is wrong with which file; under an empty name, with all of it."""
    bytes: int = 0
    """Of what is there."""
    lacking: int | None = 0
    """Bytes that are not; None: unknown."""
    foreign: bool = False
    """It is whole or not, but no pipeline that this engine runs."""
    lacked: bool = False
    """What is wrong is not in the repository, either, at the commit that was met."""


class Weights:
    """The weights of models: those that their manifests name, or the operator's own instead.

    ``pins`` is the file of the commits that were met. ``overrides`` gives a folder, or a repository with or without
    ``@revision``, by the id of a model. Without ``turbo`` the LoRAs of that profile are not asked for.
    """

    def __init__(self, pins: Path, overrides: Mapping[str, str], *, turbo: bool = True) -> None:
        self._pins = pins
        self._overrides = overrides
        self._turbo = turbo

    # -- finding -----------------------------------------------------------------------------------------
    def find(self, model: Model) -> Local | Missing:
        """Look on this disk. Raises ManifestError; SettingsError for a repository without the extra ``wan``."""
        wan = wan_of(model)
        looks = [self._look(source) for source in self._sources(model, wan)]
        if any(look.wrong for look in looks):
            return _missing(model, looks)
        main, *rest = looks
        files = [look.folder / look.source.file for look in rest]
        own = len(wan.loras)
        turbo = wan.turbo.loras if wan.turbo and self._turbo else ()
        return Local(
            main.folder,
            tuple(zip(files[:own], wan.loras, strict=True)),
            tuple(zip(files[own:], turbo, strict=True)),
            sum(look.bytes for look in looks),
        )

    def repositories(self, model: Model) -> list[str]:
        """Those on the hub that are asked for this model. Raises ManifestError."""
        sources = self._sources(model, wan_of(model))
        return list(dict.fromkeys(source.repository for source in sources if source.folder is None))

    def _sources(self, model: Model, wan: WanModel) -> list[_Source]:
        """The pipeline first, then the LoRAs in their order, then those of the turbo."""
        if override := self._overrides.get(model.id):
            main = _overriding(override)
        else:
            main = _Source(local_folder(wan.weights, model), wan.weights, wan.revision, bytes=wan.bytes)
        loras = [*wan.loras, *(wan.turbo.loras if wan.turbo and self._turbo else ())]
        return [
            main,
            *(
                _Source(local_folder(lora.source, model), lora.source, lora.revision, lora.path, lora.bytes)
                for lora in loras
            ),
        ]

    def _look(self, source: _Source) -> _Look:
        if source.folder is not None:
            return _look_into(source, source.folder, {})
        pin = self._read_pins().get(source.key)
        commit = pin.commit if pin else hub.known_commit(source.repository, source.revision)
        folder = hub.snapshot(source.repository, commit) if commit else None
        expected = pin.files if pin else {}
        if folder is None or not folder.is_dir():
            size = sum(expected.values()) or source.bytes
            return _Look(source, Path(), {"": "is not downloaded"}, 0, size)
        return _look_into(source, folder, expected)

    # -- fetching ----------------------------------------------------------------------------------------
    def fetch(self, model: Model, tell: Told = lambda *_: None) -> Local:
        """What :meth:`find` finds; what is missing is downloaded first, which can take hours.

        Raises EngineError (see :func:`rushes.engines.wan.hub.explain`; ``weights_incomplete`` for what the
        repository or the folder lacks; ``weights_unusable`` for no Wan pipeline), ManifestError, SettingsError.
        """
        found = self.find(model)
        if isinstance(found, Missing):
            if not found.fetchable:
                raise EngineError(found.reason, found.text)
            with self._turn(model, tell):
                if isinstance(self.find(model), Missing):
                    self._download(model, tell)
            found = self.find(model)
        if isinstance(found, Missing):
            text = f"{found.what}: {_LACKED}" if found.fetchable else found.text
            raise EngineError(found.reason, text)
        for source in self._sources(model, wan_of(model)):
            self._keep_found(source)
        return found

    def _download(self, model: Model, tell: Told) -> None:
        """Ask the hub for everything that is needed, see whether it fits on the disk, and bring it here."""
        orders: dict[tuple[str, str], dict[str, int]] = {}
        for source in self._sources(model, wan_of(model)):
            if source.folder is None:
                tell(f"asking for {source.repository}", 0, None)
                commit, files = self._ask(source)
                orders.setdefault((source.repository, commit), {}).update(files)
        harmed: dict[tuple[str, str], list[str]] = {}
        for (repository, commit), files in orders.items():
            for part in hub.left_overs(repository):
                part.unlink(missing_ok=True)
            place = hub.snapshot(repository, commit)
            there = {name for name in files if (place / name).exists()}
            harmed[repository, commit] = [name for name in there if _harmed(place / name, files[name])]
            for name in there.difference(harmed[repository, commit]):
                del files[name]
        total = sum(sum(files.values()) for files in orders.values())
        _check_room(total)
        done = 0
        for (repository, commit), files in orders.items():
            again = harmed[repository, commit]
            for names in ([name for name in files if name not in again], again):

                def advance(count: int, *, before: int = done, what: str = repository) -> None:
                    tell(f"fetching {what}", min(before + count, total), total)

                hub.download(repository, commit, names, advance, again=names is again)
                done += sum(files[name] for name in names)
            tell(f"fetching {repository}", done, total)

    def _ask(self, source: _Source) -> tuple[str, dict[str, int]]:
        """The commit of a source, kept or the newest, and the bytes of those of its files that are needed."""
        pin = self._read_pins().get(source.key)
        try:
            held = hub.listing(source.repository, pin.commit if pin else source.revision)
        except EngineError as error:
            if pin is None or error.reason != "weights_not_found":
                raise
            step = f"if it was replaced, take {source.key!r} out of {self._pins}, and start again"
            raise EngineError(error.reason, f"{error.message}; {step}") from None
        if source.file:
            names = [source.file]
        elif layout.INDEX not in held.files:
            raise EngineError(
                "weights_incomplete",
                f"{source.repository} has no {layout.INDEX}: it is not in the layout of diffusers; the repositories "
                "that are end in -Diffusers",
            )
        else:
            index = hub.fetch_index(source.repository, held.commit)
            hub.check_pipeline(source.repository, held.files, index)
            names = layout.wanted(held.files, index)
        if source.file and source.file not in held.files:
            raise EngineError(
                "weights_not_found",
                f"{source.repository} has no file {source.file}: mend `path` in the manifest",
            )
        files = {name: held.files[name] for name in names}
        self._keep(source.key, _Pin(held.commit, files))
        return held.commit, files

    @contextlib.contextmanager
    def _turn(self, model: Model, tell: Told) -> Iterator[None]:
        """One process at a time downloads a model; the others wait, and find it then."""
        self._pins.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._pins.parent / f"{model.id.replace('/', '--')}.lock"
        with path.open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    tell("another process is fetching it", 0, None)
                    time.sleep(_TURN_SECONDS)
            yield

    # -- the commits that were met -----------------------------------------------------------------------
    def _read_pins(self) -> dict[str, _Pin]:
        try:
            return msgspec.json.decode(self._pins.read_bytes(), type=dict[str, _Pin])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            raise SettingsError(f"{self._pins} cannot be read ({error}): mend it, or remove it") from None

    def _keep(self, key: str, pin: _Pin) -> None:
        self._pins.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._pins.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            pins = self._read_pins()
            if pins.get(key) == pin:
                return
            pins[key] = pin
            fresh = self._pins.with_suffix(".new")
            fresh.write_text(json.dumps(msgspec.to_builtins(pins), indent=1, sort_keys=True) + "\n", "utf-8")
            fresh.replace(self._pins)

    def _keep_found(self, source: _Source) -> None:
        """Keep the commit of what somebody else has downloaded, too."""
        if source.folder is not None or source.key in self._read_pins():
            return
        if commit := hub.known_commit(source.repository, source.revision):
            folder = hub.snapshot(source.repository, commit)
            names = [source.file] if source.file else layout.loaded_from(folder)
            self._keep(source.key, _Pin(commit, {name: (folder / name).stat().st_size for name in names}))


# -- what the server and the commands ask for ------------------------------------------------------------
def weights_of(settings: Settings) -> Weights:
    """The weights as these settings have them. Raises SettingsError."""
    pairs = [text.partition("=") for text in settings.wan_weights]
    overrides = {model.strip(): place.strip() for model, _, place in pairs}
    return Weights(settings.data_dir / PINS, overrides, turbo=settings.wan_profile == "turbo")


def served_models(settings: Settings, catalog: Catalog) -> list[Model]:
    """The models that a worker with these settings takes and that have the table of this engine."""
    patterns = [part.strip() for part in settings.models.split(",")]
    models = (entry.model for entry in catalog.entries())
    return [one for one in models if has_wan(one) and any(fnmatchcase(one.id, part) for part in patterns)]


class Wanted(msgspec.Struct, frozen=True):
    """What a slot can serve."""

    local: Callable[[Model], Local]
    """Finds the weights of one model."""
    models: tuple[str, ...]
    """The only ones to serve."""


def wanted_weights(settings: Settings, catalog: Catalog, tell: Callable[[str], None]) -> Wanted:
    """Fetch what the models need that the settings name. Where they name none, those are served whose weights are
    there: nobody has asked for hundreds of gigabytes.

    A model whose weights cannot be had is told in the log, and again by the error of its first request, which tries
    anew. Raises SettingsError where no model is left.
    """
    weights = weights_of(settings)
    models = served_models(settings, catalog)
    if not models:
        raise SettingsError(
            "engine wan has no model to serve: none that fits RUSHES_MODELS has a table [engines.wan]"
        )
    if settings.models.strip() == ANY:
        return Wanted(lambda model: weights.fetch(model, _thinned(model, tell)), _there(weights, models))
    failed = []
    for model in models:
        try:
            weights.fetch(model, _thinned(model, tell))
        except (EngineError, ManifestError) as error:
            failed.append(error.message)
            log.event("weights not usable", model=model.id, error=error.message)
    if len(failed) == len(models):
        raise SettingsError("engine wan has the weights of no model: " + "; ".join(failed))
    return Wanted(lambda model: weights.fetch(model, _thinned(model, tell)), tuple(one.id for one in models))


def _there(weights: Weights, models: Sequence[Model]) -> tuple[str, ...]:
    """The ids of those whose weights are on this machine. Raises SettingsError where there are none."""
    there = []
    for model in models:
        try:
            found = weights.find(model)
        except (ManifestError, SettingsError) as error:
            log.event("weights not usable", model=model.id, error=error.message)
            continue
        if isinstance(found, Missing):
            log.event("model not served", model=model.id, error=found.text)
        else:
            there.append(model.id)
    if not there:
        known = ", ".join(model.id for model in models)
        raise SettingsError(
            "engine wan has the weights of no model yet: name those to fetch and serve in RUSHES_MODELS, or run "
            f"`rushes models fetch ID`. There are {known}"
        )
    return tuple(there)


def shown_size(count: int) -> str:
    """Bytes as people read them: ``126.0 GB`` of 10^9 bytes, as hub and disks count."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _thinned(model: Model, tell: Callable[[str], None]) -> Told:
    """At most one line a second, and the last one."""
    lock = threading.Lock()
    told = float("-inf")

    def tell_now(text: str, done: int, total: int | None) -> None:
        nonlocal told
        with lock:
            now = time.monotonic()
            if now - told < _TELL_SECONDS and done != total:
                return
            told = now
        far = f": {shown_size(done)} of {shown_size(total)}" if total else ""
        tell(f"{model.id}: {text}{far}")

    return tell_now


# -- one source ------------------------------------------------------------------------------------------
def _overriding(text: str) -> _Source:
    """What RUSHES_WAN_WEIGHTS gives a model instead."""
    folder = Path(text).expanduser()
    if text.startswith(("/", "~", ".")) or folder.is_dir():
        return _Source(folder.absolute())
    repository, _, revision = text.partition("@")
    return _Source(None, repository, revision)


def _look_into(source: _Source, folder: Path, expected: Mapping[str, int]) -> _Look:
    """What is wrong with the files of ``folder``; those that are ``expected`` must have these sizes, too."""
    if source.file:
        problem = layout.broken(folder / source.file)
        wrong = {source.file: problem} if problem else {}
    else:
        if problem := layout.foreign_in(folder):
            return _Look(source, folder, {layout.INDEX: problem}, foreign=True)
        wrong = layout.lacking(folder)
    for name, size in expected.items():
        there = _size(folder / name)
        if there != size:
            wrong.setdefault(name, "is missing" if there is None else "is cut off")
    names = [source.file] if source.file else [] if "" in wrong else layout.loaded_from(folder)
    sizes = {name: _size(folder / name) or 0 for name in names}
    if not wrong:
        return _Look(source, folder, {}, sum(sizes.values()))
    held = sum(size for name, size in sizes.items() if name not in wrong and name != layout.INDEX)
    if expected:
        lacking: int | None = sum(size for name, size in expected.items() if name in wrong or name not in sizes)
    else:
        lacking = source.bytes - held if source.bytes and source.bytes > held else None
    # What is needed is told by what is there: only when all that was expected is whole can more be lacking.
    lacked = bool(expected) and not any(name in expected or not name for name in wrong)
    return _Look(source, folder, wrong, held, lacking, lacked=lacked)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _missing(model: Model, looks: list[_Look]) -> Missing:
    foreign = [look for look in looks if look.foreign]
    lacked = [look for look in looks if look.lacked]
    wrong = foreign or lacked or [look for look in looks if look.wrong]
    sizes = [look.lacking for look in wrong]
    files, lines = [], []
    for look in wrong:
        where = str(look.folder) if look.source.folder is not None else look.source.repository
        files += [(f"{where}/{name}".rstrip("/"), problem) for name, problem in look.wrong.items()]
        lines.append(_told(look, where))
    known = [size for size in sizes if size is not None]
    remote = all(look.source.folder is None for look in wrong)
    fetchable = remote and not foreign and not lacked
    begun = any(look.bytes for look in wrong)
    step = f"`rushes models fetch {model.id}` gets it" if remote else "mend the folder, or name another"
    if foreign or lacked:
        step = hub.NAME_WAN if foreign else _LACKED
    what = "; ".join(lines)
    return Missing(
        f"{'half-downloaded: ' if begun and fetchable else ''}{what}: {step}",
        tuple(files),
        sum(known) if len(known) == len(sizes) else None,
        begun=begun,
        fetchable=fetchable,
        what=what,
        reason="weights_unusable" if foreign else "weights_incomplete",
    )


def _told(look: _Look, where: str) -> str:
    size = f" ({shown_size(look.lacking)})" if look.lacking else ""
    (name, problem), *others = look.wrong.items()
    more = f", and {len(others)} more file(s) are missing or not whole" if others and name else ""
    return f"{where}{'/' if name else ''}{name} {problem}{more}{size}"


def _harmed(path: Path, size: int) -> bool:
    return path.stat().st_size != size or layout.broken(path) is not None


def _check_room(count: int) -> None:
    """Raise EngineError ``weights_no_room`` where ``count`` more bytes do not fit into the hub's cache."""
    place = hub.cache_folder()
    free = shutil.disk_usage(next(one for one in (place, *place.parents) if one.exists())).free
    if count > free:
        raise EngineError(
            "weights_no_room",
            f"{shown_size(count)} are to be fetched, and {place} has {shown_size(free)} free: make room, or move "
            "HF_HOME to a larger disk",
        )
