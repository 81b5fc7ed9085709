"""The hub of weights, through its own client: what a repository holds, what of it lies here, and downloads.

The client's own settings hold: HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE. It reads them when it
is imported, which the functions here do that need it: this module itself can be imported without the extra ``wan``.
What goes wrong is raised as EngineError; see :func:`explain` for the reasons.

The cache's layout (``models--owner--name/{blobs,refs,snapshots}``) is documented at
https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
"""

import errno
import glob
import importlib
import json
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from rushes.engines.wan.layout import INDEX, foreign, without_weights
from rushes.errors import EngineError, SettingsError

INSTALL: Final = "pip install 'rushes[wan]'"
NAME_WAN: Final = "name a Wan pipeline in `weights` or RUSHES_WAN_WEIGHTS"
COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SECONDS: Final = 30.0
"""For one question to the hub; downloads have the client's own limits (HF_HUB_DOWNLOAD_TIMEOUT)."""
_THREADS: Final = 8
_LEFT_OVER: Final = re.compile(r"\.[0-9a-f]{8}\.incomplete$")
"""Parts of a download that was killed. The client gives each a name of its own and never uses it again."""
_LEFT_OVER_SECONDS: Final = 3600.0


class Listing(NamedTuple):
    """What a repository holds at one commit."""

    commit: str
    files: dict[str, int]
    """Bytes by name."""


# -- what lies here --------------------------------------------------------------------------------------
def cache_folder() -> Path:
    """Where the client keeps its downloads. Raises SettingsError without the extra."""
    return Path(_client("constants").HF_HUB_CACHE).expanduser()


def snapshot(repository: str, commit: str) -> Path:
    """The folder of one commit, whether it is there or not."""
    return _folder(repository) / "snapshots" / commit


def known_commit(repository: str, revision: str) -> str | None:
    """The commit of a branch or tag as the last download met it; None where there was none."""
    if COMMIT.fullmatch(revision):
        return revision
    with suppress(OSError):
        text = (_folder(repository) / "refs" / (revision or "main")).read_text("ascii").strip()
        if COMMIT.fullmatch(text):
            return text
    return None


def has_token() -> bool:
    """Whether HF_TOKEN or `hf auth login` gives the client a token."""
    return bool(importlib.import_module("huggingface_hub").get_token())


def is_offline() -> bool:
    return bool(_client("constants").HF_HUB_OFFLINE)


def left_overs(repository: str) -> list[Path]:
    """Parts of killed downloads that nobody has written to for an hour."""
    parts = (_folder(repository) / "blobs").glob("*.incomplete")
    before = time.time() - _LEFT_OVER_SECONDS
    found = []
    for part in parts:
        with suppress(OSError):
            if _LEFT_OVER.search(part.name) and part.stat().st_mtime < before:
                found.append(part)
    return found


def _folder(repository: str) -> Path:
    return cache_folder() / f"models--{repository.replace('/', '--')}"


# -- what the hub has ------------------------------------------------------------------------------------
def listing(repository: str, revision: str) -> Listing:
    """Ask the hub for the commit of ``revision`` (empty: the main branch) and for its files. Raises EngineError."""
    with _explained(repository, revision):
        api = importlib.import_module("huggingface_hub").HfApi()
        info = api.model_info(repository, revision=revision or None, files_metadata=True, timeout=_SECONDS)
        return Listing(str(info.sha), {one.rfilename: int(one.size or 0) for one in info.siblings or ()})


def fetch_index(repository: str, commit: str) -> dict[str, Any]:
    """The pipeline's `model_index.json`. Raises EngineError."""
    with _explained(repository, commit):
        path = importlib.import_module("huggingface_hub").hf_hub_download(repository, INDEX, revision=commit)
        try:
            index = json.loads(Path(path).read_text("utf-8"))
        except ValueError:
            index = None
    if not isinstance(index, dict):
        raise EngineError("weights_incomplete", f"{repository}: its {INDEX} is no JSON object")
    return index


def check_pipeline(repository: str, names: Collection[str], index: Mapping[str, Any]) -> None:
    """Raise EngineError where the files of a repository are seen from afar to be of no use."""
    if problem := foreign(index):
        raise EngineError("weights_unusable", f"{repository}/{INDEX} {problem}: {NAME_WAN}")
    if bare := ", ".join(without_weights(names, index)):
        text = f"{repository} has no safetensors weights of {bare}, and other formats are refused"
        raise EngineError("weights_incomplete", f"{text}: name another, or mend `weights`")


