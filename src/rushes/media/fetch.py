"""Fetch a file from a public HTTPS address that a user gave, or a remote engine, without becoming a way into the
network.

The host is resolved here, every address it has is judged (:mod:`rushes.media.addresses`), and the connection
goes to one of those very addresses, while SNI, the certificate check and the Host header use the name: a name
that resolves to something else a moment later changes nothing. Redirects are followed here too, each one
judged like the first address. Sizes and time are bounded by what arrives, not by what headers promise. An origin
that the operator named (a remote engine's) is not judged, for as long as no redirect has led away from it.

What arrives is only sniffed. Whether it decodes is for :mod:`rushes.media.inspector` to say, elsewhere.

httpx is imported by :func:`fetch` alone: a gateway calls :func:`check_url` and never fetches.
"""

import asyncio
import contextlib
import errno
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, urljoin, urlsplit

import msgspec

from rushes.errors import MediaError, SettingsError, StoreUnavailable
from rushes.media.addresses import (
    IPAddress,
    IPNetwork,
    allowed,
    parse_address,
    parse_networks,
    why_refused,
)
from rushes.media.sniff import SNIFF_BYTES, WANTED, Kind, Sniffed, looks_like_html, sniff
from rushes.settings import Settings

if TYPE_CHECKING:
    import httpx

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""From a host name and a port to addresses, as text. Raises OSError where there are none."""

MAX_URL_LENGTH: Final = 8192
_MAX_ADDRESSES: Final = 8
"""Addresses of one host that are tried, each for the connect timeout."""
_WRITE_BYTES: Final = 1 << 20
_PORTS: Final = {"https": 443, "http": 80}
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_HOST: Final = re.compile(r"(?=.{1,253}\Z)[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?(?:\.[a-z0-9_-]{1,63})*")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
_INSTEAD: Final = "Give a public https:// address, a data: URI, or upload the file with POST /v1/files."
# getaddrinfo blocks for as long as the name servers do; it must not hold up what else uses the default pool.
_resolving: Final = ThreadPoolExecutor(max_workers=8, thread_name_prefix="rushes-resolve")


class FetchPolicy(msgspec.Struct, frozen=True):
    """What a fetch may do. Sizes in bytes, times in seconds."""

    allow: tuple[str, ...] = ()
    """Private networks that are permitted, as CIDR; http:// is too, to addresses inside them alone."""
    origins: tuple[str, ...] = ()
    """Origins that the operator named, as :func:`origin_of` writes them: wherever they lead, and over http:// too.
    Never a user's.
    """
    seconds: float = 60.0
    """For all of it: resolving, every redirect, and the last byte."""
    max_bytes: Mapping[Kind, int] = msgspec.field(
        default_factory=lambda: {"image": 50_000_000, "video": 100_000_000}
    )
    max_redirects: int = 3
    connect_timeout: float = 10.0
    """For one connection attempt to one address."""
    ca_file: str | None = None
    """Certificates to trust in place of the usual ones."""


class Target(msgspec.Struct, frozen=True):
    """An address taken apart once, so that what is judged is what is asked for."""

    scheme: str
    host: str
    """In lower case and ASCII, without brackets or a final dot."""
    port: int
    path: str
    """Path and query, escaped."""

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{self.authority}"

    @property
    def url(self) -> str:
        return self.origin + self.path


class BadStatus(MediaError):
    """The host answers with this HTTP status and no file."""

    def __init__(self, http_status: int, message: str) -> None:
        self.http_status = http_status
        super().__init__("input_http_status", message)


class Fetched(msgspec.Struct, frozen=True):
    """A file that arrived whole, by its size in bytes and its first bytes."""

    path: Path
    size: int
    kind: Kind
    content_type: str
    extension: str


def policy_from(settings: Settings) -> FetchPolicy:
    """The policy that the settings ask for. Raises SettingsError where an allowed network is none."""
    try:
        parse_networks(settings.fetch_allow)
    except ValueError as error:
        raise SettingsError(
            f"fetch_allow: {error}; write networks such as `10.0.0.0/8`, comma-separated"
        ) from None
    return FetchPolicy(
        allow=settings.fetch_allow,
        seconds=settings.fetch_seconds,
        max_bytes={"image": settings.max_image_bytes, "video": settings.max_video_bytes},
    )


