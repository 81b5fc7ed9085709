"""Who is asking: the Bearer key of a request."""

from rushes.api.http import Head
from rushes.errors import Unauthorized
from rushes.requests.record import Key
from rushes.service.core import Service

_LONGEST = 512


async def authenticate(service: Service, head: Head) -> Key:
    """The caller's key, noted for the log. Raises Unauthorized where there is none, or not a valid one."""
    scheme, _, key = head.authorization.partition(b" ")
    key = key.strip()
    if scheme.lower() != b"bearer" or not key or len(key) > _LONGEST:
        raise Unauthorized
    caller = await service.authenticate(key.decode("utf-8", "surrogateescape"))
    head.key = caller.id
    return caller