def download(
    repository: str,
    commit: str,
    files: Collection[str],
    advance: Callable[[int], None],
    *,
    again: bool = False,
) -> None:
    """Bring ``files`` into the cache; what is there already is left, but with ``again`` it is replaced.

    ``advance`` hears the bytes that have come so far, from several threads, one after the other. Raises
    EngineError.
    """
    if not files:
        return
    with _explained(repository, commit):
        importlib.import_module("huggingface_hub").snapshot_download(
            repository,
            revision=commit,
            allow_patterns=[glob.escape(name) for name in files],
            force_download=again,
            max_workers=_THREADS,
            tqdm_class=_bars(advance),
        )


def _bars(advance: Callable[[int], None]) -> type:
    """A class of progress bars that draw nothing, and tell ``advance`` how many bytes have come."""
    tqdm: Any = importlib.import_module("tqdm.std").tqdm
    lock = threading.Lock()
    bars: list[Any] = []

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no thread that draws now and then

        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*arguments, **{**options, "disable": False, "mininterval": 0})
            with lock:
                bars.append(self)

        def display(self, *_: Any, **__: Any) -> bool:
            return True

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            with lock:
                # One bar counts files, one bytes from the network and one bytes on the disk.
                advance(max((int(bar.n) for bar in bars if bar.unit == "B"), default=0))
            return shown

    return Bar


# -- what goes wrong -------------------------------------------------------------------------------------
@contextmanager
def _explained(repository: str, revision: str) -> Iterator[None]:
    _client("errors")
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        raise explain(error, repository, revision) from error


def explain(error: Exception, repository: str, revision: str) -> EngineError:
    """What the client raised, with what to do about it.

    The reasons: ``weights_gated``, ``weights_denied``, ``weights_not_found``, ``weights_no_room``,
    ``weights_unreachable`` (which another try may mend).
    """
    errors = _client("errors")
    while isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "it is not in the cache, either": what happened is in the cause
    status = getattr(getattr(error, "response", None), "status_code", None)
    endpoint = _client("constants").ENDPOINT
    page = f"{endpoint}/{repository}"
    if isinstance(error, errors.GatedRepoError):
        step = (
            "" if has_token() else "make a token (https://huggingface.co/settings/tokens), set HF_TOKEN to it, "
        )
        text = (
            f"{repository} is gated: {step}accept its terms at {page} with the token's account, and start again"
        )
        return EngineError("weights_gated", text)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return _unreachable(f"{repository}: HF_HUB_OFFLINE is set, and not all of it is here; take that away")
    if isinstance(error, errors.RevisionNotFoundError):
        text = f"{repository} has no revision {revision!r}: mend `revision` in the manifest; {page} shows them"
        return EngineError("weights_not_found", text)
    if isinstance(error, errors.RepositoryNotFoundError):
        step = "" if has_token() else "; for a private one set HF_TOKEN"
        return EngineError(
            "weights_not_found", f"there is no repository {page}, or it is private: mend its name{step}"
        )
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        text = f"{repository} has no longer all of its files at {revision}: {_short(error)}"
        return EngineError("weights_not_found", text)
    if status in (401, 403):
        return EngineError("weights_denied", f"the hub refuses {repository}: check HF_TOKEN ({_short(error)})")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return EngineError(
            "weights_no_room", f"the disk of {cache_folder()} is full: make room, or move HF_HOME"
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return EngineError("weights_no_room", f"{_short(error)}: let it be written to, or move HF_HOME")
    return _unreachable(f"{repository} cannot be fetched from {endpoint}: {_short(error)}")


def _unreachable(text: str) -> EngineError:
    return EngineError("weights_unreachable", text, retryable=True)


def _short(error: Exception) -> str:
    """An error on one line, without the signatures that addresses of files carry."""
    text = " ".join(re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", str(error)).split())
    return f"{type(error).__name__}: {text[:300]}".rstrip(": ")


def _client(part: str) -> Any:
    """A module of the hub's client. Raises SettingsError without the extra."""
    try:
        return importlib.import_module(f"huggingface_hub.{part}")
    except ModuleNotFoundError as error:
        raise SettingsError(f"engine wan needs more packages ({error.name}): {INSTALL}") from None
