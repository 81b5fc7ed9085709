"""Identifiers: time-ordered, so that inserts stay at the end of every index; unguessable beside that."""

import os
import re
import threading
import time
from typing import Final, NewType

RequestId = NewType("RequestId", str)
AccountId = NewType("AccountId", str)
KeyId = NewType("KeyId", str)
WorkerId = NewType("WorkerId", str)
FileId = NewType("FileId", str)

_FORM: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_lock = threading.Lock()
_last_ms = 0


def uuid7() -> str:
    """A UUID version 7 (RFC 9562) as 36 characters: 48 bits of milliseconds, then 74 random bits.

    Never goes back within a process, also when the clock does.
    """
    global _last_ms
    with _lock:
        _last_ms = ms = max(time.time_ns() // 1_000_000, _last_ms)
    bits = int.from_bytes(os.urandom(10), "big")
    value = ms << 80 | 0x7 << 76 | (bits >> 68 & 0xFFF) << 64 | 0b10 << 62 | (bits & (1 << 62) - 1)
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def new_request_id() -> RequestId:
    return RequestId(uuid7())


def is_request_id(text: str) -> bool:
    """Whether ``text`` has the form of a request id; says nothing of its existence."""
    return _FORM.fullmatch(text) is not None
