"""What a ComfyUI has: its node classes, its version and memory, its files of weights.

Of a server it asks `/object_info`, `/system_stats` and `/models/{folder}` over HTTP, once and synchronously, for
the commands of an operator; the engine has its own connection. Of a folder it reads the disk: a ComfyUI that is
not running can be looked at, too. It changes nothing, on either.
"""

import argparse
import hashlib
import os
import shlex
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlsplit

import httpx
import yaml

from rushes.catalog.audit_nodes import WEIGHT_SUFFIXES
from rushes.errors import EngineError, ManifestError, SettingsError

SECONDS: Final = 30.0
"""`/object_info` of a ComfyUI with many packs has several MB and is made anew for each call."""
ALIASES: Final[dict[str, tuple[str, ...]]] = {
    "text_encoders": ("text_encoders", "clip"),
    "diffusion_models": ("unet", "diffusion_models"),
    "controlnet": ("controlnet", "t2i_adapter"),
}
"""Folders on the disk of one kind of weights, where that is not the folder of the same name (`folder_paths.py`)."""
RENAMED: Final[dict[str, str]] = {"unet": "diffusion_models", "clip": "text_encoders"}
"""Old names of kinds that ComfyUI still takes (`folder_paths.map_legacy`)."""
EXTRA_PATHS: Final = "extra_model_paths.yaml"


# -- a server --------------------------------------------------------------------------------------------
def fetch_object_info(url: str, seconds: float = SECONDS) -> dict[str, Any]:
    """Every node class of the ComfyUI at ``url`` by name. Raises EngineError ``comfyui_unreachable``."""
    found = _fetch(url, "/object_info", seconds)
    if not isinstance(found, dict) or not all(isinstance(node, dict) for node in found.values()):
        raise _strange(url, "/object_info")
    return found


def fetch_system_stats(url: str, seconds: float = SECONDS) -> dict[str, Any]:
    """Version, machine and devices, as ComfyUI tells them. Raises EngineError ``comfyui_unreachable``."""
    found = _fetch(url, "/system_stats", seconds)
    if not isinstance(found, dict):
        raise _strange(url, "/system_stats")
    return found


def fetch_weights(url: str, folders: Collection[str], seconds: float = SECONDS) -> dict[str, frozenset[str]]:
    """The names of the weights in those of ``folders`` that the server knows.

    A folder that it does not know is left out, as are all of them where it is too old for the question. Raises
    EngineError ``comfyui_unreachable``.
    """
    found = {}
    for folder in sorted(set(folders)):
        names = _fetch(url, f"/models/{quote(folder, safe='')}", seconds, absent=(404, 405))
        if isinstance(names, list):
            found[folder] = frozenset(str(name) for name in names)
    return found


def without_password(url: str) -> str:
    """The address as it may be shown and logged."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def describe(stats: Mapping[str, Any]) -> str:
    """A server's `/system_stats` in a few words; what an older or newer one leaves out is left out."""
    system, devices = stats.get("system"), stats.get("devices")
    words = []
    if isinstance(system, Mapping):
        words.append(f"ComfyUI {system.get('comfyui_version', 'of unknown version')}")
        if torch := system.get("pytorch_version"):
            words.append(f"torch {torch}")
    listed = devices if isinstance(devices, list) else []
    words += [_device(device) for device in listed if isinstance(device, Mapping)]
    return ", ".join(words) or "ComfyUI"


def _device(device: Mapping[str, Any]) -> str:
    name = str(device.get("name") or device.get("type") or "a device")
    total, free = device.get("vram_total"), device.get("vram_free")
    if isinstance(total, int | float) and isinstance(free, int | float) and total > 0:
        return f"{name} ({free / 2**30:.1f} of {total / 2**30:.1f} GiB free)"
    return name


