"""Every setting: one frozen object, read once, from RUSHES_* variables and an optional rushes.toml.

The environment wins over the file. `docs/settings.md` documents each one; a test holds it to this module.
"""

import difflib
import ipaddress
import math
import os
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args, get_origin
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from rushes.errors import SettingsError

PREFIX: Final = "RUSHES_"
REMOTE_KINDS: Final = ("dashscope", "runcomfy", "openai-video", "fal", "replicate")
DASHSCOPE_REGIONS: Final = ("intl", "us", "cn")
"""Singapore, Virginia, Beijing."""


def _help(text: str, **bounds: Any) -> Meta:
    return Meta(description=text, **bounds)


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All settings with their defaults."""

    # where things are
    data_dir: Annotated[Path, _help("Folder of the SQLite store and of local files.")] = Path("rushes-data")
    database_url: Annotated[
        str, _help("PostgreSQL address (`postgresql://…`). Empty: SQLite in the data directory.")
    ] = ""
    storage_url: Annotated[
        str,
        _help(
            "Where files are kept: empty for `files` in the data directory, or `s3://bucket/prefix`, "
            "`gs://bucket/prefix`, `az://container/prefix`. Credentials as each vendor's own variables."
        ),
    ] = ""
    models_dir: Annotated[Path | None, _help("Folder with models of your own; read again when it changes.")] = (
        None
    )

    # gateway
    host: Annotated[str, _help("Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, _help("Port to listen on; 0 takes a free one.", ge=0, le=65535)] = 8000
    public_url: Annotated[
        str, _help("Base of the URLs in answers. Empty: taken from the request's Host header.")
    ] = ""
    cors_origins: Annotated[
        tuple[str, ...], _help("Origins that browsers may call from, comma-separated; `*` for all.")
    ] = ()
    trusted_proxies: Annotated[
        str, _help("Addresses whose X-Forwarded-Proto and -For are believed, comma-separated; `*` for all.")
    ] = "127.0.0.1,::1"
    max_body_bytes: Annotated[int, _help("Largest JSON body, in bytes.", ge=1024)] = 64 * 1024 * 1024
    rate_limit: Annotated[
        float, _help("Submits per second and key, with bursts of ten times that; 0 for no limit.", ge=0)
    ] = 0.0
    queue_limit: Annotated[int, _help("Waiting requests per key; 0 for no limit.", ge=0)] = 0
    access_log: Annotated[bool, _help("One JSON line per HTTP request on standard error.")] = True
    output_url_seconds: Annotated[
        int, _help("How long an output's signed URL stays valid, in seconds.", ge=1)
    ] = 24 * 3600
    key_cache_seconds: Annotated[
        float, _help("How long a revoked key may go on working on PostgreSQL, in seconds.", ge=0)
    ] = 1.0

    # workers
    workers: Annotated[
        int, _help("Engine slots that `rushes serve` runs on this machine: requests at once.", ge=0)
    ] = 1
    engine: Annotated[
        str,
        _help(
            "Engine of local slots: `draft`, `comfyui` (the default where one of the two below is set), `wan`, or "
            "`module:factory` for one of your own."
        ),
    ] = "draft"
    engine_start_seconds: Annotated[
        float, _help("How long an engine may take to start without a sign of getting on, in seconds.", gt=0)
    ] = 300.0
    comfyui_urls: Annotated[
        tuple[str, ...],
        _help("ComfyUI servers to drive, comma-separated (`http://127.0.0.1:8188`): one slot each."),
    ] = ()
    comfyui_dir: Annotated[
        Path | None,
        _help("Folder of a ComfyUI that each slot starts for itself, watches and starts again."),
    ] = None
    comfyui_python: Annotated[
        str, _help("Python of that ComfyUI. Empty: its own virtual environment, else this one.")
    ] = ""
    comfyui_args: Annotated[str, _help("More arguments for that ComfyUI, as on a command line.")] = ""
    comfyui_variants: Annotated[
        tuple[str, ...], _help("Variants of workflows to take where a model has them, comma-separated.")
    ] = ()
    wan_profile: Annotated[
        Literal["exact", "fast", "turbo"],
        _help(
            "How the engine `wan` trades likeness to the stock pipeline for speed: `exact`, `fast` or `turbo`."
        ),
    ] = "exact"
    wan_device: Annotated[
        Literal["auto", "cuda", "cpu"],
        _help(
            "Where the engine `wan` computes: `cuda`, `cpu`, or `auto`, which takes the graphics card where there "
            "is one."
        ),
    ] = "auto"
    wan_cards: Annotated[
        int,
        _help(
            "Graphics cards that one slot of the engine `wan` makes each video on, where the model can be spread.",
            ge=1,
        ),
    ] = 1
    wan_weights: Annotated[
        tuple[str, ...],
        _help(
            "Weights for the engine `wan` instead of the manifest's, comma-separated: "
            "`model-id=folder` or `model-id=owner/repo@revision`."
        ),
    ] = ()
    wan_loras_dir: Annotated[
        Path | None, _help("Folder of the LoRA files that requests to the engine `wan` may name.")
    ] = None
    models: Annotated[str, _help("Which models the workers serve, as comma-separated patterns.")] = "*"
    lease_seconds: Annotated[
        float, _help("A worker that gives no sign of life for so long loses its requests.", gt=0)
    ] = 15.0
    attempt_limit: Annotated[int, _help("How often a request is tried when its engine process dies.", ge=1)] = 3
    warm_age_seconds: Annotated[
        float, _help("How long a waiting request may be passed over for a loaded model.", ge=0)
    ] = 30.0
    account_limit: Annotated[
        int, _help("Requests of one account that may run at once; 0 for no limit.", ge=0)
    ] = 0
    drain_seconds: Annotated[float, _help("How long a stopping worker lets running requests finish.", ge=0)] = (
        30.0
    )
    draft_mark: Annotated[bool, _help("Burn a small draft mark into what the draft engine makes.")] = True

    # remotes
    remotes: Annotated[
        tuple[str, ...],
        _help(
            "Remote engines that workers may use, comma-separated: `kind`, `kind@place` or `name=kind@place`. Kinds: "
            "`dashscope`, `runcomfy`, `openai-video`, `fal`, `replicate`. A place is a base URL, or for dashscope a "
            "region: `intl`, `us` or `cn`."
        ),
    ] = ()
    secrets_file: Annotated[
        Path | None, _help('TOML file of the remotes\' keys (`FAL_KEY = "…"`); the environment wins over it.')
    ] = None
    overflow_seconds: Annotated[
        float,
        _help(
            "For models whose manifest lists no routes: a request that would wait longer than this for a local slot "
            "goes to a remote, in seconds; 0: only where no local engine serves the model.",
            ge=0,
        ),
    ] = 0.0
    remote_limit: Annotated[int, _help("Requests that a worker has at each remote at once.", ge=1)] = 8
    budget_usd_per_day: Annotated[
        float, _help("What remotes may cost in a day (UTC), in USD; 0 for no limit.", ge=0)
    ] = 0.0
    key_budget_usd_per_day: Annotated[
        float, _help("What remotes may cost in a day (UTC) for each API key, in USD; 0 for no limit.", ge=0)
    ] = 0.0

    # inputs
    fetch_allow: Annotated[
        tuple[str, ...],
        _help("Private networks that input URLs may point into, comma-separated (`10.0.0.0/8`)."),
    ] = ()
    fetch_seconds: Annotated[float, _help("Total time to fetch one input file, in seconds.", gt=0)] = 60.0
    fetch_concurrency: Annotated[int, _help("Input files fetched at once by a worker.", ge=1)] = 8
    max_image_bytes: Annotated[int, _help("Largest input image, in bytes.", ge=1)] = 50_000_000
    max_video_bytes: Annotated[int, _help("Largest input video, in bytes.", ge=1)] = 100_000_000
    max_image_pixels: Annotated[int, _help("Largest input image, in pixels.", ge=1)] = 100_000_000

    # outputs
    retention_days: Annotated[
        float, _help("Days after which ended requests lose their files; 0 keeps them.", ge=0)
    ] = 0.0


def setting_names() -> tuple[str, ...]:
    return tuple(f.name for f in msgspec.structs.fields(Settings))


def setting_help(name: str) -> str:
    """The sentence that documents a setting. Raises KeyError where there is no such setting."""
    types = {field.name: field.type for field in msgspec.structs.fields(Settings)}
    return str(get_args(types[name])[1].description)


def load(
    environ: Mapping[str, str] | None = None,
    *,
    file: Path | None = None,
    cards: Callable[[], int] = lambda: 1,
    **overrides: Any,
) -> Settings:
    """Read the settings: defaults, then the file, then the environment, then ``overrides`` that are not None.

    ``file`` defaults to ``$RUSHES_CONFIG`` or ``./rushes.toml`` where that exists. ``cards`` is asked how many
    graphics cards there are, where that matters. Raises SettingsError that names the setting and where it was set.
    """
    environ = os.environ if environ is None else environ
    values, origin = _from_file(environ, file)
    _from_environment(environ, values, origin)
    for name, value in overrides.items():
        if value is not None:
            values[name], origin[name] = value, f"--{name.replace('_', '-')}"
    problems = [
        f"{origin[name]}: there is no setting {name!r}; "
        + (f"did you mean {near!r}?" if (near := _near(name)) else "see docs/settings.md")
        for name in values
        if name not in _DEFAULTS
    ]
    converted = {}
    for field in msgspec.structs.fields(Settings):
        if field.name in values:
            try:
                converted[field.name] = _value(field, values[field.name])
            except (msgspec.ValidationError, TypeError, ValueError) as error:
                what = field.name
                if what != "remotes":  # whose entries may have keys in them by mistake
                    what += f" cannot be {_HIDDEN.sub('***', repr(values[what]))}"
                problems.append(f"{origin[field.name]}: {what}: {error}")
    if problems:
        raise SettingsError("\n".join(problems))
    settings = _with_comfyui(Settings(**converted), values)
    if settings.engine == "wan" and settings.wan_device != "cpu" and "workers" not in values:
        return msgspec.structs.replace(settings, workers=max(1, cards() // settings.wan_cards))
    return settings


def _with_comfyui(settings: Settings, given: Collection[str]) -> Settings:
    """ComfyUI servers, where they are named, say what the engine is and how many slots there are."""
    urls = settings.comfyui_urls
    if not urls and settings.comfyui_dir is None:
        if settings.engine == "comfyui":
            raise SettingsError("engine comfyui needs RUSHES_COMFYUI_URLS or RUSHES_COMFYUI_DIR")
        return settings
    if urls and settings.comfyui_dir is not None:
        raise SettingsError("set RUSHES_COMFYUI_URLS or RUSHES_COMFYUI_DIR, not both")
    if twice := next((url for url in urls if urls.count(url) > 1), ""):
        shown = urlsplit(twice)._replace(netloc=urlsplit(twice).netloc.rpartition("@")[2]).geturl()
        raise SettingsError(f"comfyui_urls names {shown} twice; each server has one slot")
    engine = settings.engine if "engine" in given else "comfyui"
    workers = settings.workers
    if engine == "comfyui" and urls and workers:
        if "workers" in given and workers != len(urls):
            raise SettingsError(
                f"workers cannot be {workers}: comfyui_urls has one slot for each of {len(urls)} server(s); "
                "leave workers out, or set it to 0 for none"
            )
        workers = len(urls)
    return msgspec.structs.replace(settings, engine=engine, workers=workers)


def _from_file(environ: Mapping[str, str], file: Path | None) -> tuple[dict[str, Any], dict[str, str]]:
    named = environ.get("RUSHES_CONFIG")
    path = file or (Path(named) if named else Path("rushes.toml"))
    if not path.exists():
        if file or named:
            raise SettingsError(f"{path}: this settings file does not exist")
        return {}, {}
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise SettingsError(f"{path}: {error}") from None
    return values, dict.fromkeys(values, str(path))


def _from_environment(environ: Mapping[str, str], values: dict[str, Any], origin: dict[str, str]) -> None:
    for variable, text in environ.items():
        if not variable.startswith(PREFIX):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in _DEFAULTS:
            if _REMOTE_KEY.fullmatch(variable):
                continue  # rushes.engines.remote.configured reads it, and no other
            if near := _near(name):
                known = f"{PREFIX}{near.upper()}"
                raise SettingsError(f"{variable}: there is no such setting; did you mean {known}?")
        elif text or _DEFAULTS[name] in _EMPTY:
            # Set to nothing is how compose files leave a variable out; only where nothing is a value is it one.
            # A path is none: the empty one would be the current folder.
            values[name], origin[name] = text, variable


def _value(field: Any, value: Any) -> Any:
    """What was written, as the setting's type. Raises ValueError or msgspec.ValidationError."""
    if isinstance(field.default, tuple):
        parts = value.split(",") if isinstance(value, str) else value
        value = tuple(part.strip() for part in parts if part.strip())
    elif isinstance(field.default, bool):
        value = _switch(value)
    elif isinstance(value, Path):
        value = str(value)
    elif value == "" and field.default is None:
        return None
    kind = get_args(field.type)[0]
    if get_origin(kind) is Literal:
        _check_word(str(value), get_args(kind))
    made = msgspec.convert(value, field.type, strict=False, dec_hook=lambda type_, text: type_(text))
    check = _CHECKS.get(field.name)
    if check is not None:
        for part in made if isinstance(made, tuple) else (made,):
            if part:
                check(part)
    if field.name == "remotes":
        remotes_of(made)
    return tuple(map(server_address, made)) if field.name == "comfyui_urls" else made


