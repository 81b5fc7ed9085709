"""The remote engines that the settings name, with their addresses and keys.

A key in the environment sends nothing anywhere: only remotes that the operator lists are used. A vendor's own
variable is read for that vendor's own addresses alone, so that no key goes to another host. Keys are in no message of
this module, and :class:`Secret` keeps them out of logs.
"""

import os
import re
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import msgspec

from rushes.errors import SettingsError
from rushes.settings import PREFIX, Remote, Settings, remotes_of
from rushes.settings import key_variable as key_variable

_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
_V1: Final = "/v1"
_ANY_KEY: Final = re.compile(rf"{PREFIX}REMOTE_.*_KEY", re.IGNORECASE | re.DOTALL)


class Secret:
    """A key. Shows itself nowhere but in :attr:`value`."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    @property
    def value(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce__(self) -> Any:
        raise TypeError("a key is not written anywhere")


class RemoteConfig(msgspec.Struct, frozen=True):
    """One remote, ready to be connected to."""

    name: str
    kind: str
    base_url: str
    """Without a slash at its end. For openai-video it ends on what stands before ``/videos`` (``…/v1``); for the
    others it is what stands before the wire's first ``/v1`` or ``/api``.
    """
    key: Secret | None
    """None where the place needs none."""


class _Kind(NamedTuple):
    places: Mapping[str, str]
    """The vendor's own base URLs, by region; "" is the one that is taken without one."""
    variable: str
    """The vendor's own name for its key."""
    keyed: bool
    """Whether it takes nothing without a key, wherever it is."""


_SINGAPORE: Final = "https://dashscope-intl.aliyuncs.com"
_KINDS: Final[Mapping[str, _Kind]] = {
    "dashscope": _Kind(
        {
            "": _SINGAPORE,
            "intl": _SINGAPORE,
            "us": "https://dashscope-us.aliyuncs.com",
            "cn": "https://dashscope.aliyuncs.com",
        },
        "DASHSCOPE_API_KEY",
        keyed=True,
    ),
    "runcomfy": _Kind({"": "https://model-api.runcomfy.net"}, "RUNCOMFY_TOKEN", keyed=False),
    "openai-video": _Kind({"openai": "https://api.openai.com/v1"}, "OPENAI_API_KEY", keyed=False),
    "fal": _Kind({"": "https://queue.fal.run"}, "FAL_KEY", keyed=True),
    "replicate": _Kind({"": "https://api.replicate.com"}, "REPLICATE_API_TOKEN", keyed=True),
}


def configured(settings: Settings, environ: Mapping[str, str]) -> tuple[RemoteConfig, ...]:
    """The remotes in the order of the setting. Raises SettingsError where one lacks a key, or its key is none."""
    if not settings.remotes:
        return ()
    secrets = _secrets(settings)
    found = []
    for remote in _read(settings):
        base_url = _base_url(remote)
        key = _key(remote, base_url, environ, secrets)
        found.append(RemoteConfig(remote.name, remote.kind, base_url, key))
    return tuple(found)


def key_variables(settings: Settings) -> frozenset[str]:
    """The variables that keys of the configured remotes are read from."""
    return frozenset(name for remote in _read(settings) for name in _variables(remote, _base_url(remote)))


def hidden_from_slots(environ: Iterable[str]) -> frozenset[str]:
    """Of the variables in ``environ``, those that hold keys of remotes, whether the settings name these or not: no
    slot's process needs them.
    """
    vendors = {kind.variable for kind in _KINDS.values()}
    return frozenset(name for name in environ if name in vendors or _ANY_KEY.fullmatch(name))


def cautions(settings: Settings, remotes: Sequence[RemoteConfig]) -> Iterator[str]:
    """What works, and yet lays keys open: for the log and `rushes doctor`."""
    file = settings.secrets_file
    if settings.remotes and file is not None and file.exists() and os.name == "posix":
        mode = file.stat().st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            yield f"{file} (secrets_file) can be read by other users: chmod 600 {file}"
    for remote in remotes:
        parts = urlsplit(remote.base_url)
        if remote.key is not None and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            yield f"the key of the remote {remote.name} goes to {parts.netloc} unencrypted; use an https address"


def _read(settings: Settings) -> tuple[Remote, ...]:
    try:
        return remotes_of(settings.remotes)
    except ValueError as error:
        raise SettingsError(f"remotes: {error}") from None


def _base_url(remote: Remote) -> str:
    places = _KINDS[remote.kind].places
    if remote.place in places:
        return places[remote.place]
    path = urlsplit(remote.place).path
    if remote.kind == "openai-video":
        return remote.place if path else remote.place + _V1
    # Vendors' documents give these bases both with /v1 and without it.
    return remote.place.removesuffix(_V1) if remote.kind in ("runcomfy", "replicate") else remote.place


def _variables(remote: Remote, base_url: str) -> tuple[str, ...]:
    """Where the remote's key may stand, the first found wins."""
    kind = _KINDS[remote.kind]
    own = base_url in kind.places.values()
    return (key_variable(remote.name), *((kind.variable,) if own else ()))


def _key(
    remote: Remote, base_url: str, environ: Mapping[str, str], secrets: Mapping[str, str]
) -> Secret | None:
    variables = _variables(remote, base_url)
    for name in variables:
        value = (environ.get(name) or secrets.get(name) or "").strip()
        if not value:
            continue
        if not (value.isascii() and value.isprintable() and " " not in value):
            raise SettingsError(f"{name} holds no key: it has spaces or other characters that no key has")
        return Secret(value)
    if _KINDS[remote.kind].keyed or len(variables) > 1:
        either = " or ".join(reversed(variables))
        raise SettingsError(
            f"remotes names {remote.name}, which needs a key: set {either}, in the environment or in the "
            "file that RUSHES_SECRETS_FILE names"
        )
    return None


def _secrets(settings: Settings) -> dict[str, str]:
    """The keys of the secrets file by variable. Raises SettingsError, which never quotes the file."""
    file = settings.secrets_file
    if file is None:
        return {}
    try:
        values = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"secrets_file: {file} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        raise SettingsError(f'secrets_file: {file} is not TOML: write lines such as FAL_KEY = "…"') from None
    for name, value in values.items():
        if not isinstance(value, str):
            raise SettingsError(f'secrets_file: {name} in {file} is no text: write {name} = "…"')
    return values