def _fetch(url: str, path: str, seconds: float, absent: tuple[int, ...] = ()) -> Any:
    where = without_password(url)
    try:
        answer = httpx.get(url.rstrip("/") + path, timeout=seconds, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        cause = str(error) or type(error).__name__
        raise EngineError(
            "comfyui_unreachable",
            f"no ComfyUI answers at {where} ({cause}): start it, or mend the address",
            retryable=True,
        ) from None
    if answer.status_code in absent:
        return None
    if answer.status_code != 200:
        raise EngineError(
            "comfyui_unreachable",
            f"{where}{path} answers {answer.status_code}: is this the address of a ComfyUI?",
            retryable=answer.status_code >= 500,
        )
    try:
        return answer.json()
    except ValueError:
        raise _strange(url, path) from None


def _strange(url: str, path: str) -> EngineError:
    return EngineError(
        "comfyui_unreachable",
        f"{without_password(url)}{path} does not answer as a ComfyUI does: is this its address?",
    )


# -- a folder --------------------------------------------------------------------------------------------
class Arguments(NamedTuple):
    """What a command line of ComfyUI says of where files lie."""

    extra_paths: tuple[str, ...] = ()
    """Files like ``extra_model_paths.yaml``; relative ones are meant from ComfyUI's folder."""
    base: str = ""
    """The folder that has ``models`` and ``custom_nodes`` instead of ComfyUI's own."""


def read_arguments(text: str) -> Arguments:
    """The arguments of ``RUSHES_COMFYUI_ARGS``, read as ComfyUI reads them (`comfy/cli_args.py`).

    Raises SettingsError where they are no command line.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--extra-model-paths-config", nargs="+", action="append", default=[])
    parser.add_argument("--base-directory", default="")
    try:
        known, _ = parser.parse_known_args(shlex.split(text))
    except (ValueError, argparse.ArgumentError) as error:
        raise SettingsError(f"RUSHES_COMFYUI_ARGS cannot be read ({error}): {text!r}") from None
    return Arguments(
        tuple(name for some in known.extra_model_paths_config for name in some), known.base_directory
    )


class Installation:
    """A ComfyUI's folder on this machine, read and never changed; it need not be running.

    ``arguments`` are those that it is started with. Raises ManifestError where ``extra_model_paths.yaml``, or
    another such file that the arguments name, cannot be read, SettingsError where the arguments cannot, and
    EngineError where ``folder`` is none of a ComfyUI.
    """

    def __init__(self, folder: Path, arguments: str = "") -> None:
        self.folder = folder = folder.expanduser().absolute()
        if not (folder / "main.py").is_file() or not (folder / "nodes.py").is_file():
            raise EngineError(
                "comfyui_dir",
                f"{folder} is not the folder of a ComfyUI (it has no main.py and nodes.py): mend comfyui_dir",
            )
        told = read_arguments(arguments)
        self.base = folder / told.base
        """What holds ``models`` and ``custom_nodes``."""
        own = folder / EXTRA_PATHS
        self._extra: dict[str, list[tuple[Path, bool]]] = {}
        for file in (*([own] if own.exists() else []), *(folder / name for name in told.extra_paths)):
            for kind, places in _extra_paths(file).items():
                self._extra.setdefault(kind, []).extend(places)

    def places(self, kind: str) -> tuple[Path, ...]:
        """Where the weights of a kind, such as ``diffusion_models``, are looked for, the first first."""
        kind = RENAMED.get(kind, kind)
        own = tuple(self.base / "models" / name for name in ALIASES.get(kind, (kind,)))
        first = self._leading(kind)
        rest = tuple(place for place, leads in self._extra.get(kind, ()) if not leads)
        return tuple(dict.fromkeys((*first, *own, *rest)))

    def home(self, kind: str) -> Path:
        """Where new weights of a kind belong: the place that leads, else the folder that is called so."""
        kind = RENAMED.get(kind, kind)
        return next(iter(self._leading(kind)), self.base / "models" / kind)

    def _leading(self, kind: str) -> tuple[Path, ...]:
        """The places before ComfyUI's own: each goes before all that were named before it
        (`folder_paths.add_model_folder_path`).
        """
        return tuple(place for place, leads in reversed(self._extra.get(kind, ())) if leads)

    def weight(self, kind: str, name: str) -> Path | None:
        """The file of these weights, or None. A name that leads out of its folder is nowhere."""
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return None
        return next((place / name for place in self.places(kind) if (place / name).is_file()), None)

    def weights(self, kind: str) -> frozenset[str]:
        """The names of all weights of a kind, as a loader has them: with the folders below the kind's own."""
        return frozenset(name for place in self.places(kind) for name in _names_below(place))

    def classes(self, wanted: Collection[str]) -> frozenset[str]:
        """Those of ``wanted`` that ComfyUI's sources or those of a custom pack mention as a quoted word.

        That is how every node class gets its name. A class that is not mentioned is not there, unless a pack
        makes up names at run time; one that is mentioned may still fail to load.
        """
        left = set(wanted)
        if not left:
            return frozenset()
        for source in self._sources():
            if not left:
                break
            try:
                text = source.read_text("utf-8", "replace")
            except OSError:
                continue
            left -= {name for name in left if f'"{name}"' in text or f"'{name}'" in text}
        return frozenset(set(wanted) - left)

    def packs(self) -> frozenset[str]:
        """The names of the folders with custom nodes, in lower case; a pack that is switched off is not there."""
        found = set()
        for place in self._pack_places():
            try:
                entries = list(place.iterdir())
            except OSError:
                continue
            found |= {
                entry.name.lower()
                for entry in entries
                if entry.is_dir()
                and not entry.name.startswith((".", "__"))
                and not entry.name.endswith(".disabled")
            }
        return frozenset(found)

    def _pack_places(self) -> tuple[Path, ...]:
        return (self.base / "custom_nodes", *(place for place, _ in self._extra.get("custom_nodes", ())))

    def _sources(self) -> Iterator[Path]:
        yield self.folder / "nodes.py"
        for place in (self.folder / "comfy_extras", self.folder / "comfy_api_nodes", *self._pack_places()):
            for root, folders, files in os.walk(place, followlinks=True):
                folders[:] = [
                    name
                    for name in folders
                    if not name.startswith((".", "__")) and not name.endswith(".disabled")
                ]
                yield from (Path(root, name) for name in sorted(files) if name.endswith(".py"))


def sha256_of(file: Path) -> str:
    """The digest of a file of any size, in hexadecimal. Reads all of it; raises OSError."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _names_below(place: Path) -> Iterator[str]:
    for root, folders, files in os.walk(place, followlinks=True):
        folders[:] = [name for name in folders if name != ".git"]
        for name in files:
            if name.lower().endswith(WEIGHT_SUFFIXES):
                yield Path(root, name).relative_to(place).as_posix()


def _extra_paths(file: Path) -> dict[str, list[tuple[Path, bool]]]:
    """The places of a file like ``extra_model_paths.yaml`` by kind, each with whether it goes before ComfyUI's own.

    Reads the file as `utils/extra_config.py` of ComfyUI does. Raises ManifestError.
    """
    try:
        table = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ManifestError(str(file), "", f"cannot be read: {' '.join(str(error).split())}") from None
    found: dict[str, list[tuple[Path, bool]]] = {}
    for section in (table or {}).values() if isinstance(table, dict | None) else ():
        if not isinstance(section, dict):
            continue
        base = os.path.expandvars(Path(str(section.get("base_path") or "")).expanduser())
        leads = bool(section.get("is_default"))
        for kind, lines in section.items():
            if kind in ("base_path", "is_default") or not isinstance(lines, str):
                continue
            places = found.setdefault(RENAMED.get(kind, str(kind)), [])
            for line in filter(None, lines.split("\n")):
                places.append((Path(os.path.normpath(file.parent / base / line)), leads))
    return found