def _check_word(word: str, known: tuple[str, ...]) -> None:
    if word not in known:
        near = next(iter(difflib.get_close_matches(word.lower(), known, 1, 0.5)), None)
        hint = f"; did you mean {near}?" if near else ""
        raise ValueError(f"there is {', '.join(known[:-1])} and {known[-1]}{hint}")


def _switch(value: Any) -> bool:
    word = str(value).lower()
    if word not in ("on", "yes", "true", "1", "off", "no", "false", "0"):
        raise ValueError("it is a switch: on or off")
    return word in ("on", "yes", "true", "1")


def server_address(text: str) -> str:
    """The address of a ComfyUI in its one form: what is the same server is the same text.

    Raises ValueError, which says how to write it.
    """
    if not _is_base(text):
        likely = f"http://{text}"
        example = likely if "//" not in text and _is_base(likely) else "http://127.0.0.1:8188"
        raise ValueError(f"write a whole address, such as {example}")
    parts = urlsplit(text)
    host = (parts.hostname or "").rstrip(".")
    place = f"[{host}]" if ":" in host else host
    if parts.port not in (None, _PORTS[parts.scheme]):
        place = f"{place}:{parts.port}"
    user, at, _ = parts.netloc.rpartition("@")
    return f"{parts.scheme}://{user}{at}{place}{parts.path.rstrip('/')}"


