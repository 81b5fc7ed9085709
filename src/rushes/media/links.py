"""Signed, expiring links to stored files. Pure: the secret and the clock come from the caller.

A link carries the second at which it ends and an HMAC-SHA256 over that second and the storage key, so that
neither can be changed, and needs no row in any table. Whoever has the link has the file until then.
"""

import base64
import hashlib
import hmac
from typing import Final

_PURPOSE: Final = b"rushes file link 1\n"
"""Goes into every signature: one made with the same secret for another purpose is no link."""


def _signature(secret: bytes, key: str, expires: int) -> bytes:
    # The number's digits end at the first newline and a storage key has none: no two pairs read the same.
    message = _PURPOSE + f"{expires}\n{key}".encode()
    return base64.urlsafe_b64encode(hmac.digest(secret, message, hashlib.sha256)).rstrip(b"=")


def sign(secret: bytes, key: str, expires: int) -> str:
    """The query string ``expires=…&signature=…`` for the file under ``key``.

    ``expires`` is in seconds since the epoch. The result needs no escaping in a URL.
    """
    return f"expires={expires}&signature={_signature(secret, key, expires).decode()}"


def verify(secret: bytes, key: str, expires: int, signature: str, now: float) -> bool:
    """Whether ``signature`` fits ``key`` and ``expires`` and has not ended at ``now``, in seconds since
    the epoch.

    The comparison takes the same time wherever the first wrong character stands.
    """
    fits = hmac.compare_digest(_signature(secret, key, expires), signature.encode("utf-8", "replace"))
    return fits and now < expires