@lru_cache(maxsize=8)
def _networks(allow: tuple[str, ...]) -> tuple[IPNetwork, ...]:
    return parse_networks(allow)


@lru_cache(maxsize=8)
def _tls(ca_file: str | None) -> ssl.SSLContext:
    """Kept: reading the certificates anew takes longer than a small download. Without ``ca_file`` httpx
    chooses: those of certifi, or ``SSL_CERT_FILE``.
    """
    import httpx

    context = ssl.create_default_context(cafile=ca_file) if ca_file else httpx.create_ssl_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def check_url(url: str, policy: FetchPolicy) -> Target:
    """Refuse what needs no look at the network; answer the address taken apart.

    Cheap and pure, for the moment of submit. Raises MediaError.
    """
    url = url.strip()
    if len(url) > MAX_URL_LENGTH:
        raise MediaError(
            "input_url_invalid", f"The address is longer than {MAX_URL_LENGTH} characters. {_INSTEAD}"
        )
    if _CONTROL.search(url):
        raise MediaError(
            "input_url_invalid",
            "The address contains control characters or backslashes. Escape or remove them.",
        )
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:  # whose words would quote the address, with what secrets it may hold
        raise MediaError("input_url_invalid", f"The address cannot be read. {_INSTEAD}") from None
    scheme = parts.scheme.lower()
    if scheme not in ("https", "http") or (scheme == "http" and not (policy.allow or policy.origins)):
        raise MediaError("input_not_https", f"Only https:// addresses are fetched. {_INSTEAD}")
    if parts.username is not None or parts.password is not None:
        raise MediaError(
            "input_url_invalid",
            "The address contains a user name or a password, which would end up in logs. "
            "Use a signed or public address instead.",
        )
    if port == 0:
        raise MediaError("input_url_invalid", "The address has port 0. Name a real port or none.")
    host = _ascii_host(host)
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    if parts.query:
        path += "?" + quote(parts.query, safe="/?%:@!$&'()*+,;=~-._[]")
    target = Target(scheme, host, port or _PORTS[scheme], path)
    literal = parse_address(host)
    if literal is None and (host == "localhost" or host.endswith(".localhost")):
        literal = parse_address("127.0.0.1")
    if literal is not None and target.origin not in policy.origins:
        _judge(literal, scheme, policy)
    return target


def origin_of(url: str) -> str:
    """Scheme, host and port of an http(s) address, the port only where it is not the usual one: as
    :attr:`Target.origin` has it. Raises MediaError where there is none.
    """
    try:
        parts = urlsplit(url.strip())
        host, port = _ascii_host(parts.hostname or ""), parts.port
    except ValueError:
        host, port = "", None
    if not host or parts.scheme not in ("https", "http"):
        raise MediaError("input_url_invalid", f"The address cannot be read. {_INSTEAD}")
    return Target(parts.scheme, host, port or _PORTS[parts.scheme], "/").origin


def _ascii_host(host: str) -> str:
    host = host.lower()
    if not host.isascii():
        import idna

        try:
            host = idna.encode(host, uts46=True).decode("ascii")
        except idna.IDNAError:
            host = ""
    host = host.removesuffix(".")
    if ":" in host and "%" not in host and parse_address(host) is not None:
        return host
    if not _HOST.fullmatch(host):
        raise MediaError("input_url_invalid", f"The address names no valid host. {_INSTEAD}")
    return host


def _judge(address: IPAddress, scheme: str, policy: FetchPolicy) -> None:
    networks = _networks(policy.allow)
    reason = why_refused(address, networks)
    if reason is not None:
        raise MediaError(
            "input_address_refused",
            f"The address leads to a host that is not public ({reason}). {_INSTEAD}",
        )
    if scheme == "http" and not allowed(address, networks):
        raise MediaError("input_not_https", f"Only https:// addresses are fetched. {_INSTEAD}")


async def resolve(host: str, port: int) -> Sequence[str]:
    """All addresses of a host, by the system's resolver, off the event loop."""
    loop = asyncio.get_running_loop()
    found = await loop.run_in_executor(
        _resolving, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    )
    return [str(entry[4][0]) for entry in found]