class Remote(NamedTuple):
    """One entry of the setting ``remotes``."""

    name: str
    kind: str
    place: str
    """A base URL in its one form, a region, or "" for the kind's own."""


def key_variable(name: str) -> str:
    """The variable of the key of the remote ``name``, wherever it is."""
    return f"{PREFIX}REMOTE_{re.sub('[^A-Z0-9]', '_', name.upper())}_KEY"


def remotes_of(texts: Iterable[str]) -> tuple[Remote, ...]:
    """Read the setting ``remotes``. Raises ValueError, which names the entry, and nothing that may be a key."""
    found: dict[str, Remote] = {}
    for number, text in enumerate(texts, 1):
        try:
            remote = remote_of(text)
        except ValueError as error:
            raise ValueError(f"entry {number}: {error}") from None
        variable = key_variable(remote.name)
        first = found.setdefault(variable, remote).name
        if len(found) < number:  # the key of one would go to the other's host
            both = f"{first} and {remote.name} would both have {variable} as their key"
            what = f"it names {first} twice" if first == remote.name else both
            raise ValueError(f"{what}; give one of them another name: other={remote.kind}@…")
    return tuple(found.values())


def remote_of(text: str) -> Remote:
    """Read an entry of the setting ``remotes``. Raises ValueError, which says how to write it, and quotes no key."""
    head, at, place = (part.strip() for part in text.partition("@"))
    name, sign, kind = (part.strip() for part in head.rpartition("="))
    if kind not in REMOTE_KINDS:
        near = next(iter(difflib.get_close_matches(kind.lower(), REMOTE_KINDS, 1, 0.5)), None)
        hint = f"; did you mean {near}?" if near else ""
        what = f"no kind {kind!r}" if near and re.fullmatch(r"[a-z0-9-]{1,20}", kind) else "no such kind"
        raise ValueError(f"there is {what}, but {', '.join(REMOTE_KINDS)}{hint}")
    if sign and not _REMOTE_NAME.fullmatch(name):
        what = f"the name {name!r}" if re.fullmatch(r"[A-Za-z._-]{0,20}", name) else "the name"
        raise ValueError(f"{what} has other than lower-case letters, digits and single -, _ or .")
    name = name or kind
    if name in _TAKEN_NAMES or (name != kind and name in REMOTE_KINDS):
        raise ValueError(f"a {kind} cannot be named {name!r}, the name of another engine; write another name")
    if at and not place:
        raise ValueError("nothing stands behind the @; write a base URL, or leave the @ out")
    if kind == "openai-video" and not place:
        raise ValueError("it has no place of its own; write openai-video@http://127.0.0.1:8000/v1")
    if kind == "dashscope" and place and "/" not in place:
        _check_word(place, DASHSCOPE_REGIONS)
        return Remote(name, kind, place)
    if "@" in place:
        raise ValueError("an address holds no user or key: set the key as docs/remotes.md says")
    if place:
        _check_base(place)
    return Remote(name, kind, place and server_address(place))


