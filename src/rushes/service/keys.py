"""API keys: made once, shown once, stored as a hash."""

import hashlib
import secrets
import time
from typing import Final

from rushes.requests.ids import AccountId, KeyId, uuid7
from rushes.requests.record import Key

PREFIX: Final = "rsh_"


def new_key(name: str, account: str = "default") -> tuple[str, Key]:
    """A fresh key of 256 random bits, and its record. The key itself is nowhere else: show it now.

    A plain SHA-256 is enough for the record: what it hides cannot be guessed, unlike a password.
    """
    key = PREFIX + secrets.token_urlsafe(32)
    record = Key(
        id=KeyId(f"key_{uuid7()}"),
        account=AccountId(account),
        name=name,
        hash=key_hash(key),
        hint=key[-4:],
        created_at=time.time(),
    )
    return key, record


def key_hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