async def fetch(
    url: str,
    dest: Path,
    *,
    policy: FetchPolicy,
    media: Kind | None = None,
    resolver: Resolver = resolve,
    headers: Mapping[str, str] | None = None,
) -> Fetched:
    """Fetch ``url`` into the file ``dest``, which exists afterwards only if all went well.

    ``media`` is the kind that is wanted; None takes both, each within its own limit. ``headers`` go to origins of
    ``policy.origins`` alone, and to none after a redirect. Raises MediaError, with a message that a user can act
    on, and StoreUnavailable where ``dest`` cannot be written.
    """
    try:
        async with asyncio.timeout(policy.seconds) as clock:
            return await _follow(check_url(url, policy), dest, policy, media, resolver, headers or {})
    except BaseException as error:
        dest.unlink(missing_ok=True)
        if isinstance(error, TimeoutError) and clock.expired():
            raise MediaError(
                "input_too_slow",
                f"The file did not arrive within {policy.seconds:g} seconds. "
                "Use a faster host, or upload the file with POST /v1/files.",
            ) from None
        raise


async def _follow(
    target: Target,
    dest: Path,
    policy: FetchPolicy,
    media: Kind | None,
    resolver: Resolver,
    headers: Mapping[str, str],
) -> Fetched:
    first = target.origin
    policy = msgspec.structs.replace(policy, origins=(first,) if first in policy.origins else ())
    for _ in range(policy.max_redirects + 1):
        if target.origin not in policy.origins:
            # From here on a stranger says where to go: also back to the named origin he is nobody to trust.
            policy, headers = msgspec.structs.replace(policy, origins=()), {}
        addresses = await _checked_addresses(target, policy, resolver)
        async with _request(target, addresses, policy, headers) as response:
            if response.status_code not in _REDIRECTS:
                return await _receive(response, target, dest, policy, media)
            location = response.headers.get("location", "")
        try:
            target = check_url(urljoin(target.url, location), policy)
        except ValueError:
            raise MediaError(
                "input_url_invalid", f"{target.host} redirects to an address that cannot be read. {_INSTEAD}"
            ) from None
        except MediaError as error:
            raise MediaError(error.reason, f"After a redirect from {target.host}: {error.message}") from None
    raise MediaError(
        "input_too_many_redirects",
        f"The address redirects more than {policy.max_redirects} times. Give the address of the file itself.",
    )


async def _checked_addresses(target: Target, policy: FetchPolicy, resolver: Resolver) -> list[IPAddress]:
    """Every address of the host, each judged: one bad one refuses the host, as a mix is how filters are
    deceived.
    """
    literal = parse_address(target.host)
    if literal is not None:
        return [literal]  # judged by check_url
    try:
        texts = await resolver(target.host, target.port)
    except (OSError, UnicodeError):
        texts = []
    addresses = [address for address in map(parse_address, dict.fromkeys(texts)) if address is not None]
    if not addresses:
        raise MediaError(
            "input_unreachable", f"The host {target.host} is not known. Check the address for typing errors."
        )
    for address in () if target.origin in policy.origins else addresses:
        _judge(address, target.scheme, policy)
    return addresses[:_MAX_ADDRESSES]