def _is_base(url: str) -> bool:
    try:
        parts = urlsplit(url)
        whole = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return whole and parts.scheme in _PORTS and not parts.query and not parts.fragment and " " not in url


def _check_base(url: str) -> None:
    if not _is_base(url):
        raise ValueError("write a whole address, such as https://api.example")


def _check_origin(origin: str) -> None:
    parts = urlsplit(origin)
    if origin != "*" and (not parts.scheme or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}"):
        raise ValueError("an origin has a scheme and a host and nothing more, such as https://a.example; or *")


def _check_weights(text: str) -> None:
    model, sign, place = text.partition("=")
    if not (model.strip() and sign and place.strip()):
        raise ValueError("write model-id=folder or model-id=owner/repo@revision")


def _check_networks(text: str) -> None:
    for part in filter(None, (one.strip() for one in text.split(","))):
        if part != "*":
            ipaddress.ip_network(part, strict=False)


def _check_network(text: str) -> None:
    ipaddress.ip_network(text, strict=False)


def _check_finite(number: float) -> None:
    if not math.isfinite(number):
        raise ValueError("write a number; 0 is for no limit")


def _one_of(*schemes: str) -> Callable[[str], None]:
    def check(url: str) -> None:
        if not url.startswith(schemes):
            raise ValueError("it begins with " + " or ".join(schemes))

    return check


