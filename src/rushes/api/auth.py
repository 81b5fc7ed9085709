"""Who is asking: the Bearer key of a request."""

from rushes.errors import Unauthorized
from rushes.requests.record import Key
from rushes.service.core import Service

_LONGEST = 512


async def authenticate(service: Service, authorization: bytes) -> Key:
    """Raises Unauthorized where there is no key, or not a valid one."""
    scheme, _, key = authorization.partition(b" ")
    key = key.strip()
    if scheme.lower() != b"bearer" or not key or len(key) > _LONGEST:
        raise Unauthorized
    return await service.authenticate(key.decode("utf-8", "surrogateescape"))