@contextlib.asynccontextmanager
async def _request(
    target: Target, addresses: Sequence[IPAddress], policy: FetchPolicy, extra: Mapping[str, str]
) -> "AsyncIterator[httpx.Response]":
    """Ask the first of ``addresses`` that lets itself be connected to.

    A transport lives for one request: a pooled connection belongs to an address, and the next host on the
    same address needs a handshake and a certificate check of its own. A bare transport, as a client would
    mind the environment's proxies, cookies and redirects.
    """
    import httpx

    timeout = httpx.Timeout(policy.seconds, connect=policy.connect_timeout)
    headers = dict(extra) | {
        "Host": target.authority,
        "User-Agent": "rushes",
        "Accept": "image/png,image/jpeg,image/webp,image/avif,image/gif,"
        "video/mp4,video/webm,video/quicktime,*/*;q=0.1",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    failure: Exception | None = None
    for address in addresses:
        url = httpx.URL(
            scheme=target.scheme, host=str(address), port=target.port, raw_path=target.path.encode("ascii")
        )
        extensions = {"sni_hostname": target.host, "timeout": timeout.as_dict()}
        request = httpx.Request("GET", url, headers=headers, extensions=extensions)
        async with httpx.AsyncHTTPTransport(verify=_tls(policy.ca_file), trust_env=False) as transport:
            try:
                response = await transport.handle_async_request(request)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
                continue
            except httpx.HTTPError as error:
                raise _broken(target, error) from None
            try:
                yield response
            except httpx.HTTPError as error:
                raise _broken(target, error) from None
            finally:
                await response.aclose()
            return
    if failure is not None and "CERTIFICATE_VERIFY_FAILED" in str(failure):
        raise MediaError(
            "input_unreachable",
            f"The certificate of {target.host} is not valid for it. Use a host with a trusted certificate.",
        )
    raise MediaError(
        "input_unreachable", f"{target.host} could not be reached. Check that the address works from outside."
    )


def _broken(target: Target, error: Exception) -> MediaError:
    from httpx import TimeoutException

    what = "stopped answering" if isinstance(error, TimeoutException) else "broke off the answer"
    return MediaError(
        "input_incomplete", f"{target.host} {what} before the file was whole. Try again or use another host."
    )


_STATUS_WORDS: Final = {
    401: "wants a login (401). Give a public or signed address",
    403: "refuses access (403). Make the file public, or sign a fresh address if this one has expired",
    404: "has no such file (404). Check the address",
    410: "no longer has the file (410). Use another address",
    429: "takes no more requests for now (429). Try again later, or upload the file with POST /v1/files",
}


def _check_status(response: "httpx.Response", target: Target) -> None:
    status = response.status_code
    if status == 200:
        return
    words = _STATUS_WORDS.get(status)
    if words is None and status >= 500:
        words = f"has a fault of its own ({status}). Try again later, or use another host"
    raise BadStatus(status, f"{target.host} {words or f'answers with status {status} and no file'}.")


async def _receive(
    response: "httpx.Response", target: Target, dest: Path, policy: FetchPolicy, media: Kind | None
) -> Fetched:
    _check_status(response, target)
    if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        # Never asked for. Decoding it would need a second limit against files that grow while unpacked.
        raise MediaError(
            "input_encoded", f"{target.host} sends the file compressed. Use a host that sends it as it is."
        )
    limit = policy.max_bytes[media] if media else max(policy.max_bytes.values())
    length = response.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise _too_large(limit)
    size, sniffed, buffer = 0, None, bytearray()
    with _disk():
        file = dest.open("wb", buffering=0)
    with file:
        async for chunk in response.aiter_raw():
            size += len(chunk)
            if size > limit:
                raise _too_large(limit)
            buffer += chunk
            if sniffed is None and size >= SNIFF_BYTES:
                sniffed = _wanted(bytes(buffer[:SNIFF_BYTES]), media)
                limit = policy.max_bytes[sniffed.kind]
            if len(buffer) >= _WRITE_BYTES:
                with _disk():
                    await asyncio.to_thread(_write, file, bytes(buffer))
                buffer.clear()
        sniffed = sniffed or _wanted(bytes(buffer), media)
        with _disk():
            await asyncio.to_thread(_write, file, bytes(buffer))
    return Fetched(dest, size, sniffed.kind, sniffed.content_type, sniffed.extension)


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StoreUnavailable(
            "The disk for fetched inputs is full. Free some space."
            if full
            else "The folder for fetched inputs cannot be written to."
        ) from error


def _write(file: RawIOBase, data: bytes) -> None:
    """All of it: a raw file may take less than it is given."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) or 0 :]


def _too_large(limit: int) -> MediaError:
    return MediaError(
        "input_too_large", f"The file is larger than {limit / 1_000_000:g} MB. Use a smaller one."
    )


def _wanted(head: bytes, media: Kind | None) -> Sniffed:
    sniffed = sniff(head)
    wanted = WANTED[media] if media else f"{WANTED['image']}, or {WANTED['video']}"
    if sniffed is None:
        if not head:
            raise MediaError("input_not_media", "The address answers with an empty file.")
        if looks_like_html(head):
            raise MediaError(
                "input_not_media",
                "The address answers with a web page, such as a login or share page, not with a file. "
                "Give the direct address of the file itself.",
            )
        raise MediaError("input_not_media", f"What the address answers with is not {wanted}.")
    if media and sniffed.kind != media:
        raise MediaError(
            "input_wrong_kind", f"The address answers with {sniffed.content_type}; wanted is {wanted}."
        )
    return sniffed