def _check_engine(name: str) -> None:
    if name not in ("draft", "noop", "comfyui", "wan") and not re.fullmatch(r"[\w.]+:\w+", name):
        raise ValueError("there is draft, comfyui, wan, or module:factory for one of your own")


_REMOTE_NAME: Final = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*")
_REMOTE_KEY: Final = re.compile(rf"{PREFIX}REMOTE_[A-Z0-9_]+_KEY")
_TAKEN_NAMES: Final = ("local", "draft", "noop", "comfyui", "wan")
_HIDDEN: Final = re.compile(r"""(?<=//)[^/\s,'"]*(?=@)|(?<=\?)[^\s,'"]+""")
_CHECKS: Final[dict[str, Callable[[Any], object]]] = {
    "public_url": _check_base,
    "cors_origins": _check_origin,
    "trusted_proxies": _check_networks,
    "fetch_allow": _check_network,
    "wan_weights": _check_weights,
    "budget_usd_per_day": _check_finite,
    "key_budget_usd_per_day": _check_finite,
    "database_url": _one_of("postgresql://", "postgres://"),
    "storage_url": _one_of("s3://", "gs://", "az://"),
    "engine": _check_engine,
}
_PORTS: Final = {"http": 80, "https": 443}
_EMPTY: Final = ("", ())
_DEFAULTS: Final = {field.name: field.default for field in msgspec.structs.fields(Settings)}
_MORE_VARIABLES: Final = ("config", "api_key", "base_url", "child_settings", "supervisor")


def _near(name: str) -> str | None:
    """The setting that was probably meant."""
    if name in _MORE_VARIABLES:
        return None
    return next(iter(difflib.get_close_matches(name, _DEFAULTS, 1, 0.75)), None)
